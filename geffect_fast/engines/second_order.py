"""The curvature of risks along a step, `u^T H u`: two backwards through one forward.

A risk at `theta + epsilon u` is a function of one number. Its first derivative at 0 is the inner
product of the risk's gradient with `u`, its second derivative is the curvature; no matrix is
formed. Where ranks share out the model, a second backward does not find the weights at hand. There
both derivatives come from one forward, with forward mode applied twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import forward_differentiable
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass, Tick, each_batch, ranks_of
from geffect_fast.engines.directions import added_up
from geffect_fast.engines.dual.model import DualModel
from geffect_fast.engines.dual.modes import DualFunctions
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.errors import GEffectError, UnsupportedModelError, in_one_line
from geffect_fast.trying import no_memory

TOLERANCE = 1e-2
"""Largest relative difference of a row's curvature from differences of slopes, beside the error of
these differences. A lost derivative makes a larger difference."""


def curvature_along(
    plan: Plan, passes: Sequence[DataPass], n: int, step: Mapping[str, Tensor], tick: Tick
) -> tuple[Tensor, Tensor]:
    """First and second derivatives of risks along a step.

    Args:
        plan: the model's plan.
        passes: the passes over the risks' data, whose terms add up to the risks' values.
        n: number of risks.
        step: `u`, by parameter, or this rank's part of it.
        tick: told of progress.

    Returns:
        `< grad R, u >` and `u^T H u`, `(n,)` fp64 each.

    Raises:
        UnsupportedModelError: the model cannot be differentiated twice.
    """
    slopes: list[tuple[int, Tensor]] = []
    curvatures: list[tuple[int, Tensor]] = []
    derivatives = partial(_derivatives, plan, _dual(plan))
    for data_pass, attempt in each_batch(passes, tick):
        with attempt:
            (index,) = data_pass.parts
            slope, curvature = derivatives(data_pass, attempt.batch, step)
            if attempt.idle:
                continue
            with attempt.finishing(index):
                slopes.append((index, slope))
                curvatures.append((index, curvature))
    found = added_up(slopes, n), added_up(curvatures, n)
    ranks_of(passes).add_up(found)
    return found


def check_twice_differentiable(plan: Plan, data_pass: DataPass, step: Mapping[str, Tensor]) -> None:
    """Compare the curvature on the pass's first batch with differences of slopes along the step.

    A derivative that holds a number constant, as custom ones do, loses the second in silence.

    Raises:
        UnsupportedModelError: the two differ by more than rounding and the differences' own error.
    """
    wide = all(p.dtype == torch.float64 for p in plan.parameters.values())
    batch = data_pass.batches[0]

    def squared(of: Mapping[str, Tensor]) -> float:
        found = torch.stack([x.detach().double().square().sum().cpu() for x in of.values()]).sum(0)
        if plan.shards is not None:
            plan.shards.add_up([found])
        return float(found)

    size = squared(step)
    if size == 0:
        return
    fraction = 1e-3 if wide else 2e-2
    derivatives = partial(_derivatives, plan, _dual(plan), data_pass, batch, step)
    slope, curvature = map(float, derivatives())
    # The slope changes by `fraction` of itself along the reach, the parameters by at most that.
    reach = fraction * (squared(plan.held) / size) ** 0.5
    if curvature:
        reach = min(reach, fraction * abs(slope / curvature)) or reach

    def difference(extent: float) -> float:
        sides = (derivatives(at)[0] for at in (extent, -extent))
        ahead, behind = map(float, sides)
        return (ahead - behind) / (2 * extent)

    far, near = difference(reach), difference(reach / 2)
    expected = (4 * near - far) / 3
    rounding = (1e-10 if wide else 1e-4) * abs(slope) / reach
    allowed = TOLERANCE * max(abs(expected), abs(curvature)) + abs(far - near) + rounding
    if not abs(curvature - expected) <= allowed:
        what = "a backward" if plan.shards is None else "forward mode"
        raise UnsupportedModelError(
            f"second_order: {what} of the model loses second derivatives: the curvature of a "
            f"row is {curvature:.4g}, and {expected:.4g} by differences; leave second_order out"
        )


def _dual(plan: Plan) -> DualModel | None:
    """The dual model of a model that ranks share out; None where this rank has it whole."""
    return None if plan.shards is None else DualModel(plan)


def _derivatives(
    plan: Plan,
    dual: DualModel | None,
    data_pass: DataPass,
    batch: Batch,
    step: Mapping[str, Tensor],
    at: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """First and second derivatives along a step of the pass's risk on a batch, fp64 scalars."""
    batch = batch.to(plan.device)
    (risk,) = data_pass.parts.values()

    def value() -> Tensor:
        outputs = model_outputs(plan.model, batch, data_pass.needs)
        return risk.token_terms(outputs, batch, None).double().sum()

    try:
        with sdpa_kernel(SDPBackend.MATH), packed_attention(plan.model, batch):
            if dual is None:
                return _by_backwards(plan, value, step, at)
            return _by_forward(dual, value, step, at)
    except Exception as error:  # a derivative without one of its own may raise anything
        if no_memory(error) or isinstance(error, GEffectError):
            raise
        raise UnsupportedModelError(
            f"second_order: the model cannot be differentiated twice: {in_one_line(error)}; leave "
            "second_order out"
        ) from error


def _by_backwards(
    plan: Plan, value: Callable[[], Tensor], step: Mapping[str, Tensor], at: float
) -> tuple[Tensor, Tensor]:
    """First and second derivatives of the result of `value`, the second by a graph of the first."""
    with _parameters_at(plan, step, at) as extent:
        (slope,) = torch.autograd.grad(value(), extent, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, extent)
    return slope.detach(), curvature


def _by_forward(
    dual: DualModel, value: Callable[[], Tensor], step: Mapping[str, Tensor], at: float
) -> tuple[Tensor, Tensor]:
    """As `_by_backwards`, in one forward, for which weights and `u` come block by block."""
    plan = dual.plan
    along = {name: step[name].to(p.device, p.dtype)[None] for name, p in plan.parameters.items()}
    start = torch.tensor(at, dtype=torch.float64, device=plan.device)
    one = torch.ones_like(start)

    def at_extent(extent: Tensor) -> Tensor:
        def stepped(p: Tensor, u: Tensor) -> Tensor:
            return p + extent.to(p.dtype) * u[0]

        with dual.moving(along, stepped):
            return value()

    def slope(extent: Tensor) -> Tensor:
        found: Tensor = jvp(at_extent, (extent,), (one,))[1]
        return found

    with (
        torch.enable_grad(),  # so that `no_grad` is seen to be entered
        forward_differentiable(plan.model),
        DualFunctions(_TWICE_DIFFERENTIABLE),
    ):
        first, second = jvp(slope, (start,), (one,))[:2]
    return first, second


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm, written out since torch's forward derivative holds mean and spread constant."""
    over = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(over, keepdim=True)
    normalized = centred * (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    normalized = normalized if weight is None else normalized * weight
    return normalized if bias is None else normalized + bias


_TWICE_DIFFERENTIABLE = {F.layer_norm: _layer_norm}


@contextmanager
def _parameters_at(plan: Plan, step: Mapping[str, Tensor], at: float) -> Iterator[Tensor]:
    """Inside, the parameters are `theta + epsilon u`, functions of `epsilon`, which is yielded.

    A parameter that several modules hold is replaced in each.
    """
    extent = torch.tensor(at, dtype=torch.float64, device=plan.device, requires_grad=True)
    values = {
        id(p): p.detach() + extent.to(p.device, p.dtype) * step[name].to(p.device, p.dtype)
        for name, p in plan.parameters.items()
    }
    places = [
        (module._parameters, key, p)
        for module in plan.model.modules()
        for key, p in module._parameters.items()
        if id(p) in values
    ]
    try:
        for holder, key, p in places:
            holder[key] = values[id(p)]  # type: ignore[assignment]
        yield extent
    finally:
        for holder, key, p in places:
            holder[key] = p
