"""Rules of forward mode for a language model's layers except attention, and for its labels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual.rule import Primals, Rule, Tangents, rows_at_a_time
from geffect_fast.engines.dual.tensor import Dual, constant
from geffect_fast.precision import widened


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
        n = prod(x.shape[:-1])  # may be 0: an expert that no token was sent to
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

    def follow(self, *given: Any) -> Tensor:
        """The dual of `y`; the value and the tangents' first product are one product."""
        x, weight, bias = given
        if not isinstance(x, Dual):
            return super().follow(*given)
        stack, w = x.stack, constant(weight)
        d_out, d_in = w.shape
        n = prod(x.shape[:-1])
        out = torch.mm(stack.reshape(-1, d_in), w.t()).view(len(stack), n, d_out)
        if isinstance(weight, Dual):
            each = x.primal.reshape(n, d_in).expand(len(stack) - 1, n, d_in)
            out[1:].baddbmm_(each, weight.tangents.mT)
        if isinstance(bias, Dual):
            out += bias.stack[:, None]
        elif bias is not None:
            out[0] += bias
        return Dual.of(out.view(len(stack), *x.shape[:-1], d_out))


class Embedding(Rule):
    """`y = W[ids]`, where `W'` does not count at a padding index, as no gradient arrives there.

    By the framework's own rule `W'` would count there. Shapes: ids any, W `(rows, d)`.
    """

    def __init__(self, padding: int | None) -> None:
        self.padding = padding

    def value(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        ids, dw = primals[0], tangents[1]
        assert dw is not None
        found = dw[:, ids]
        if self.padding is None:
            return found
        return found.masked_fill_((ids == self.padding)[..., None], 0)


class _Norm(Rule):
    """A norm over the last axis, `y = n (offset + w) + b` with `n = r x`.

    With `r = (mean x^2 + eps)^(-1/2)` the tangent is

        y' = r (x' - n mean(n x')) (offset + w) + n w' + b'

    Shapes: x `(..., d)`, w and b `(d,)` or None. In a `centred` norm, x and x' are without their
    mean.
    """

    def __init__(self, eps: float, *, offset: float = 0.0, centred: bool = False) -> None:
        self.eps = eps
        self.offset = offset
        self.centred = centred

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        x, weight, *_, y = primals
        dx, *dwb = tangents
        n = self._normed(x[None] if dx is None else torch.cat([x[None], dx]))
        out = None if dx is None else self._scaled(n[1:], weight)
        out = self._of_parameters(out, n[0], *dwb)
        assert out is not None
        return out.expand(-1, *y.shape).to(y.dtype)

    def follow(self, *given: Any) -> Tensor:
        """The dual of `y`; the value goes through the same calls as the tangents."""
        x, weight, *more = given
        if not isinstance(x, Dual) or (weight is not None and weight.dtype != x.dtype):
            return super().follow(*given)
        n = self._normed(x.stack)
        out = self._scaled(n, constant(weight))
        self._of_parameters(
            out[1:], n[0], *(b.tangents if isinstance(b, Dual) else None for b in given[1:])
        )
        for bias in more:
            if bias is not None:
                out[0] += constant(bias)
        return Dual.of(out.to(x.dtype))

    def _normed(self, stack: Tensor) -> Tensor:
        """The stack of `n` and its tangents for a stack of x, in fp32 at least."""
        stack = widened(stack)
        if self.centred:
            stack = stack - stack.mean(-1, keepdim=True)
        x = stack[0]
        r = x.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        n = stack * r
        own, tangents = n[0], n[1:]
        along = torch.linalg.vecdot(own, tangents)[..., None]
        tangents.addcmul_(own, along, value=-1 / x.shape[-1])
        return n

    def _scaled(self, n: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return n.clone()
        return n * (weight + self.offset if self.offset else weight)

    def _of_parameters(
        self, out: Tensor | None, n: Tensor, dw: Tensor | None, db: Tensor | None = None
    ) -> Tensor | None:
        """`out` plus the summands of the parameters' tangents, in place where `out` is given."""
        for by, d in ((n, dw), (1, db)):
            if d is not None:
                d = d.to(n.dtype).view(len(d), *[1] * (n.dim() - 1), -1)
                if out is None:
                    out = by * d
                else:
                    out.addcmul_(n, d) if by is n else out.add_(d)
        return out


class RMSNorm(_Norm):
    """A module's norm without a bias, `norm(x, w)`."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor], offset: float, eps: float) -> None:
        super().__init__(eps, offset=offset)
        self.norm = norm

    def value(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, weight)


class LayerNorm(_Norm):
    """torch's layer norm over the last axis."""

    def __init__(self, eps: float) -> None:
        super().__init__(eps, centred=True)

    def value(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)


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

    def follow(self, *given: Any) -> Tensor:
        gate, up = given
        if not isinstance(gate, Dual) or not isinstance(up, Dual):
            return super().follow(*given)
        # along one direction of ones the tangent is the slope, by the activation's own rule
        both: Any = self.activation(Dual(gate.primal, torch.ones_like(gate.primal)[None]))
        if not isinstance(both, Dual):
            return super().follow(*given)  # the activation is constant
        active, slope = both.primal, both.tangents[0]
        out = gate.stack * (slope * up.primal)
        torch.mul(active, up.primal, out=out[0])
        out[1:].addcmul_(active, up.tangents)
        return Dual.of(out)


class LabelNLL(Rule):
    """`y = -log softmax(z)_label`, so `y' = sum_v p_v z'_v - z'_label`, a block of rows at a time.

    Shapes: z `(n, vocab)`, labels `(n,)` int64; `y` is 0 where a label is `ignored`.
    """

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=self.ignored, reduction="none")

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        logits, labels, nll = primals
        dz = tangents[0]
        assert dz is not None
        ignored = labels == self.ignored
        labels = labels.masked_fill(ignored, 0)
        out = dz.new_empty(dz.shape[:2])
        step = rows_at_a_time(logits.shape[1], logits.device)
        for at in range(0, len(logits), step):
            own = slice(at, at + step)
            label = labels[own, None]
            # log-sum-exp is the label's logit plus its NLL
            p = (logits[own] - logits[own].gather(1, label) - nll[own, None]).exp_()
            block = dz[:, own]
            own_label = block.gather(2, label.expand(len(block), -1, 1))[..., 0]
            out[:, own] = torch.linalg.vecdot(p, block) - own_label
        return out.masked_fill_(ignored, 0)
