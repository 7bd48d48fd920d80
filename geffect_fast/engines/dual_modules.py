"""Modules that are written out function by function, run by the rules of `dual` instead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from geffect_fast.engines.dual import DualFunctions
from geffect_fast.engines.dual_layers import Gated, RMSNorm

Forwards = Mapping[nn.Module, Callable[..., Tensor]]

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""How far a rule may be from the module it stands for, relative to the largest number: rounding,
which is that of fp32 in fp64 models that compute their norms so."""

SIZES = (1.0, 100.0)
"""Of the numbers tried: usual ones, and some that are clipped where large ones are."""


def fast_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """For every RMS norm and gated MLP of `model` a forward of the same values and a faster rule.

    What a module computes is tried, values and derivatives, not read off its name.
    """
    found: dict[nn.Module, Callable[..., Tensor]] = {}
    for module in model.modules():
        if "forward" not in vars(module):
            forward = _norm_forward(module) or _gated_forward(module)
            if forward is not None:
                found[module] = forward
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


def _norm_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """Of an RMS norm over the last axis with weight `w` or `1 + w`, and no bias."""
    weight = module._parameters.get("weight")
    epsilons = [v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)]
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1 or len(epsilons) != 1:
        return None
    if any(True for _ in module.children()) or weight.dtype not in TOLERANCE:
        return None
    alone: Any = copy.copy(module)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        alone._parameters = {"weight": w}
        y: Tensor = type(module).forward(alone, x)
        return y

    for offset in (0.0, 1.0):
        rule = RMSNorm(norm, offset, epsilons[0])
        x, w = _noise(weight, 2, len(weight)), _noise(weight, len(weight))
        # at a size where eps counts, and at others where it does not
        if all(_same(rule, norm, (size * x, w)) for size in (1e-3, *SIZES)):
            return partial(_normed, rule, module, module.forward)
    return None


def _normed(
    rule: RMSNorm,
    module: nn.Module,
    own: Callable[..., Tensor],
    x: Tensor,
    *more: Any,
    **given: Any,
) -> Tensor:
    if more or given:  # what the rule knows nothing of, such as a gate
        return own(x, *more, **given)
    return rule(x, module._parameters["weight"])


def _gated_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Of an MLP `down(act(gate(x)) * up(x))`."""
    gate, up, down = (module._modules.get(f"{name}_proj") for name in ("gate", "up", "down"))
    act = getattr(module, "act_fn", None)
    if not (isinstance(gate, nn.Linear) and up is not None and down is not None and callable(act)):
        return None
    rule = Gated(act)
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = down(rule(gate(x), up(x)))
        return y

    x = _noise(gate.weight, 2, gate.in_features)
    gated = tuple(_noise(gate.weight, 2, gate.out_features, seed=seed) for seed in (1, 2))
    serves = _same(rule, rule.value, gated)
    return forward if serves and all(_same(forward, own, (s * x,)) for s in SIZES) else None


def _same(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], primals: tuple[Tensor, ...]
) -> bool:
    """Whether two functions have one value, and one derivative along a direction of noise."""
    along = tuple(_noise(x, *x.shape, seed=3) for x in primals)
    try:
        # What is computed without gradients is constant, as where the engine runs it.
        with torch.enable_grad(), DualFunctions():
            found, expected = (jvp(function, primals, along)[:2] for function in (fast, plain))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return all(map(_alike, found, expected))


def _alike(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    limit = TOLERANCE[expected.dtype] * float(expected.detach().abs().max())
    return float((found - expected).detach().abs().max()) <= limit


def _noise(like: Tensor, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
