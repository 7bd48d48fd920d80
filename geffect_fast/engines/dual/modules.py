"""Forwards by the rules of `dual` for modules that are written out function by function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from geffect_fast.capture.keys import settings_of
from geffect_fast.engines.dual.layers import Gated, RMSNorm
from geffect_fast.engines.dual.modes import DualFunctions
from geffect_fast.engines.remembered import Remembered
from geffect_fast.transfer import on_device
from geffect_fast.trying import Trying

Forwards = Mapping[nn.Module, Callable[..., Tensor]]

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Largest difference of a rule from its module, relative to the largest number, that rounding
explains. The figure for fp64 is that of fp32, in which some fp64 models compute their norms."""

SIZES = (1.0, 100.0)
"""Sizes of the numbers tried: a usual one, and one at which a module that clips shows it."""

WIDTHS = (6, 10)
"""Widths of the small projections that a gated MLP is tried with."""


@dataclass(frozen=True)
class _Served:
    """The modules that the rules serve, by `_kind`.

    Attributes:
        norms: the number added to an RMS norm's weight; None for a module that is no RMS norm.
        gates: whether a module is a gated MLP.
    """

    norms: dict[Hashable, float | None] = field(default_factory=dict)
    gates: dict[Hashable, bool] = field(default_factory=dict)


_SERVED: Remembered[_Served] = Remembered()


def fast_forwards(
    model: nn.Module, besides: Collection[nn.Module] = ()
) -> dict[nn.Module, Callable[..., Tensor]]:
    """A forward of the same values with a faster rule, for every RMS norm and gated MLP of `model`.

    A module is recognised by trying its values and derivatives, not by its name. Of modules that
    differ in nothing but their weights, one is tried, once a model.

    Args:
        model: any model.
        besides: modules that are left as they are; no copy of them is tried.
    """
    state = (_kind(model), settings_of(model))
    served = _SERVED.get(model, state)
    if served is None:
        served = _Served()
        _SERVED.keep(model, state, served)
    found: dict[nn.Module, Callable[..., Tensor]] = {}
    for module in model.modules():
        if "forward" in vars(module) or module in besides:
            continue
        if _may_be_norm(module):
            kind = _kind(module)
            if kind not in served.norms:
                served.norms[kind] = _offset(module)
            offset = served.norms[kind]
            if offset is not None:
                found[module] = partial(_normed, _norm(module, offset), module, module.forward)
        elif _may_be_gated(module):
            kind = _kind(module)
            if kind not in served.gates:
                served.gates[kind] = _is_gated(module)
            if served.gates[kind]:
                found[module] = partial(_gated, Gated(_activation(module)), module)
    return found


@contextmanager
def dual_modules(forwards: Forwards) -> Iterator[None]:
    """Inside, the modules run by the forwards given."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _kind(module: nn.Module) -> Hashable:
    """A key of how a module computes, weights left out: code, attributes and children.

    Objects are compared by identity, so two modules that hold different configs have different
    keys.
    """
    held = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    plain = (bool, int, float, str, type(None))
    return (
        type(module),
        type(module).forward,
        module.training,
        frozenset((k, v if isinstance(v, plain) else id(v)) for k, v in held.items()),
        frozenset((k, id(v)) for k, v in module._buffers.items()),
        frozenset(
            (k, None if p is None else (p.shape, p.dtype, p.device))
            for k, p in module._parameters.items()
        ),
        tuple((k, None if m is None else _kind(m)) for k, m in module._modules.items()),
    )


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _may_be_norm(module: nn.Module) -> bool:
    """Whether all that a module holds is one vector in a precision known here."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1:
        return False
    return not any(True for _ in module.children()) and weight.dtype in TOLERANCE


def _offset(module: nn.Module) -> float | None:
    """The number that an RMS norm over the last axis without a bias adds to its weight `w`.

    The number is 0, or 1 where the norm multiplies by `1 + w`; None for any other module.
    """
    weight: Any = module._parameters["weight"]
    if len(_epsilons(module)) != 1:
        return None
    for offset in (0.0, 1.0):
        rule = _norm(module, offset)
        x, w = _noise(weight, 2, len(weight)), _noise(weight, len(weight))
        # at a size where eps counts, and at others where it does not
        if all(_same(rule, rule.norm, (size * x, w)) for size in (1e-3, *SIZES)):
            return offset
    return None


def _epsilons(module: nn.Module) -> list[float]:
    return [v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)]


def _norm(module: nn.Module, offset: float) -> RMSNorm:
    alone: Any = copy.copy(module)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        alone._parameters = {"weight": w}
        y: Tensor = type(module).forward(alone, x)
        return y

    (epsilon,) = _epsilons(module)
    return RMSNorm(norm, offset, epsilon)


def _normed(
    rule: RMSNorm,
    module: nn.Module,
    own: Callable[..., Tensor],
    x: Tensor,
    *more: Any,
    **given: Any,
) -> Tensor:
    if more or given:  # arguments that the rule knows nothing of, such as a gate
        return own(x, *more, **given)
    return rule(x, module._parameters["weight"])


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _may_be_gated(module: nn.Module) -> bool:
    """Whether a module has three projections, an activation, and no parameter beside them."""
    gate, *others = (module._modules.get(name) for name in PROJECTIONS)
    if not isinstance(gate, nn.Linear) or None in others or not callable(_activation(module)):
        return False
    projected = {p for name in PROJECTIONS for p in module.get_submodule(name).parameters()}
    return gate.weight.dtype in TOLERANCE and projected.issuperset(module.parameters())


def _activation(module: nn.Module) -> Any:
    return getattr(module, "act_fn", None)


def _is_gated(module: nn.Module) -> bool:
    """Whether an MLP is `down(act(gate(x)) * up(x))`.

    The MLP is tried between small projections in place of its own, whose width changes nothing.
    """
    rule = Gated(_activation(module))
    weight: Any = module.get_submodule("gate_proj").weight
    alone: Any = copy.copy(module)
    small = {}
    for seed, name in enumerate(PROJECTIONS):
        d_in, d_out = (WIDTHS[1], WIDTHS[0]) if name == "down_proj" else WIDTHS
        small[name] = nn.Linear(d_in, d_out, bias=False, device="meta")
        # of a size at which products in fp16 stay finite
        noise = 0.3 * d_in**-0.5 * _noise(weight, d_out, d_in, seed=seed)
        small[name].weight = nn.Parameter(noise, False)
    alone._modules = module._modules | small
    gated = tuple(_noise(weight, 2, WIDTHS[1], seed=seed) for seed in (1, 2))
    x = _noise(weight, 2, WIDTHS[0])
    own, fast = partial(type(module).forward, alone), partial(_gated, rule, alone)
    return _same(rule, rule.value, gated) and all(_same(fast, own, (s * x,)) for s in SIZES)


def _gated(rule: Gated, module: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = (module.get_submodule(name) for name in PROJECTIONS)
    y: Tensor = down(rule(gate(x), up(x)))
    return y


def _same(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], primals: tuple[Tensor, ...]
) -> bool:
    """Whether two functions have the same value, and the same derivative along some noise."""
    along = tuple(_noise(x, *x.shape, seed=3) for x in primals)
    found: Any = ()
    expected: Any = ()
    # Results computed without gradients are constant, as they are in the engine.
    with Trying() as trial, torch.enable_grad(), DualFunctions():
        found, expected = (jvp(function, primals, along)[:2] for function in (fast, plain))
    if trial.error is not None or not all(isinstance(y, Tensor) for y in expected):
        return False
    if any(x.shape != y.shape for x, y in zip(found, expected, strict=True)):
        return False
    within = [
        (x - y).detach().abs().max() <= TOLERANCE[y.dtype] * y.detach().abs().max()
        for x, y in zip(found, expected, strict=True)
    ]
    return bool(within[0] & within[1])


def _noise(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return on_device(noise, like.device).to(like.dtype)
