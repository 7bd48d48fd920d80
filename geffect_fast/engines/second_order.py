"""The curvature of risks along a step, `u^T H u`: two backwards through one forward.

A risk at `theta + epsilon u` is a function of one number. Its first derivative at 0 is the inner
product of the risk's gradient with `u`, its second what is wanted; no matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from geffect_fast.capture import Plan
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass, Tick, each_batch, ranks_of
from geffect_fast.engines.directions import added_up
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.errors import UnsupportedModelError, in_one_line
from geffect_fast.trying import no_memory

TOLERANCE = 1e-2
"""How far the curvature of a row may be from differences of slopes, relative to it, beside their
own error: what a lost derivative makes of it is more."""


def curvature_along(
    plan: Plan, passes: Sequence[DataPass], n: int, step: Mapping[str, Tensor], tick: Tick
) -> tuple[Tensor, Tensor]:
    """First and second derivatives of risks along a step.

    Args:
        plan: of the model.
        passes: over the risks' data, whose terms are their values'.
        n: number of risks.
        step: `u`, by parameter.
        tick: progress.

    Returns:
        `< grad R, u >` and `u^T H u`, `(n,)` fp64 each.

    Raises:
        UnsupportedModelError: the model cannot be differentiated twice.
    """
    slopes: list[tuple[int, Tensor]] = []
    curvatures: list[tuple[int, Tensor]] = []
    for data_pass, attempt in each_batch(passes, tick):
        with attempt:
            (index,) = data_pass.parts
            slope, curvature = _derivatives(plan, data_pass, attempt.batch, step)
            with attempt.finishing(index):
                slopes.append((index, slope))
                curvatures.append((index, curvature))
    found = added_up(slopes, n), added_up(curvatures, n)
    ranks_of(passes).add_up(found)
    return found


def check_twice_differentiable(plan: Plan, data_pass: DataPass, step: Mapping[str, Tensor]) -> None:
    """Compare the curvature on the pass's first batch with differences of slopes along the step.

    Backwards that keep a number as constant, as custom ones do, lose second derivatives in silence.

    Raises:
        UnsupportedModelError: it differs by more than rounding and the differences' own error.
    """
    wide = all(p.dtype == torch.float64 for p in plan.parameters.values())
    batch = data_pass.batches[0]

    def squared(of: Mapping[str, Tensor]) -> float:
        return sum(float(x.double().square().sum()) for x in of.values())

    size = squared(step)
    if size == 0:
        return
    theta = {name: p.detach() for name, p in plan.parameters.items()}
    part = 1e-3 if wide else 2e-2
    slope, curvature = map(float, _derivatives(plan, data_pass, batch, step))
    # As far as the slope changes by a part of itself, and at most the parameters.
    reach = part * (squared(theta) / size) ** 0.5
    if curvature:
        reach = min(reach, part * abs(slope / curvature)) or reach

    def difference(extent: float) -> float:
        sides = (_derivatives(plan, data_pass, batch, step, at)[0] for at in (extent, -extent))
        ahead, behind = map(float, sides)
        return (ahead - behind) / (2 * extent)

    far, near = difference(reach), difference(reach / 2)
    expected = (4 * near - far) / 3
    rounding = (1e-10 if wide else 1e-4) * abs(slope) / reach
    allowed = TOLERANCE * max(abs(expected), abs(curvature)) + abs(far - near) + rounding
    if not abs(curvature - expected) <= allowed:
        raise UnsupportedModelError(
            "second_order: a backward of the model loses second derivatives: the curvature of a "
            f"row is {curvature:.4g}, and {expected:.4g} by differences; leave second_order out"
        )


def _derivatives(
    plan: Plan, data_pass: DataPass, batch: Batch, step: Mapping[str, Tensor], at: float = 0.0
) -> tuple[Tensor, Tensor]:
    """First and second derivatives along a step of the pass's risk on a batch, fp64 scalars."""
    moved = batch.to(plan.device)
    (risk,) = data_pass.parts.values()
    try:
        with (
            _moved(plan, step, at) as extent,
            sdpa_kernel(SDPBackend.MATH),
            packed_attention(plan.model, moved),
        ):
            outputs = model_outputs(plan.model, moved, data_pass.needs)
            value = risk.token_terms(outputs, moved, None).double().sum()
            (slope,) = torch.autograd.grad(value, extent, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, extent)
    except Exception as error:  # of whatever kind: a backward that has none of its own
        if no_memory(error):
            raise
        raise UnsupportedModelError(
            f"second_order: the model cannot be differentiated twice: {in_one_line(error)}; leave "
            "second_order out"
        ) from error
    return slope.detach(), curvature


@contextmanager
def _moved(plan: Plan, step: Mapping[str, Tensor], at: float) -> Iterator[Tensor]:
    """Inside, the parameters are `theta + epsilon u`, functions of the number that is yielded.

    A parameter that several modules hold is so in each.
    """
    extent = torch.tensor(at, dtype=torch.float64, device=plan.device, requires_grad=True)
    moved = {
        id(p): p.detach() + extent.to(p.device, p.dtype) * step[name].to(p.device, p.dtype)
        for name, p in plan.parameters.items()
    }
    places = [
        (module._parameters, key, p)
        for module in plan.model.modules()
        for key, p in module._parameters.items()
        if id(p) in moved
    ]
    try:
        for holder, key, p in places:
            holder[key] = moved[id(p)]  # type: ignore[assignment]
        yield extent
    finally:
        for holder, key, p in places:
            holder[key] = p
