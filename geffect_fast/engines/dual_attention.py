"""The rule of forward mode for attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual_rule import Primals, Rule, Tangents, rows_at_a_time

CUTS, SHORTEST = 8, 32
"""Causal attention is cut into so many blocks of queries, and none so short, to leave out keys that
a block does not see."""


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
        dmask = tangents[3]
        if self.gqa:
            share = query.shape[-3] // key.shape[-3]
            key, value, *moving = (
                None if x is None else x.repeat_interleave(share, -3)
                for x in (key, value, *tangents[1:3])
            )
            tangents = (tangents[0], *moving, dmask)
        heads = output.shape[:-2]
        n, n_keys = query.shape[-2], key.shape[-2]
        q, k, v, o = (_flat(x, heads) for x in (query, key, value, output))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        q = q * scale
        step = rows_at_a_time(len(q) * n_keys)
        if self.causal:
            mask = query.new_ones(n, n_keys, dtype=torch.bool).tril()
            step = min(step, max(SHORTEST, -(-n // CUTS)))
        dq, dk, dv = (_flat_each(t, heads) for t in tangents[:3])
        n_directions = next(len(t) for t in tangents if t is not None)
        moved = output.new_empty(n_directions, *o.shape)
        for at in range(0, n, step):
            own = slice(at, at + step)
            seen = slice(0, at + step if self.causal else n_keys)
            block = None if mask is None else _rows(mask, own)[..., seen]
            product = q[:, own] @ k[:, seen].mT
            scores = product.view(*heads, *product.shape[1:])
            p = _softmax(scores, block).view_as(product)
            for m in range(n_directions):
                change = None  # of the scores, and then times p
                if dmask is not None:
                    change = _rows(dmask[m], own).expand_as(scores).reshape_as(product).clone()
                if dq is not None:
                    change = _plus(change, dq[m][:, own] * scale, k[:, seen].mT)
                if dk is not None:
                    change = _plus(change, q[:, own], dk[m][:, seen].mT)
                out = None
                if change is not None:
                    out = torch.bmm(change.mul_(p), v[:, seen])
                    out.addcmul_(change.sum(-1, keepdim=True), o[:, own], value=-1)
                if dv is not None:
                    out = _plus(out, p, dv[m][:, seen])
                moved[m, :, own] = out
        return moved.view(n_directions, *output.shape)


def _flat(x: Tensor, heads: Sequence[int]) -> Tensor:
    """`(..., n, d)` as a batch of matrices, one for each of `heads`."""
    return x.expand(*heads, -1, -1).reshape(-1, *x.shape[-2:])


def _flat_each(tangents: Tensor | None, heads: Sequence[int]) -> list[Tensor] | None:
    return None if tangents is None else [_flat(t, heads) for t in tangents]


def _plus(out: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """`out + x y` for a batch of matrices, in place."""
    return torch.bmm(x, y) if out is None else out.baddbmm_(x, y)


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
