"""Whether a model's samples can share a forward pass: known from its code, or found by trying."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geffect_fast.capture import Factor, Plan, Recorder, leaves_of
from geffect_fast.capture.products import squared_norms
from geffect_fast.data import IGNORE, Layout, Sample, SampleSet, Sequence, make_batches
from geffect_fast.data.batch import Batch
from geffect_fast.engines.forward_pass import model_outputs, sample_axis, takes
from geffect_fast.engines.known_layout import packs_by_its_code
from geffect_fast.engines.packed_attention import packed_attention, splits_attention
from geffect_fast.engines.remembered import Remembered, state_of
from geffect_fast.errors import GEffectError

PROBE_LENGTHS = (7, 4)
"""Tokens of the two probe sequences: long enough for attention, short enough to cost nothing."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Largest difference of gradient norms, relative to the largest, that rounding explains.

Models that mix up samples are off by tens of percent; fp64 models whose norms run in fp32 are why
the first figure is not smaller.
"""


@dataclass(frozen=True)
class _Tried:
    """What trying a model found.

    Attributes:
        layout: the layout.
        outside: parameters used outside their modules, as `Plan.widen` was told of them in turn.
        axes: what the plan was taught.
    """

    layout: Layout
    outside: tuple[tuple[str, ...], ...]
    axes: dict[tuple[str, int], int]


_TRIED: Remembered[_Tried] = Remembered()


def choose_layout(plan: Plan, sample_set: SampleSet) -> Layout:
    """The fastest layout that is exact for this model: `packed`, `equal_length` or `single`.

    No pass is run where the model's code shows it (`packs_by_its_code`), nor where the model was
    tried and is what it was then (`state_of`). Else two short sequences of the user's data are run
    together and apart. A layout is exact where every parameter's gradient norm, sample by sample,
    comes out the same: attention that looks across sequences, positions that do not restart, and
    tokens that a router sends out of order all show. Packed sequences are tried with the model's
    own mask as well as with `packed_attention` where it serves the model, since a batch may run
    either way.

    Parameters that are used outside their modules' forwards are moved in the plan, see
    `Plan.widen`.

    Raises:
        GEffectError: what the model itself raises when run on one sequence.
    """
    if packs_by_its_code(plan):
        return "packed"
    state = state_of(plan)
    tried = _TRIED.get(plan.model, state)
    if tried is None:
        outside: list[tuple[str, ...]] = []
        tried = _Tried(_try(plan, sample_set, outside), tuple(outside), dict(plan.axes))
        _TRIED.keep(plan.model, state, tried)
    else:
        for names in tried.outside:
            plan.widen(names)
        plan.axes.update(tried.axes)
    return tried.layout


def _try(plan: Plan, sample_set: SampleSet, outside: list[tuple[str, ...]]) -> Layout:
    """The layout, by running the model; what the plan was told to widen goes to `outside`."""

    def norms(probes: list[Tensor], layout: Layout, masked: bool = True) -> dict[str, Tensor]:
        return _norms(plan, probes, layout, masked, outside)

    def agree(layout: Layout, probes: list[Tensor], masked: bool = True) -> bool:
        try:
            together = norms(probes, layout, masked)
        except (GEffectError, RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model cannot be called this way, or its rows not told apart
        return _same(plan, together, apart)

    several = _probes(sample_set, PROBE_LENGTHS)
    apart = [norms([ids], "single") for ids in several]
    # ALiBi counts along the row, in bf16: the few tokens of a trial do not show what it rounds.
    alibi = getattr(getattr(plan.model, "config", None), "alibi", False)
    if takes(plan.model, "position_ids") and not alibi:
        batch = _batch(plan, several, "packed")
        ways = (True, False) if splits_attention(plan.model, batch) else (True,)
        if all(agree("packed", several, masked) for masked in ways):
            return "packed"
    same = _probes(sample_set, (PROBE_LENGTHS[0],) * 2)
    apart = [apart[0], norms([same[1]], "single")]  # the first is the same
    return "equal_length" if agree("equal_length", same) else "single"


def _same(plan: Plan, together: dict[str, Tensor], apart: list[dict[str, Tensor]]) -> bool:
    """Whether norms of samples run together are those of the samples run apart."""
    expected = {name: torch.cat([a[name] for a in apart]) for name in plan.parameters}
    largest = max(float(e.abs().max()) for e in expected.values())
    tolerance = max(TOLERANCE[dtype] for dtype in precisions(plan.model))
    for name, norms in expected.items():
        scale = max(float(norms.max()), 1e-4 * largest)
        if not float((together[name] - norms).abs().max()) <= tolerance * scale:
            return False
    return True


def precisions(model: nn.Module) -> set[torch.dtype]:
    """What a model computes in: its weights' precisions, frozen ones too, and that of autocast."""
    dtypes = {p.dtype for p in model.parameters() if p.dtype in TOLERANCE}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return dtypes


def _norms(
    plan: Plan,
    probes: list[Tensor],
    layout: Layout,
    masked: bool,
    widened: list[tuple[str, ...]],
) -> dict[str, Tensor]:
    """Per-sample gradient norms `(n_samples,)` of every parameter, summed NLL as the loss."""
    # An expert that no token of a sample was sent to has no gradient there.
    norms = {name: torch.zeros(len(probes), dtype=torch.float64) for name in plan.parameters}

    def keep(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        norms[name] = squared_norms(factors, plan.parameters[name].shape).sqrt().cpu()

    batch = _batch(plan, probes, layout)
    axis = sample_axis(plan.model, batch)
    while True:
        with (
            nullcontext() if masked else packed_attention(plan.model, batch),
            plan.frozen(),
            Recorder(plan, keep, axis, join=True) as recorder,
        ):
            with recorder.showing_parameters():
                loss = -model_outputs(plan.model, batch).token_logprob.sum()
            outside = plan.names_of(leaves_of(loss))
            if not outside:
                torch.autograd.grad(loss, recorder.roots_of(loss), allow_unused=True)
                recorder.finish()
                return norms
        plan.widen(outside)
        widened.append(tuple(outside))


def probe_batch(plan: Plan, sample_set: SampleSet, layout: Layout) -> Batch:
    """One batch in this layout of what it was tried on, on the model's device."""
    lengths = PROBE_LENGTHS if layout == "packed" else (PROBE_LENGTHS[0],) * 2
    probes = _probes(sample_set, lengths)
    return _batch(plan, probes[:1] if layout == "single" else probes, layout)


def _batch(plan: Plan, probes: list[Tensor], layout: Layout) -> Batch:
    samples = tuple(
        Sample(row, "", Sequence(ids, torch.cat([ids.new_tensor([IGNORE]), ids[1:]])))
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
    return batches[0].to(next(iter(plan.parameters.values())).device)


def _probes(sample_set: SampleSet, lengths: tuple[int, int]) -> list[Tensor]:
    """Two different sequences of these lengths from the tokens of the first samples.

    Shorter samples are repeated: in fewer tokens, as many as attention has heads, say, the axes of
    a module's input could not be told apart.
    """
    sequences = [s.answer.input_ids for s in sample_set.samples[:2]]
    if len(sequences) == 1:
        sequences.append(sequences[0].flip(0))
    return [ids.repeat(-(-n // len(ids)))[-n:] for ids, n in zip(sequences, lengths, strict=True)]
