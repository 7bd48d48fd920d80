"""What forward-mode differentiation does with the costly functions of a language model.

The framework differentiates everything else by its own rules. The functions here are caught on the
way and get rules that take all directions at once, multiply where it adds, and pass over memory
fewer times; their values are the framework's. Every rule is

    value(x_1, ..., x_n) -> y          tangent((x_1, ..., x_n, y), (x'_1, ..., x'_n)) -> y'

with primals as they are and tangents `(M, *shape)`, M directions side by side, or None for zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

Primals = tuple[Any, ...]
Tangents = tuple[Tensor | None, ...]

BLOCK = 2**22
"""Numbers of a temporary that a rule works on at a time: what does not fit a cache is cut up."""


class Rule:
    """A function and how it moves along several directions at once."""

    def value(self, *primals: Any) -> Tensor:
        """`y`, the framework's own."""
        raise NotImplementedError

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        """`(M, *y.shape)`.

        Args:
            primals: the arguments (None where one was not given) and then `y`.
            tangents: of the arguments, `(M, *shape)`, not all None.
        """
        raise NotImplementedError

    def __call__(self, *primals: Tensor | None) -> Tensor:
        out: Tensor = _Dual.apply(self, *primals)
        return out


class _Dual(Function):
    """A rule's value, to be differentiated forward; `jvp` is where its own tangent comes in."""

    @staticmethod
    def forward(rule: Rule, *primals: Tensor | None) -> Tensor:
        return rule.value(*primals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, *primals = inputs
        ctx.set_materialize_grads(False)  # zeros would be multiplied
        ctx.save_for_forward(*primals, output)

    @staticmethod
    def jvp(ctx: Any, _rule: None, *tangents: Tensor | None) -> Tensor | None:
        if all(t is None for t in tangents):
            return None
        moved: Tensor = _Stacked.apply(ctx.rule, len(tangents), *tangents, *ctx.saved_tensors)
        return moved

    @staticmethod
    def vmap(
        _info: Any, in_dims: tuple[int | None, ...], rule: Rule, *primals: Tensor | None
    ) -> Any:
        if all(dim is None for dim in in_dims[1:]):
            return rule.value(*primals), None  # directions differ in tangents only
        # An axis that the model itself maps over, by the framework's rules.
        return torch.vmap(rule.value, in_dims[1:])(*primals), 0


class _Stacked(Function):
    """A rule's tangent; `vmap` is where the directions come in, side by side."""

    @staticmethod
    def forward(rule: Rule, n: int, *tensors: Tensor | None) -> Tensor:
        one = tuple(None if t is None else t[None] for t in tensors[:n])
        return _moved(rule, tensors[n:], one)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass  # no derivative of a derivative

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], rule: Rule, n: int, *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        def stacked(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            # without an axis of directions it is the same along all of them
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        moved = tuple(map(stacked, tensors[:n], in_dims[2 : 2 + n]))
        return _moved(rule, tensors[n:], moved), 0


def _moved(rule: Rule, primals: Primals, tangents: Tangents) -> Tensor:
    """A rule's tangent in the precision of its arguments, which autocast has had its say in."""
    device = next(t for t in tangents if t is not None).device.type
    with torch.autocast(device, enabled=False) if _autocast(device) else nullcontext():
        return rule.tangent(primals, tangents)


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


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


class LabelNLL(Rule):
    """`y = -log softmax(z)_label`, so `y' = sum_v p_v z'_v - z'_label`, a block of rows at a time.

    Shapes: z `(n, vocab)`, labels `(n,)` int64, `y` 0 where they are `ignored`.
    """

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=self.ignored, reduction="none")

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        logits, labels, nll = primals
        moved = tangents[0]
        assert moved is not None
        ignored = labels == self.ignored
        labels = labels.masked_fill(ignored, 0)
        out = moved.new_empty(moved.shape[:2])
        step = max(1, BLOCK // logits.shape[1])
        for at in range(0, len(logits), step):
            own = slice(at, at + step)
            label = labels[own, None]
            # log-sum-exp is the label's logit plus its NLL
            p = (logits[own] - logits[own].gather(1, label) - nll[own, None]).exp_()
            for m, z in enumerate(moved[:, own]):
                out[m, own] = torch.linalg.vecdot(p, z) - z.gather(1, label)[:, 0]
        return out.masked_fill_(ignored, 0)


class Attention(Rule):
    """`O = softmax(S) V` with `S = scale Q K^T + mask`, a block of queries at a time:

        O' = (P * S') V + P V' - rowsum(P * S') O,    S' = scale (Q' K^T + Q K'^T) + mask'

    Shapes: Q `(..., heads, n, d)`, K and V `(..., heads, n_keys, d)`, fewer heads with `gqa`; mask
    bool or added, `(n, n_keys)` with any axes before or None. A query that sees no key gets 0.
    """

    def __init__(self, causal: bool, scale: float | None, gqa: bool) -> None:
        self.causal = causal
        self.scale = scale
        self.gqa = gqa

    def value(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=self.gqa,
        )

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        query, key, value, mask, output = primals
        dq, dk, dv, dmask = tangents
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        if self.gqa:
            share = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(share, -3) for x in (key, value))
            dk, dv = (None if t is None else t.repeat_interleave(share, -3) for t in (dk, dv))
        n, n_keys = query.shape[-2], key.shape[-2]
        if self.causal:
            mask = query.new_ones(n, n_keys, dtype=torch.bool).tril()
        if dmask is not None:
            dmask = dmask.view(len(dmask), *[1] * (query.dim() - mask.dim()), *mask.shape)
        rows = prod(query.shape[:-2])
        step = max(1, BLOCK // max(1, rows * n_keys))
        blocks = []
        for at in range(0, max(n, 1), step):
            own = slice(at, at + step)
            q, out = query[..., own, :], output[..., own, :]
            p = _softmax(q @ key.mT * scale, None if mask is None else _rows(mask, own))
            terms = []
            if dq is not None:
                terms.append(dq[..., own, :] @ key.mT)
            if dk is not None:
                terms.append(q @ dk.mT)
            moved = [sum(terms[1:], terms[0]) * (p * scale)] if terms else []
            if dmask is not None:
                moved.append(p * _rows(dmask, own))
            terms = []
            if moved:
                weighted = sum(moved[1:], moved[0])
                terms = [weighted @ value - weighted.sum(-1, keepdim=True) * out]
            if dv is not None:
                terms.append(p @ dv)
            blocks.append(sum(terms[1:], terms[0]))
        return torch.cat(blocks, dim=-2)


def _rows(mask: Tensor, own: slice) -> Tensor:
    """Of a mask `(..., n, n_keys)`, or `(..., 1, n_keys)` for all rows."""
    return mask[..., own, :] if mask.shape[-2] > 1 else mask


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the keys that a mask leaves, 0 where it leaves none."""
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.softmax(-1).masked_fill_(nothing, 0)


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


class DualFunctions(TorchFunctionMode):
    """Inside, the rules above serve the functions they are of, and `no_grad` drops tangents too.

    Reverse mode takes what was computed under `no_grad` as constant; forward mode by itself does
    not, and the two engines would differ. `requires_grad_`, of which it knows nothing, does
    nothing.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        elif func is Tensor.requires_grad_:
            return args[0]  # asked for by checkpointing, where nothing below it can be trained
        elif func in _SERVED:
            served = _SERVED[func](*args, **kwargs)
            if served is not None:
                return served
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return Linear()(*_cast(input, weight, bias)) if weight.dim() == 2 else None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    **_: Any,
) -> Tensor | None:
    if padding_idx is None or max_norm is not None:
        return None
    return PaddedEmbedding(padding_idx % len(weight))(input, weight)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor | None:
    # Called with all options that there are, given or not.
    plain = reduction == "none" and not any(options.values()) and not _autocast(input.device.type)
    if not plain or input.dim() != 2 or target.dim() != 1:
        return None
    return LabelNLL(ignore_index)(input, target)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if dropout_p:
        return None
    mask = None if attn_mask is None else torch.atleast_2d(attn_mask)
    return Attention(is_causal, scale, enable_gqa)(*_cast(query, key, value, mask))


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast multiplies in place of these, where it is on."""
    device = next(x for x in tensors if x is not None).device.type
    if not _autocast(device):
        return tensors
    dtype, kept = torch.get_autocast_dtype(device), (torch.bool, torch.float64)
    return tuple(x if x is None or x.dtype in kept else x.to(dtype) for x in tensors)


_SERVED: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.cross_entropy: _cross_entropy,
    F.scaled_dot_product_attention: _attention,
}
