"""Check that forward mode runs through a model without losing a tangent on the way.

Code without a forward-mode rule either raises or, in the case of custom ops and of `.data`, drops
tangents in silence. Both show on two short sequences, before any work is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.capture.shards import put_right
from geffect_fast.data import Layout, SampleSet
from geffect_fast.data.batch import Batch
from geffect_fast.engines.dual.model import DualModel
from geffect_fast.engines.layout import probe_batch
from geffect_fast.engines.model_outputs import model_outputs
from geffect_fast.engines.remembered import Remembered, state_of
from geffect_fast.errors import in_one_line
from geffect_fast.precision import precisions
from geffect_fast.trying import no_memory

FLOOR = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
"""Size, relative to the largest gradient, below which gradients are not checked: they may be
rounding noise, as those of keys' biases are."""

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest distance of one parameter's share from 1 that rounding explains. Where tangents are lost,
a share is off by as much as they counted; the share of the parameter just before is 0."""

LOST = 0.5
"""Largest error allowed for the sum of all shares: less than one lost share."""

CERTAIN = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Size, relative to the largest gradient, below which a gradient may be rounded beyond TOLERANCE by
a model that amplifies rounding. There only a share of 0 says that tangents are lost."""


_FOUND: Remembered[tuple[str | None]] = Remembered()


def forward_mode_problem(plan: Plan, sample_set: SampleSet, layout: Layout) -> str | None:
    """The reason why the forward engine cannot serve this model; None where it can.

    The reason names the module or the parameter. A model is run once, and again when the model or
    the layout has changed (`state_of`). Every parameter moves along its own gradient `g`, divided
    by `|g|^2`, so that by reverse mode each moves the sum of log-probabilities by exactly 1.

    Args:
        plan: the model's plan.
        sample_set: the samples whose first tokens are tried.
        layout: as `choose_layout` found it.
    """
    state = (state_of(plan), layout)
    found = _FOUND.get(plan.model, state)
    if found is None:
        found = (_problem(plan, sample_set, layout),)
        _FOUND.keep(plan.model, state, found)
    return found[0]


def _problem(plan: Plan, sample_set: SampleSet, layout: Layout) -> str | None:
    """Find what `forward_mode_problem` returns, by running the model."""
    batch = probe_batch(plan, sample_set, layout)
    dtypes = precisions(plan.model)
    floor, limit, certain = (max(of[d] for d in dtypes) for of in (FLOOR, TOLERANCE, CERTAIN))
    along, sizes, scale = _own_gradients(plan, batch, floor)
    if not along:
        return None  # every gradient is zero
    model = DualModel(plan)
    problem = _lost(model, batch, along, sizes, scale, limit, certain)
    if problem is not None and not model.by_framework:
        model.run_by_framework()  # torch's forward mode may run what duals cannot
        problem = _lost(model, batch, along, sizes, scale, limit, certain)
    return problem


def _lost(
    model: DualModel,
    batch: Batch,
    along: dict[str, Tensor],
    sizes: dict[str, float],
    scale: float,
    limit: float,
    certain: float,
) -> str | None:
    """A sentence on a derivative along `along` that is lost; None where none is."""

    def off(names: Sequence[str]) -> float:
        found = _derivative(model, batch, {name: along[name] for name in names})
        return math.inf if math.isnan(found) else found / scale - len(names)

    names = list(along)
    try:
        total = off(names)
    except Exception as error:  # code without forward mode may raise anything
        if no_memory(error):
            raise
        reason = in_one_line(error)
        where = _failing_module(model, batch, along)
        return f"{where} has no forward-mode derivative: {reason}"
    # Rounding of many parameters adds up as noise does.
    while abs(total) > min(limit * len(names) ** 0.5, LOST):
        some = names
        while len(some) > 1:
            middle = len(some) // 2
            some = max(some[:middle], some[middle:], key=lambda half: abs(off(half)))
        name, share = some[0], 1 + off(some)
        if abs(share - 1) <= limit:
            return None
        if abs(share) <= limit / 10 or sizes[name] > certain:
            return (
                f"parameter '{name}': forward mode gives {share:.4g} times the derivative that "
                "reverse mode gives, so some code between this parameter and the logits drops "
                "tangents"
            )
        names = [other for other in names if other != name]
        total = off(names)
    return None


def _own_gradients(
    plan: Plan, batch: Batch, floor: float
) -> tuple[dict[str, Tensor], dict[str, float], float]:
    """Directions along the parameters' own gradients `g`, these gradients' sizes, a scale `s`.

    A direction is `s g / |g|^2`, `(1, *shape)`, and a size is `|g|` relative to the largest. Both
    are given for every parameter whose gradient is more than noise. At the scale `s` lengths are
    neither too large nor too small for fp16.
    """
    parameters, shards = plan.parameters, plan.shards
    sources = list(parameters.values())
    with torch.enable_grad(), plan.summing():
        loss = model_outputs(plan.model, batch).token_logprob.sum()
        grads: Sequence[Tensor | None]
        if shards is None:
            grads = torch.autograd.grad(loss, sources, allow_unused=True)
        else:  # all ranks have the same loss, and gradients are added up
            grads = plan.sharded_gradients(loss / shards.ranks.size, sources, more=False)
    found = {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}
    squares = [g.double().square().sum() for g in found.values()]
    each = torch.stack(squares).cpu() if squares else torch.zeros(0)
    if shards is not None:
        shards.add_up([each])
    norms = dict(zip(found, each.sqrt().tolist(), strict=True))
    largest = max(norms.values(), default=0.0)
    scale = largest * floor**0.5
    along = {
        name: (g.double() * (scale / norms[name] ** 2)).to(parameters[name].dtype)[None]
        for name, g in found.items()
        if norms[name] > floor * largest
    }
    return along, {name: norms[name] / largest for name in along}, scale


def _derivative(model: DualModel, batch: Batch, along: dict[str, Tensor]) -> float:
    """The derivative of the sum of log-probabilities along `along`."""
    (tangent,) = model.outputs(along, batch, frozenset())[1]
    found, shards = float(tangent.token_logprob.double().sum()), model.plan.shards
    return found if shards is None else shards.ranks.first_of(found)


def _failing_module(model: DualModel, batch: Batch, along: dict[str, Tensor]) -> str:
    """The innermost module whose forward is entered and not left, as messages name it."""
    inside: list[str] = []

    def enter(_module: nn.Module, *_: object) -> None:
        inside.append(names[_module])

    def leave(_module: nn.Module, *_: object) -> None:
        inside.pop()

    names = {module: name for name, module in model.plan.model.named_modules()}
    handles = [m.register_forward_pre_hook(enter, prepend=True) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        put_right(model.plan.model)
        _derivative(model, batch, along)
    except Exception:  # as in `_lost`
        pass
    finally:
        for handle in handles:
            handle.remove()
        put_right(model.plan.model)
    where = inside[-1] if inside else ""
    kind = type(model.plan.model.get_submodule(where)).__name__
    return f"module '{where or kind}' ({kind})" if where else f"the model ({kind})"
