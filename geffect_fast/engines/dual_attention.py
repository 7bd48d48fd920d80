"""The rule of forward mode for attention."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual_rule import Primals, Rule, Tangents, rows_at_a_time


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
        step = rows_at_a_time(rows * n_keys)
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
