"""Gradients over whole data sets: the risks' directions, and objectives without a sample axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps

import torch
from torch import Tensor

from geffect_fast.capture import Plan, Recorder, Recording
from geffect_fast.capture.factors import Factor
from geffect_fast.capture.products import (
    InnerProducts,
    in_working_precision,
    squared_norms,
)
from geffect_fast.capture.recorder import Sink
from geffect_fast.data.batch import Batch
from geffect_fast.data.memory import free_memory
from geffect_fast.engines.batches import Attempt, DataPass, Tick, each_batch, ranks_of
from geffect_fast.engines.model_outputs import (
    model_outputs,
    nll_by_sample,
    packed_attention,
    sample_axis,
)
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.sharded_products import ShardedProducts
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.objectives import Outputs
from geffect_fast.ops.reference import accumulation_dtype
from geffect_fast.ranks import Ranks
from geffect_fast.transfer import OnItsWay, on_device


def new_gradients(plan: Plan, n: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """Zeros `(n, *shape)` for every trainable parameter, in the dtype gradients are added up in.

    For parameters that are shared out, the shape is that of this rank's part.

    Args:
        plan: the model's plan.
        n: number of gradients.
        device: the device that keeps the gradients; None: that of each parameter.
    """
    return {
        name: torch.zeros(
            n,
            *p.shape,
            dtype=accumulation_dtype(p.dtype),
            device=device or p.device,
            pin_memory=device is not None and device.type == "cpu" and p.is_cuda,
        )
        for name, p in plan.held.items()
    }


def place_for_gradients(plan: Plan, n: int, fraction: float) -> torch.device | None:
    """The device that keeps gradients of risks and objectives: the CPU where a GPU has no room.

    Passes then bring over the gradients that they need. None: the parameters' devices.

    Args:
        plan: the model's plan.
        n: number of gradients, fp32.
        fraction: fraction of the GPU's free memory that the gradients may take.
    """
    device = plan.device
    wanted = 4 * n * sum(p.numel() for p in plan.held.values())
    full = device.type == "cuda" and wanted > fraction * free_memory(device)
    return torch.device("cpu") if full else None


def place_beside(gradients: Mapping[str, Tensor]) -> torch.device | None:
    """The device that keeps further gradients beside these, as `place_for_gradients` gives it."""
    return torch.device("cpu") if next(iter(gradients.values())).is_cpu else None


class Directions(Mapping[str, Tensor]):
    """Directions on the device and in the dtype of products with gradients, by parameter.

    A direction, `(M, *shape)`, that is kept on another device is brought over each time it is asked
    for.

    Args:
        plan: the model's plan.
        kept: `(M, *shape)` by parameter, on the device and in the dtype that they are kept in.
    """

    def __init__(self, plan: Plan, kept: Mapping[str, Tensor]) -> None:
        self._plan = plan
        self._kept = {name: self._as_taken(name, v) for name, v in kept.items()}

    def _as_taken(self, name: str, v: Tensor) -> Tensor:
        p = self._plan.parameters[name]
        return in_working_precision(v, p) if v.device == p.device else v

    def __getitem__(self, name: str) -> Tensor:
        v = self._kept[name]
        return self._as_taken(name, on_device(v, self._plan.parameters[name].device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def rows_of(gradients: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Views of each of the n gradients, one for every parameter's `(n, *shape)`."""
    return list(zip(*(of.unbind() for of in gradients.values()), strict=True))


def add_gradients(into: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add one backward's parameter gradients (None: unused) to the sums in `into`."""
    pairs = [(total, grad) for total, grad in zip(into, grads, strict=True) if grad is not None]
    if pairs:
        totals, found = map(list, zip(*pairs, strict=True))
        if totals[0].is_cpu and not found[0].is_cpu:
            found = OnItsWay(*found).arrived()
        torch._foreach_add_(totals, found)


@contextmanager
def gradients_as_they_are(plan: Plan) -> Iterator[None]:
    """Inside, a hook of a parameter that changes its gradient is an error.

    The samples' shares add up to the loss's own gradient, which must not be changed. Hooks that
    only look at a gradient, as loggers do, are allowed.

    Raises:
        UnsupportedModelError: a hook has changed a gradient; the message names the parameter.
    """

    def watched(name: str, hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], None]:
        @wraps(hook)
        def run(g: Tensor) -> None:
            before = g.clone()
            after = hook(g)
            if not torch.equal(before, g if after is None else after):
                raise UnsupportedModelError(
                    f"parameter '{name}': a hook changes its gradient (OSF of peft does), so the "
                    "model does not learn by the gradient of its loss; remove the hook, or freeze "
                    "the parameter"
                )

        return run

    hooked = {name: hooks for name, p in plan.parameters.items() if (hooks := p._backward_hooks)}
    own = {name: dict(hooks) for name, hooks in hooked.items()}
    try:
        for name, hooks in hooked.items():
            hooks.update({key: watched(name, hook) for key, hook in own[name].items()})
        yield
    finally:
        for name, hooks in hooked.items():
            hooks.update(own[name])


def inner_products(plan: Plan, direction_of: Callable[[str], Tensor]) -> InnerProducts:
    """The receiver that forms inner products with directions, `(M, *shape)` or a rank's part."""
    if plan.shards is None:
        return InnerProducts(direction_of)
    return ShardedProducts(plan, direction_of)


class ProductsWithFirst:
    """`< grad L_j, grad L_0 >` of the samples of objectives 1, 2, ..., found in their own passes.

    There are no products where samples cannot be told apart.

    Args:
        diagonal: the diagonal of the metric of the products, by parameter; None: plain products.

    Attributes:
        found: for every batch the objective's number, the samples' rows and their products `(n,)`.
        available: whether samples can be told apart, as far as is known.
    """

    def __init__(self, diagonal: Mapping[str, Tensor] | None = None) -> None:
        self.diagonal = diagonal
        self.found: list[tuple[int, list[int], Tensor]] = []
        self.available = True

    def gather(self, ranks: Ranks) -> None:
        """Bring the ranks' products together. Products exist only where every rank has its own."""
        if ranks.size > 1:
            own = [(k, rows, products.cpu()) for k, rows, products in self.found]
            told = ranks.meet((self.available, own))
            self.available = all(available for available, _ in told)
            self.found = [each for _, found in told for each in found]


def accumulate_gradients(
    plan: Plan,
    passes: Sequence[DataPass],
    n: int,
    reference: Reference,
    tick: Tick,
    kept_on: torch.device | None = None,
    products: ProductsWithFirst | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and gradients of `n` objectives over all their batches.

    Args:
        plan: the model's plan.
        passes: the batches, with the objectives that read them.
        n: number of objectives.
        reference: the model that the objectives compare with.
        tick: told of progress.
        kept_on: the device on which gradients are added up; None: that of each parameter.
        products: receives products with the first objective's gradient. The first pass must then
            be that of the first objective, and every other pass must have a single part.

    Returns:
        Values `(n,)` fp64, and by parameter name the gradients `(n, *shape)`, fp32 sums (fp64 for
        fp64 models) over batches whatever the model's dtype.
    """
    found: list[tuple[int, Tensor]] = []
    gradients = new_gradients(plan, n, kept_on)
    rows = rows_of(gradients)
    parameters = list(plan.parameters.values())

    def add(data_pass: DataPass, attempt: Attempt) -> None:
        if products is None or not products.available or data_pass is passes[0]:
            return run(data_pass, attempt)

        def first(name: str) -> Tensor:
            p = plan.parameters[name]
            of = on_device(gradients[name][:1], p.device)
            return in_working_precision(
                of if products.diagonal is None else of * products.diagonal[name], p
            )

        sink = inner_products(plan, first)
        try:
            run(data_pass, attempt, sink)
        except UnsupportedModelError:
            if plan.shards is not None:  # the other ranks do not run it again
                raise
            products.available = False
            return run(data_pass, attempt)
        (index,) = data_pass.parts
        if sink.found and not attempt.idle:
            scores = [score[0].double() for _, score in sink.found]
            own = torch.stack([score.to(scores[0].device) for score in scores]).sum(0)
            products.found.append((index, list(attempt.batch.rows), own))

    def run(data_pass: DataPass, attempt: Attempt, sink: Sink | None = None) -> None:
        batch = attempt.batch.to(parameters[0].device)
        recorder = None
        if sink is not None:
            axis = sample_axis(plan.model, batch)
            recorder = Recorder(plan, sink, axis, Recording(one_backward=True))
        with packed_attention(plan.model, batch), recorder or nullcontext():
            outputs = model_outputs(plan.model, batch, data_pass.needs)
            if recorder is not None and recorder.to_be_shown():
                recorder.show_rows(nll_by_sample(outputs, batch), plan.sources())
            other = reference.outputs(data_pass, batch, outputs)
            evaluated = plan, data_pass, attempt, outputs, batch, other
            for index, value, grads in backwards(*evaluated, parameters, recorder):
                with attempt.finishing(index):
                    if not attempt.idle:
                        found.append((index, value))
                    add_gradients(rows[index], grads)

    ranks = ranks_of(passes)
    # The first gradient must be whole before products with it are formed.
    first = 0 if products is None else 1
    with gradients_as_they_are(plan), plan.summing():
        for some, own in ((passes[:first], slice(first)), (passes[first:], slice(first, n))):
            for data_pass, attempt in each_batch(some, tick):
                with attempt:
                    add(data_pass, attempt)
            if some and plan.shards is None:
                ranks.add_up([of[own] for of in gradients.values()])
    if products is not None:
        products.gather(ranks)
    values = added_up(found, n)
    ranks.add_up([values])
    return values, gradients


def fisher_traces(
    plan: Plan, passes: Sequence[DataPass], n: int, reference: Reference, tick: Tick
) -> Tensor:
    """Traces of the empirical Fisher matrix by parameter: squares of rows' gradients, summed.

    The squares come from the factors of each row's gradient, which is never formed.

    Args:
        plan: the model's plan.
        passes: the passes, with one objective each.
        n: number of objectives.
        reference: the model that the objectives compare with.
        tick: told of progress.

    Returns:
        `sum_i |grad_p L_i|^2` of the rows' shares `L_i`, `(n, P)` fp64.

    Raises:
        UnsupportedModelError: a module's rows cannot be told apart by sample; it is named.
    """
    number = {name: p for p, name in enumerate(plan.parameters)}
    totals = torch.zeros(n, len(number), dtype=torch.float64)
    recording = Recording(joined=True, one_backward=True, norms_alone=True)

    def run(data_pass: DataPass, attempt: Attempt) -> None:
        found: dict[str, Tensor] = {}

        def measure(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
            found[name] = squared_norms(factors, plan.parameters[name].shape).sum()

        batch = attempt.batch.to(plan.device)
        recorder = Recorder(plan, measure, sample_axis(plan.model, batch), recording)
        with packed_attention(plan.model, batch), plan.frozen(), recorder:
            outputs = model_outputs(plan.model, batch, data_pass.needs)
            other = reference.outputs(data_pass, batch, outputs)
            roots = recorder.roots_of(outputs.token_logprob)
            if recorder.to_be_shown():
                recorder.show_rows(nll_by_sample(outputs, batch), roots)
            evaluated = plan, data_pass, attempt, outputs, batch, other
            for index, _, _ in backwards(*evaluated, roots, recorder):
                with attempt.finishing(index):
                    for name, square in found.items():
                        totals[index, number[name]] += square.double().cpu()

    for data_pass, attempt in each_batch(passes, tick):
        with attempt:
            run(data_pass, attempt)
    ranks_of(passes).add_up([totals])
    return totals


def backwards(
    plan: Plan,
    data_pass: DataPass,
    attempt: Attempt,
    outputs: Outputs,
    batch: Batch,
    reference: Outputs | None,
    sources: Sequence[Tensor],
    recorder: Recorder | None,
) -> Iterator[tuple[int, Tensor, Sequence[Tensor | None]]]:
    """Run one backward for each part that is not done yet, through one graph of outputs.

    Args:
        plan: the model's plan.
        data_pass, attempt: the pass with the parts, and the attempt at the batch.
        outputs, reference: the model's and the reference's outputs on the batch.
        batch: the batch, on the model's device.
        sources: the tensors that losses are differentiated by.
        recorder: told when a backward is over.

    Yields:
        A part's number, its value, and its gradients by the sources, None where it has none.
    """
    wanted = [index for index in data_pass.parts if index not in attempt.done]
    for index in wanted:
        terms, value = data_pass.terms(index, outputs, batch, reference)
        loss = 0 * terms.sum() if attempt.idle else terms.sum()
        grads: Sequence[Tensor | None] = [None] * len(sources)
        more = index != wanted[-1]
        if plan.shards is not None:
            grads = plan.sharded_gradients(loss, sources, more=more)
        elif loss.requires_grad:  # else it reads a layer below all trainable ones
            grads = torch.autograd.grad(loss, sources, retain_graph=more, allow_unused=True)
        if loss.requires_grad and recorder is not None:
            recorder.finish()
        yield index, value, grads


def added_up(found: Sequence[tuple[int, Tensor]], n: int) -> Tensor:
    """Sums of scalars by their numbers, `(n,)` fp64. The scalars are read off a device at once."""
    values = torch.zeros(n, dtype=torch.float64)
    if found:
        places, scalars = zip(*found, strict=True)
        (read,) = OnItsWay(torch.stack(scalars)).arrived()
        values.index_add_(0, torch.tensor(places), read)
    return values
