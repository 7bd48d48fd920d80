"""Trial of a model for the layouts in which its samples can share a forward pass."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geffect_fast.capture import Factor, Plan, Recorder, Recording
from geffect_fast.capture.compat import is_sharded, still_up_to
from geffect_fast.capture.products import squared_norms
from geffect_fast.capture.shards import put_right
from geffect_fast.data import IGNORE, Layout, Sample, SampleSet, TokenSequence, make_batches
from geffect_fast.data.batch import Batch
from geffect_fast.engines.model_outputs import (
    model_outputs,
    nll_by_sample,
    packed_attention,
    sample_axis,
    splits_attention,
    takes,
)
from geffect_fast.engines.remembered import Remembered, state_of
from geffect_fast.errors import GEffectError, UnsupportedModelError
from geffect_fast.precision import precisions
from geffect_fast.trying import Trying, no_memory

PROBE_LENGTHS = (7, 4)
"""Tokens of the two probe sequences: long enough for attention, short enough to cost nothing."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Largest difference of gradient norms, relative to the largest, that rounding explains.

Models that mix up samples are off by tens of percent; fp64 models whose norms run in fp32 are why
the first figure is not smaller.
"""


@dataclass(frozen=True)
class _Tried:
    """The findings of a model's trial.

    Attributes:
        layout: the layout.
        outside: names of parameters used outside their modules, one tuple a call of `Plan.widen`.
        axes, shown: the attributes of the plan with these names, as the trial left them.
    """

    layout: Layout
    outside: tuple[tuple[str, ...], ...]
    axes: dict[tuple[str, int], int]
    shown: set[Hashable]


_TRIED: Remembered[_Tried] = Remembered()


def tried_layout(plan: Plan, sample_set: SampleSet, longest: int | None = None) -> Layout:
    """The fastest layout that trying shows to be exact: `packed`, `equal_length` or `single`.

    No pass is run where the model was tried before and has not changed since (`state_of`).
    Otherwise two short sequences of the user's data are run together and apart. Apart means the
    model's own forward of one sequence, whose positions the model counts itself. A layout is exact
    where every log-probability, and every parameter's gradient norm sample by sample, comes out the
    same: attention that looks across sequences, positions that do not restart or begin elsewhere,
    and tokens that a router sends out of order all show. Packed sequences are tried with the
    model's own mask and, where `packed_attention` serves the model, with that too, since a batch
    may run either way. Log-probabilities, which may depend on lengths, are also compared on the
    longest and the shortest sample (`packs_at_length`).

    Arguments and errors are those of `choose_layout`.
    """
    extremes = _extremes(sample_set)
    longest = max(longest_sequence(sample_set), longest or 0)
    may_pack = longest <= still_up_to(plan.model)
    state = (state_of(plan), may_pack, *map(len, extremes))
    tried = _TRIED.get(plan.model, state)
    if tried is None:
        known = len(plan.widened)
        layout = _try(plan, sample_set, may_pack)
        if layout == "packed":
            try:
                packs = packs_at_length(plan.model, extremes)
            except (MemoryError, RuntimeError) as error:
                if not no_memory(error) or is_sharded(plan.model):  # on this rank alone
                    raise
                packs = False  # memory ran out for two sequences, as it would for a batch
            if not packs:
                layout = _try(plan, sample_set, may_pack=False)
        tried = _Tried(layout, tuple(plan.widened[known:]), dict(plan.axes), set(plan.shown))
        _TRIED.keep(plan.model, state, tried)
    else:
        for names in tried.outside:
            plan.widen(names)
        plan.axes.update(tried.axes)
        plan.shown.update(tried.shown)
    return tried.layout


def _try(plan: Plan, sample_set: SampleSet, may_pack: bool = True) -> Layout:
    """Find the layout by running the model."""

    def agree(layout: Layout, probes: list[Tensor], masked: bool = True) -> bool:
        try:
            together = _norms(plan, probes, layout, masked)
        except Exception as error:  # a model that cannot be called this way may raise anything
            if plan.shards is not None and no_memory(error):
                raise  # memory ran out on this rank alone
            put_right(plan.model)
            return False
        same = _same(plan, together, apart)
        return same if plan.shards is None else plan.shards.ranks.first_of(same)

    def alone(ids: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        with Trying() as trial:
            found = _norms(plan, [ids], "single")
        if trial.error is not None and not isinstance(trial.error, GEffectError):
            raise UnsupportedModelError(
                f"{type(plan.model).__name__}: it cannot be profiled on a sequence of {len(ids)} "
                f"tokens by itself ({trial.reason}); give a causal language model that runs on one"
            ) from trial.error
        if trial.error is not None:
            raise trial.error
        return found

    several = _probes(sample_set, PROBE_LENGTHS)
    apart = [alone(ids) for ids in several]
    # ALiBi counts along the row, in bf16, and rounds: the few tokens of a trial do not show this.
    alibi = getattr(getattr(plan.model, "config", None), "alibi", False)
    if may_pack and takes(plan.model, "position_ids") and not (alibi or in_chunks(plan.model)):
        batch = _batch(several, "packed").to(plan.device)
        ways = (True, False) if splits_attention(plan.model, batch) else (True,)
        if all(agree("packed", several, masked) for masked in ways):
            return "packed"
    same = _probes(sample_set, (PROBE_LENGTHS[0],) * 2)
    apart = [apart[0], alone(same[1])]  # the first sequence is the same
    return "equal_length" if agree("equal_length", same) else "single"


def _same(plan: Plan, together: dict[str, Tensor], apart: list[dict[str, Tensor]]) -> bool:
    """Whether samples run together have the log-probabilities and norms of samples run apart."""
    expected = {name: torch.cat([a[name] for a in apart]) for name in together}
    largest = max(float(expected[name].abs().max()) for name in plan.parameters)
    tolerance = max(TOLERANCE[dtype] for dtype in precisions(plan.model))
    if not close(together[""], expected.pop(""), tolerance):
        return False
    for name, norms in expected.items():
        scale = max(float(norms.max()), 1e-4 * largest)
        if not float((together[name] - norms).abs().max()) <= tolerance * scale:
            return False
    return True


def _norms(
    plan: Plan, probes: list[Tensor], layout: Layout, masked: bool = True
) -> dict[str, Tensor]:
    """Per-sample gradient norms `(n_samples,)` of every parameter, with the summed NLL as the loss.

    The empty name has the log-probabilities `(total_tokens,)`.
    """
    # An expert has no gradient for a sample that sends no token to it.
    norms = {name: torch.zeros(len(probes), dtype=torch.float64) for name in plan.parameters}

    def keep(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        norms[name] = squared_norms(factors, plan.parameters[name].shape).sqrt().cpu()

    batch = _batch(probes, layout).to(plan.device)
    axis = sample_axis(plan.model, batch)
    while True:
        with (
            nullcontext() if masked else packed_attention(plan.model, batch),
            plan.frozen(),
            Recorder(plan, keep, axis, Recording(joined=True)) as recorder,
        ):
            with recorder.showing_parameters():
                outputs = model_outputs(plan.model, batch)
                losses = nll_by_sample(outputs, batch)
            if recorder.leaves_of(losses) is None:
                continue
            roots = recorder.roots_of(losses)
            if recorder.to_be_shown():
                recorder.show_rows(losses, roots)
            torch.autograd.grad(losses.sum(), roots, allow_unused=True)
            recorder.finish()
            return norms | {"": outputs.token_logprob.detach().double().cpu()}


def in_chunks(model: nn.Module) -> bool:
    """Whether attention is cut into chunks of a row, wherever the row's sequences begin.

    The few tokens of a trial do not fill a chunk.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    return any(getattr(config, "attention_chunk_size", None) is not None for config in configs)


def longest_sequence(sample_set: SampleSet) -> int:
    """Tokens of the longest sequence, alternatives included."""
    return max(len(q) for s in sample_set.samples for qs in s.sequences().values() for q in qs)


def packs_at_length(model: nn.Module, probes: Sequence[Tensor]) -> bool:
    """Whether sequences packed into one row have the log-probabilities that each has by itself.

    Args:
        model: the model whose samples are to be packed, or a reference.
        probes: the sequences' tokens.
    """
    device, tolerance = (
        next(model.parameters()).device,
        max(TOLERANCE[d] for d in precisions(model)),
    )
    with torch.no_grad():
        apart = [_batch([ids], "single").to(device) for ids in probes]
        own = torch.cat([model_outputs(model, batch).token_logprob for batch in apart])
        together = model_outputs(model, _batch(probes, "packed").to(device)).token_logprob
    return close(together, own, tolerance)


def check_reference(model: nn.Module, layout: Layout, sample_set: SampleSet, longest: int) -> None:
    """Check that a reference computes the same in its model's layout as for each sample by itself.

    Args:
        model: the reference.
        layout: the layout that `choose_layout` found for the profiled model.
        sample_set, longest: as `choose_layout` takes them.

    Raises:
        UnsupportedModelError: the layout is packed, and the reference's samples cannot be packed.
    """
    if layout != "packed":
        return
    several, extremes = _probes(sample_set, PROBE_LENGTHS), _extremes(sample_set)
    still = longest <= still_up_to(model) and not in_chunks(model)
    if not (still and packs_at_length(model, several) and packs_at_length(model, extremes)):
        raise UnsupportedModelError(
            f"reference_model: {type(model).__name__} does not compute the same for samples packed "
            "into one row as for each by itself, and the model's are packed; give a reference of "
            "the model's own architecture, or none"
        )


def _extremes(sample_set: SampleSet) -> list[Tensor]:
    """The tokens of the longest and of the shortest answer."""
    answers = sorted((s.answer.input_ids for s in sample_set.samples), key=len)
    return [answers[-1], answers[0]]


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the norm of the difference is at most `tolerance` times that of `expected`."""
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


def probe_batch(plan: Plan, sample_set: SampleSet, layout: Layout) -> Batch:
    """One batch in this layout, of sequences as a trial takes them, on the model's device."""
    lengths = PROBE_LENGTHS if layout == "packed" else (PROBE_LENGTHS[0],) * 2
    probes = _probes(sample_set, lengths)
    device = plan.device
    return _batch(probes[:1] if layout == "single" else probes, layout).to(device)


def _batch(probes: Sequence[Tensor], layout: Layout) -> Batch:
    samples = tuple(
        Sample(row, "", TokenSequence(ids, torch.cat([ids.new_tensor([IGNORE]), ids[1:]])))
        for row, ids in enumerate(probes)
    )
    batches = make_batches(
        SampleSet("probe", samples),
        ("answer",),
        token_budget=sum(len(ids) for ids in probes),
        reduction="sum",
        layout=layout,
    )
    assert len(batches) == 1
    return batches[0]


def _probes(sample_set: SampleSet, lengths: tuple[int, int]) -> list[Tensor]:
    """Two different sequences of these lengths from the tokens of the first samples.

    Samples that are shorter are repeated: with fewer tokens, for example as many as attention has
    heads, the axes of a module's input could not be told apart.
    """
    sequences = [s.answer.input_ids for s in sample_set.samples[:2]]
    if len(sequences) == 1:
        sequences.append(sequences[0].flip(0))
    return [ids.repeat(-(-n // len(ids)))[-n:] for ids, n in zip(sequences, lengths, strict=True)]
