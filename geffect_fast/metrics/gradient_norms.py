"""Norms of the gradients of rows' mean losses, from ghost norms where these give the norm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geffect_fast.capture import Factor, Plan, Recording, Segments
from geffect_fast.capture.factors import summed_gradient, widened
from geffect_fast.capture.per_sample import record_rows
from geffect_fast.data import Layout
from geffect_fast.data.batch import Batch
from geffect_fast.data.samples import TokenSequence as Tokens
from geffect_fast.engines.batches import TokenBudget, each_batch
from geffect_fast.engines.model_outputs import logits_of, packed_attention, positions, without_cache
from geffect_fast.errors import InputError
from geffect_fast.functional import norms_of_rows
from geffect_fast.metrics.scored import Tick, shared_out
from geffect_fast.ops.ieee_fp32 import ieee_fp32
from geffect_fast.ranks import ALONE, Ranks

NORM_NEEDS = ("whole_norms", "parameter_norms", "largest_entries")


def gradient_norms(
    model: nn.Module,
    sequences: Sequence[Tokens],
    needs: Collection[str],
    budget: TokenBudget,
    layout: Layout,
    tick: Tick = lambda _: None,
    ranks: Ranks = ALONE,
) -> dict[str, np.ndarray]:
    """Norms of the gradient of every sequence's mean loss, by the need that they serve.

    - `whole_norms`: the norm of the whole gradient.
    - `parameter_norms`: the mean over trainable parameters of the norms of their gradients.
    - `largest_entries`: the mean over trainable parameters of the largest absolute entry of their
      gradients. Ghost norms do not give this, so every gradient is formed.

    Args:
        model: a model in eval mode.
        sequences: sequences with at least one label token each.
        needs: the needs to serve; others than these three are ignored.
        budget: the tokens of a batch.
        layout: a layout in which per-sample norms can be told apart, `packed` or another.
        tick: called with the number of tokens that are done.
        ranks: the ranks that share out the sequences, and may share out the model.

    Returns:
        `(n_sequences,)` fp64 each.

    Raises:
        InputError: all parameters are frozen.
        UnsupportedModelError: a module's rows cannot be told apart by sample.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "model: nothing in it can be trained, so gradient_norm has no gradient; set "
            "requires_grad, or leave the metric out"
        )
    plan = Plan.of(model, may_be_sharded=True)
    found = {need: np.zeros(len(sequences)) for need in NORM_NEEDS if need in needs}
    one_pass = [need for need in found if need != "largest_entries"]
    passes: list[tuple[list[str], Layout, Callable[..., list[Tensor]]]] = []
    if one_pass:
        passes.append((one_pass, layout, _ghost_norms))
    if "largest_entries" in found:
        passes.append((["largest_entries"], "single", _largest_entries))
    for names, how, norms in passes:
        for _, attempt in each_batch([shared_out(model, sequences, budget, how, ranks)]):
            with attempt:
                values = norms(plan, attempt.batch, names)
                if attempt.idle:
                    continue
                for name, of in zip(names, values, strict=True):
                    found[name][list(attempt.batch.rows)] = of.double().cpu().numpy()
                tick(attempt.batch.total_tokens)
    told = ranks.meet(found)  # each rank has zeros for others' sequences
    return {need: np.sum([of[need] for of in told], axis=0) for need in found}


def _ghost_norms(plan: Plan, batch: Batch, names: Sequence[str]) -> list[Tensor]:
    """Norms of the gradients of a batch's rows, `(n,)` for each of `names`."""
    moved = batch.to(plan.device)
    given = {"input_ids": moved.input_ids, "batch": moved}
    if batch.packed:
        given["cu_seqlens"] = moved.cu_samples
    by_parameter = "parameter_norms" in names
    with packed_attention(plan.model, moved):
        norms = norms_of_rows(plan, mean_losses, given, per_parameter=by_parameter)
    if isinstance(norms, Tensor):
        return [norms]
    of = torch.stack(list(norms.values()))
    both = {"whole_norms": of.square().sum(0).sqrt(), "parameter_norms": of.mean(0)}
    return [both[name] for name in names]


def mean_losses(model: nn.Module, given: dict[str, Batch]) -> Tensor:
    """The mean loss of every sample's label tokens, `(n_samples,)`."""
    batch = given["batch"]
    answer = model(input_ids=batch.input_ids, **without_cache(model), **positions(model, batch))
    logits = logits_of(answer, model, batch.input_ids).flatten(0, 1)[batch.target_index]
    nll = F.cross_entropy(widened(logits), batch.targets[batch.target_index], reduction="none")
    every = nll.new_zeros(batch.total_tokens).index_copy(0, batch.target_index, nll)
    mask = batch.target_mask()
    counts = batch.sample_sum(mask.to(nll.dtype), mask)
    return batch.sample_sum(every, mask) / counts


def _largest_entries(plan: Plan, batch: Batch, _names: Sequence[str]) -> list[Tensor]:
    """The mean over parameters of the largest absolute entry of one sample's gradient, `(1,)`.

    The mean is over the parameters that the sample reaches.
    """
    moved = batch.to(plan.device)
    if plan.shards is None:  # a plain backward is fastest where whole gradients have room
        with torch.enable_grad():
            (loss,) = mean_losses(plan.model, {"batch": moved})
            grads = torch.autograd.grad(loss, list(plan.parameters.values()), allow_unused=True)
        return [torch.stack([g.abs().max().double() for g in grads if g is not None]).mean()[None]]
    largest: list[Tensor] = []

    def look(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        gradient = summed_gradient(factors, 0, plan.parameters[name].shape)
        largest.append(gradient.abs().max().double())

    axis = Segments.rectangular(moved.input_ids.shape)
    with ieee_fp32():
        record_rows(plan, mean_losses, {"batch": moved}, axis, look, Recording(joined=True))
    return [torch.stack(largest).mean()[None]]
