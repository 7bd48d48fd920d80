"""Rules of forward mode for the layers of a language model between which attention stands."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual_rule import Primals, Rule, Tangents


class Linear(Rule):
    """`y = x W^T + b`, so `y' = x' W^T + x W'^T + b'`: two products, the second added to the first.

    Shapes: x `(..., d_in)`, W `(d_out, d_in)`, b `(d_out,)` or None.
    """

    def value(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        x, weight, _, y = primals
        dx, dw, db = tangents
        d_out, d_in = weight.shape
        n = prod(x.shape[:-1])  # may be none: an expert that no token was sent to
        rows = x.reshape(n, d_in)
        out = None
        if dx is not None:
            out = (dx.reshape(len(dx) * n, d_in) @ weight.mT).view(len(dx), n, d_out)
        if dw is not None:
            each = rows.expand(len(dw), n, d_in)
            out = torch.bmm(each, dw.mT) if out is None else out.baddbmm_(each, dw.mT)
        if db is not None:
            shift = db[:, None]
            out = shift.expand(-1, n, -1) if out is None else out.add_(shift)
        assert out is not None
        return out.reshape(len(out), *y.shape)


class PaddedEmbedding(Rule):
    """`y = W[ids]`, where `W'` does not count at the padding index, as no gradient arrives there.

    By the framework's own rule it would. Shapes: ids any, W `(rows, d)`.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def value(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        ids, dw = primals[0], tangents[1]
        assert dw is not None
        return dw[:, ids].masked_fill_((ids == self.padding)[..., None], 0)


class RMSNorm(Rule):
    """`y = r x (offset + w)`, `r = (mean x^2 + eps)^(-1/2)`, over the last axis; with `n = r x`:

        y' = r (x' - n mean(n x')) (offset + w) + n w'

    Shapes: x `(..., d)`, w `(d,)`.
    """

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor], offset: float, eps: float) -> None:
        self.norm = norm
        self.offset = offset
        self.eps = eps

    def value(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, weight)

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        x, weight, y = primals
        dx, dw = tangents
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        r = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        n = x * r
        out = None
        if dx is not None:
            dx = dx.to(wide)
            along = torch.linalg.vecdot(n, dx)[..., None] / x.shape[-1]
            out = torch.addcmul(dx, n, along, value=-1).mul_(r * (self.offset + weight))
        if dw is not None:
            dw = dw.to(wide).view(len(dw), *[1] * (x.dim() - 1), -1)
            out = n * dw if out is None else out.addcmul_(n, dw)
        assert out is not None
        return out.to(y.dtype)


class Gated(Rule):
    """`y = f(g) u`, `f` elementwise, so `y' = f'(g) u g' + f(g) u'`."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation

    def value(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        gate, up, _ = primals
        dg, du = tangents
        active, slope = torch.func.jvp(self.activation, (gate,), (torch.ones_like(gate),))[:2]
        if dg is None:
            assert du is not None
            return active * du
        out = dg * (slope * up)
        return out if du is None else out.addcmul_(active, du)
