"""Rules that differentiate a function along several directions at once, in forward mode.

The framework differentiates most of a model by its own rules. A rule here takes all directions at
once, fuses products with sums, and passes over memory fewer times. Its value is the framework's:

    value(x_1, ..., x_n) -> y          tangent((x_1, ..., x_n, y), (x'_1, ..., x'_n)) -> y'

with tangents `(M, *shape)`, M directions side by side, or None for zero; primals have no such axis.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from geffect_fast.engines.dual.tensor import Dual, constant

Primals = tuple[Any, ...]
Tangents = tuple[Tensor | None, ...]

BLOCK = 2**22
"""Numbers of a temporary that a rule works on at a time, so that a block fits a cache."""


ON_GPU = 2**5
"""Factor of `BLOCK` on a GPU, where every call costs and no cache holds a block."""


def rows_at_a_time(size: int, device: torch.device) -> int:
    """The number of rows of `size` numbers that a rule works on at a time."""
    block = BLOCK * (ON_GPU if device.type == "cuda" else 1)
    return max(1, block // max(1, size))


class Rule:
    """A function and its derivative along several directions at once."""

    def value(self, *primals: Any) -> Tensor:
        """The value `y`, as the framework computes it."""
        raise NotImplementedError

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        """The tangents of `y`, `(M, *y.shape)`.

        Args:
            primals: the arguments (None where one was not given) and then `y`.
            tangents: tangents of the arguments, `(M, *shape)`, not all None.
        """
        raise NotImplementedError

    def follow(self, *given: Any) -> Tensor:
        """The dual of `y` and its tangents, where some of the arguments are duals."""
        primals = constant(given)
        y = self.value(*primals)
        tangents = tuple(x.tangents if isinstance(x, Dual) else None for x in given)
        return Dual(y, self.tangent((*primals, y), tangents))

    def __call__(self, *given: Tensor | None) -> Tensor:
        dual = next((x for x in given if isinstance(x, Dual)), None)
        if dual is not None:
            with _own_precision(dual.device.type):
                return self.follow(*given)
        out: Tensor = _ValueFunction.apply(self, *given)
        return out


class _ValueFunction(Function):
    """A rule's value as a function of the framework; `jvp` calls the rule's own tangent."""

    @staticmethod
    def forward(rule: Rule, *primals: Tensor | None) -> Tensor:
        return rule.value(*primals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, *primals = inputs
        ctx.set_materialize_grads(False)  # zeros would cost products
        ctx.save_for_forward(*primals, output)

    @staticmethod
    def jvp(ctx: Any, _rule: None, *tangents: Tensor | None) -> Tensor | None:
        if all(t is None for t in tangents):
            return None
        n = len(tangents)
        out: Tensor = _TangentFunction.apply(ctx.rule, n, *tangents, *ctx.saved_tensors)
        return out

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], rule: Rule, *primals: Tensor | None
    ) -> Any:
        if all(dim is None for dim in in_dims[1:]):
            return rule.value(*primals), None  # directions differ in tangents only
        # The model itself maps over an axis: the framework's rules do that.
        return torch.vmap(rule.value, in_dims[1:])(*primals), 0


class _TangentFunction(Function):
    """A rule's tangent as a function of the framework; `vmap` puts the directions side by side."""

    @staticmethod
    def forward(rule: Rule, n: int, *tensors: Tensor | None) -> Tensor:
        one = tuple(None if t is None else t[None] for t in tensors[:n])
        return _tangent_of(rule, tensors[n:], one)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass  # there is no derivative of a derivative

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], rule: Rule, n: int, *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        def stacked(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            # a tensor without an axis of directions is the same along all
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        tangents = tuple(map(stacked, tensors[:n], in_dims[2 : 2 + n]))
        return _tangent_of(rule, tensors[n:], tangents), 0


def _tangent_of(rule: Rule, primals: Primals, tangents: Tangents) -> Tensor:
    with _own_precision(next(t for t in tangents if t is not None).device.type):
        return rule.tangent(primals, tangents)


def _own_precision(device: str) -> AbstractContextManager[Any]:
    """Inside, results have the precision of the arguments, which autocast has chosen already."""
    return torch.autocast(device, enabled=False) if in_autocast(device) else nullcontext()


def in_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
