"""Plain autograd, one sample at a time: the numbers that the engine's are checked against.

Capture, packing and token terms are not used: every sequence is run by itself, the published
formula of an objective is differentiated, and inner products are summed in fp64. Where ranks share
out the model, all of them run the same sample, and each holds its part of the gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import eagerly, frequencies_at_first, is_sharded, own_part
from geffect_fast.capture.shards import Shards, at_work
from geffect_fast.data import SampleSet, make_batches
from geffect_fast.data.batch import Batch
from geffect_fast.data.memory import free_memory
from geffect_fast.engines.batches import ROLE_ORDER, Tick
from geffect_fast.engines.model_outputs import logits_of, without_cache
from geffect_fast.objectives import NLL, Objective, Outputs
from geffect_fast.ops.reference import accumulation_dtype
from geffect_fast.precision import widened
from geffect_fast.ranks import here

BLOCK = {"cpu": 2**15}
"""Elements that are converted to fp64 at a time, by kind of device; a CPU's caches hold them."""
LARGE_BLOCK = 2**22
"""Elements that are converted to fp64 at a time on any other device."""

PART_HELD = 0.25
"""Part of free memory that samples' gradients may take."""

Gradient = list[Tensor | None]
"""A gradient by parameter, or this rank's part of it; None where a parameter has no gradient."""


@dataclass(frozen=True)
class Numbers:
    """Effects, norms and inner products per parameter and sample, all fp64.

    Attributes:
        effects: `(K, P, 2 N)`, `<gradient of row r's share of objective k, risk gradient>`: first
            the rows as forget data, then the same rows as retain data.
        norms: `(P, N)`, norm of the gradient of sample `i`'s share of the risk.
        products: `(P, N, N)`, inner products of these gradients.
    """

    effects: Tensor
    norms: Tensor
    products: Tensor


def plain_numbers(
    model: nn.Module,
    sample_set: SampleSet,
    objectives: Sequence[Objective],
    reference: nn.Module | None,
    tick: Tick,
) -> Numbers:
    """`Numbers` of a model by plain backwards of one sample, `n + K n` for `K` different parts.

    The risk and the parts that read the same sequences share one forward of a sample, as far as
    their gradients fit into a quarter of free memory. Where not even the risk's gradients fit, two
    are held at a time and formed again for each pair: `n (n + 1) / 2 + n + K n` backwards.

    Args:
        model: its trainable parameters count.
        sample_set: serves as forget data, retain data and data of the risk (`nll`).
        objectives: elementary ones or sums.
        reference: what objectives compare with; None: the model itself.
        tick: progress.
    """
    with at_work(model):
        shards = Shards(model, here()) if is_sharded(model) else None
        with nullcontext() if shards is None else shards.sums():
            return _plain_numbers(model, shards, sample_set, objectives, reference, tick)


def _plain_numbers(
    model: nn.Module,
    shards: Shards | None,
    sample_set: SampleSet,
    objectives: Sequence[Objective],
    reference: nn.Module | None,
    tick: Tick,
) -> Numbers:
    """Do the work of `plain_numbers`; where ranks share out the model, inside `Shards.sums`."""
    at_rest = [p for p in model.parameters() if p.requires_grad]
    parameters: list[Tensor] = [own_part(p) for p in at_rest]
    device = parameters[0].device
    n, n_parameters = len(sample_set), len(parameters)

    def gradients(objectives: Sequence[Objective], batch: Batch) -> list[Gradient]:
        """The gradients of objectives that read the same sequences, by one forward."""
        batch = batch.to(device)
        needs = {need for objective in objectives for need in objective.needs}
        outputs, other = plain_outputs(model, batch, needs), None
        if any(need.startswith("reference") for need in needs):
            with torch.no_grad():
                other = plain_outputs(reference or model, batch, needs)
        losses = [objective.loss(outputs, batch, other) for objective in objectives]
        tick(len(losses) * batch.total_tokens)
        found: list[Gradient] = []
        for loss in losses:
            more = loss is not losses[-1]
            if shards is None:
                grads = torch.autograd.grad(loss, at_rest, allow_unused=True, retain_graph=more)
                found.append(list(grads))
            else:  # the sum over ranks is the first rank's loss alone, so that nothing is rounded
                one = loss if shards.ranks.first else 0 * loss
                wholes = [shards.whole(p) for p in at_rest]
                found.append(shards.sum_of_gradients(one, wholes, more=more))
        return found

    def added_up(products: Tensor) -> Tensor:
        """Products of whole gradients, from those of all ranks' parts."""
        if shards is not None:
            shards.add_up([products])
        return products

    risk = NLL()
    answers = _batches(sample_set, risk)
    parts = list(dict.fromkeys(part for objective in objectives for _, part in objective.parts()))
    scores: dict[Objective, Tensor] = {}
    """Effects of each part's samples on the risk, `(P, n)`, by part."""
    if holds_all(model, n):
        kept: list[Objective] = [risk]
        for part in parts:  # those that share the risk's forward, as far as memory allows
            reads_the_same = part not in kept and part.roles == risk.roles
            if reads_the_same and holds_all(model, (len(kept) + 1) * n):
                kept.append(part)
        by_sample = [gradients(kept, batch) for batch in answers]
        held = [sample[k] for k in range(len(kept)) for sample in by_sample]
        grams = added_up(torch.stack([gram(grads, n) for grads in zip(*held, strict=True)]))
        products = grams[:, :, :n]
        scores = dict(zip(kept, grams.sum(1).split(n, dim=1), strict=True))
        risk_gradients = iter(held[:n])
    else:
        products = torch.zeros(n_parameters, n, n, dtype=torch.float64)
        for i in range(n):
            (first,) = gradients([risk], answers[i])
            for j in range(i, n):
                (second,) = [first] if j == i else gradients([risk], answers[j])
                products[:, i, j] = products[:, j, i] = dots(first, second)
        products = added_up(products)
        first = second = []
        risk_gradients = (gradients([risk], batch)[0] for batch in answers)

    rest = [part for part in parts if part not in scores]
    if rest:
        direction = _summed(risk_gradients, parameters)
        for part in rest:
            own = (gradients([part], batch)[0] for batch in _batches(sample_set, part))
            scores[part] = added_up(torch.stack([dots(grads, direction) for grads in own], dim=1))
    effects = torch.zeros(len(objectives), n_parameters, 2 * n, dtype=torch.float64)
    for k, objective in enumerate(objectives):
        for coefficient, part in objective.parts():
            offset = n if part.on == "retain" else 0
            effects[k, :, offset : offset + n] += coefficient * scores[part]
    return Numbers(effects, products.diagonal(dim1=1, dim2=2).sqrt(), products)


def _summed(gradients: Iterable[Gradient], parameters: Sequence[Tensor]) -> Gradient:
    """The sum of gradients, in the precision that gradients are added up in."""
    total: Gradient = [
        torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), requires_grad=False)
        for p in parameters
    ]
    for each in gradients:
        for of, grad in zip(total, each, strict=True):
            if of is not None and grad is not None:
                of += grad
    return total


def holds_all(model: nn.Module, n: int) -> bool:
    """Whether `n` gradients take at most a quarter (`PART_HELD`) of the memory that is free.

    Where ranks share out the model, this must hold on all of them.
    """
    parameters = [own_part(p) for p in model.parameters() if p.requires_grad]
    room = PART_HELD * free_memory(parameters[0].device)
    fits = n * sum(p.nbytes for p in parameters) <= room
    return all(here().meet(fits)) if is_sharded(model) else fits


def plain_tokens(model: nn.Module, sample_set: SampleSet, objectives: Sequence[Objective]) -> int:
    """Tokens that `plain_numbers` runs forward and backward."""
    risk = NLL()
    lengths = [batch.total_tokens for batch in _batches(sample_set, risk)]
    parts = dict.fromkeys(part for objective in objectives for _, part in objective.parts())
    pairs = 0
    if holds_all(model, len(lengths)):
        parts.pop(risk, None)  # its gradients have been formed
    else:
        pairs = sum((j + 1) * length for j, length in enumerate(lengths))
    effects = sum(b.total_tokens for part in parts for b in _batches(sample_set, part))
    return pairs + sum(lengths) + effects


def _batches(sample_set: SampleSet, part: Objective) -> list[Batch]:
    """Batches of one sample each, with the sequences that the objective reads."""
    roles = tuple(role for role in ROLE_ORDER if role in part.roles)
    return make_batches(sample_set, roles, token_budget=1)


def plain_outputs(model: nn.Module, batch: Batch, needs: Collection[str] = ()) -> Outputs:
    """The model's outputs for a batch, each of whose sequences is run by itself."""
    kwargs = without_cache(model)
    if any("hidden_states" in need for need in needs):
        kwargs["output_hidden_states"] = True
    sequences = batch.input_ids.flatten().split(batch.cu_seqlens.diff().tolist())
    answers = []
    with eagerly(model):
        for ids in sequences:
            with frequencies_at_first(model):
                answers.append(model(input_ids=ids[None], **kwargs))
    rows = zip(answers, sequences, strict=True)
    logits = torch.cat([logits_of(answer, model, ids[None])[0] for answer, ids in rows])
    logits = logits[batch.target_index]
    hidden = None
    if kwargs.get("output_hidden_states"):
        layers = zip(*(answer.hidden_states for answer in answers), strict=True)
        hidden = tuple(
            torch.cat([h[0, -len(ids) :] for h, ids in zip(layer, sequences, strict=True)])
            for layer in layers
        )
    return Outputs(token_logprob(logits, batch), logits, hidden)


def token_logprob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of every label, `(total_tokens,)`, from logits `(n_targets, vocab)`."""
    index = batch.target_index
    logprob = widened(logits).log_softmax(-1).gather(-1, batch.targets[index, None])[:, 0]
    return logprob.new_zeros(batch.total_tokens).index_copy(0, index, logprob)


def dots(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> Tensor:
    """Inner products of two gradients by parameter, `(P,)`, summed in fp64; None is zero."""
    return torch.tensor([_dot(x, y) for x, y in zip(a, b, strict=True)], dtype=torch.float64)


def gram(grads: Sequence[Tensor | None], n: int) -> Tensor:
    """Inner products of one parameter's first `n` gradients with all `m`, `(n, m)`.

    Products are summed in fp64; None is zero.
    """
    products = torch.zeros(n, len(grads), dtype=torch.float64)
    flat = {i: grad.reshape(-1) for i, grad in enumerate(grads) if grad is not None}
    first = [i for i in flat if i < n]
    if not first:
        return products
    some = flat[first[0]]
    size = _block_size(some)
    # A single buffer, overwritten by every block, stays in the caches.
    buffer = torch.empty(len(flat), min(size, len(some)), dtype=torch.float64, device=some.device)
    found = torch.zeros(len(first), len(flat), dtype=torch.float64, device=some.device)
    for start in range(0, len(some), size):
        wide = buffer[:, : len(some) - start]
        for row, grad in zip(wide, flat.values(), strict=True):
            row.copy_(grad[start : start + size])
        found.addmm_(wide[: len(first)], wide.mT)
    products[torch.tensor(first)[:, None], list(flat)] = found.cpu()
    return products


def _dot(x: Tensor | None, y: Tensor | None) -> float:
    if x is None or y is None:
        return 0.0
    return sum(float(torch.dot(p.double(), q.double())) for p, q in _blocks(x, y))


def _blocks(*grads: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of gradients of one parameter, cut at the same places in each."""
    return zip(*(grad.reshape(-1).split(_block_size(grad)) for grad in grads), strict=True)


def _block_size(grad: Tensor) -> int:
    return BLOCK.get(grad.device.type, LARGE_BLOCK)
