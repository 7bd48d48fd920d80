"""Calls of token_logprob that its tests share, and what a user would write for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from op_providers import serves
from op_samples import Maker
from torch import Tensor

from geffect_fast import ops
from geffect_fast.ops import schema

MODULE = importlib.import_module("geffect_fast.ops.token_logprob")
TilingOf = MODULE.Tiling
ROWS, BACKWARD = schema.FUNCTIONS["token_logprob"]


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What a user would write, in the inputs' precision, with autograd's derivatives."""
    logits = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    chosen = F.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == -100, 0, chosen)


class Case(NamedTuple):
    """One call: tensors in fp64 that are exact in every dtype, and the head's options."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, float | None]:
        return {"scale": self.scale, "softcap": self.softcap}

    @property
    def floats(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def like(self, tensors: list[Tensor]) -> Case:
        hidden, weight, *bias = tensors
        return self._replace(hidden=hidden, weight=weight, bias=bias[0] if bias else None)

    def run(self, function: Callable[..., Tensor] = ops.token_logprob) -> Tensor:
        return function(self.hidden, self.weight, self.labels, bias=self.bias, **self.options)

    def to(self, dtype: torch.dtype) -> Case:
        return self.like([t.to(dtype) for t in self.floats])

    def expected(self) -> Tensor:
        return self.to(torch.float64).run(plain)

    def rounding(self) -> float:
        """The size of the logits' terms, which fp32 errors are proportional to."""
        hidden, weight, *bias = [t.double().abs() for t in self.floats]
        terms = F.linear(hidden, weight, *bias)
        return abs(self.scale) * float(terms.max()) + 10 if terms.numel() else 1.0

    def with_gradients(
        self, weights: Tensor, function: Callable[..., Tensor] = ops.token_logprob
    ) -> list[Tensor]:
        """The result, and the derivatives of its sum weighted by `weights`."""
        case = self.like([t.detach().requires_grad_() for t in self.floats])
        out = case.run(function)
        return [out.detach(), *torch.autograd.grad(out, case.floats, weights.to(out.dtype))]


def case(n: int, d: int, vocabulary: int, *, bias: bool = False, seed: int = 0, **kw: Any) -> Case:
    make = Maker(torch.float16, seed)  # then exact in fp32 too; rounded to bf16 by `to`
    labels = torch.randint(vocabulary, (n,), generator=make.generator)
    labels[2::5] = -100
    tensors = [make(n, d).bfloat16().double(), make(vocabulary, d).bfloat16().double()]
    return Case(*tensors, labels, make(vocabulary).bfloat16().double() if bias else None, **kw)


CASES = {
    "plain": case(23, 9, 61),
    "bias": case(23, 9, 61, bias=True),
    "scale": case(23, 9, 61, scale=0.3),
    "softcap": case(23, 9, 61, softcap=3.0),
    "everything": case(23, 9, 61, bias=True, scale=0.7, softcap=5.0),
    "wide": case(5, 70, 203),
    "vectors": case(5, 8, 1100, scale=2.0),
    "long": case(90, 3, 20),
    "one token": case(1, 4, 9),
    "one word": case(4, 4, 1),
    "no token": case(0, 4, 9),
    "no feature": case(6, 0, 9, bias=True),
    "all ignored": case(6, 3, 9)._replace(labels=torch.full((6,), -100)),
}
# Several tiles of both axes, with ragged ends; the default is one tile for most cases.
TILINGS = {"default": None, "small": TilingOf(4 * 6 * 20, 6), "narrow": TilingOf(4 * 64, 64)}


def skip_unless_served(provider: str, dtype: torch.dtype) -> None:
    if not serves(provider, ROWS, dtype):
        pytest.skip(f"no kernel of {provider} in {dtype}")
