"""The rule of forward mode for attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual.packing import PACKING
from geffect_fast.engines.dual.rule import Primals, Rule, Tangents, rows_at_a_time
from geffect_fast.engines.dual.tensor import Dual, constant, lead

CUTS = 8
"""Number of blocks of queries that causal attention is cut into, to leave out keys that a block
does not see."""

SHORTEST = {"cpu": 64, "cuda": 512}
"""Number of queries below which such a block is not cut: on a GPU calls cost more than products."""


class Attention(Rule):
    """Attention, a block of queries at a time.

        O = P V,    P = softmax(S),    S = scale Q K^T + mask

    Its tangent is

        O' = (P * S') V + P V' - rowsum(P * S') O,    S' = scale (Q' K^T + Q K'^T) + mask'

    Shapes: Q `(..., heads, n, d)`, K and V `(..., heads, n_keys, d)`, fewer heads with `gqa`. The
    mask is bool or added, `(n, n_keys)` with any axes before, or None. A query that sees no key
    gets 0.
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
        return self._stack(primals[:4], tangents)[1:]

    def follow(self, *given: Any) -> Tensor:
        query, key, value, mask = given
        packing = PACKING.get()
        if packing is not None and packing.masks(mask):
            # Samples that share a row do not meet; otherwise the layout would not be packed.
            return packing.apart(
                query, key, value, lambda q, k, v, own: self(q, k, v, packing.block(mask, own))
            )
        tangents = tuple(x.tangents if isinstance(x, Dual) else None for x in given)
        return Dual.of(self._stack(constant(given), tangents))

    def _stack(self, primals: Primals, tangents: Tangents) -> Tensor:
        """The output and its tangents, `(1 + M, ..., heads, n, d)`."""
        query, key, value, mask = primals
        (n, d), (n_keys, d_value) = query.shape[-2:], value.shape[-2:]
        outer = torch.broadcast_shapes(query.shape[:-3], *(x.shape[:-3] for x in (key, value)))
        heads = (*outer, query.shape[-3]) if query.dim() > 2 else ()
        groups = query.shape[-3] // key.shape[-3] if self.gqa else 1
        shared = (*outer, heads[-1] // groups) if heads else ()
        if query.dim() > 2 and not self.gqa:
            widest = max(x.shape[-3] for x in (query, key, value))
            heads = shared = (*outer, widest)
        m = next(len(t) for t in tangents if t is not None)
        q = _flat(query, heads).view(-1, groups, n, d)
        k, v = _flat(key, shared), _flat(value, shared)
        dq, dk, dv = (
            None if t is None else _flat_each(t, of)
            for t, of in zip(tangents[:3], (heads, shared, shared), strict=True)
        )
        scale = d**-0.5 if self.scale is None else self.scale
        q = q * scale
        dq = None if dq is None else (dq * scale).view(m, *q.shape)
        size = len(q)
        step = rows_at_a_time(m * size * groups * n_keys, q.device)
        hidden = None  # keys that a query does not see
        if self.causal:
            hidden = q.new_ones(n, n_keys, dtype=torch.bool).triu(1)
            step = min(
                step, max(SHORTEST["cpu" if q.device.type == "cpu" else "cuda"], -(-n // CUTS))
            )
        elif mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask
        dmask = tangents[3]
        out = q.new_empty(1 + m, size, groups, n, d_value)
        for at in range(0, n, step):
            own = slice(at, min(at + step, n))
            seen = slice(0, own.stop if self.causal else n_keys)
            rows = groups * (own.stop - at)
            left, right = q[:, :, own].reshape(size, rows, d), k[:, seen]
            scores = torch.bmm(left, right.mT)
            block = (*heads, own.stop - at, scores.shape[-1])
            p = _softmax(scores, block, _rows(hidden, own, seen), self.causal)
            change = _sum_of_products(
                None if dq is None else dq[:, :, :, own].reshape(m, size, rows, d),
                right,
                left,
                None if dk is None else dk[:, :, seen],
            )
            if dmask is not None:
                slope = lead(_rows(dmask, own, seen), len(block))
                slope = slope.expand(m, *block).reshape(m, *scores.shape)
                change = slope if change is None else change + slope
            if dv is None:
                o, do = torch.bmm(p, v[:, seen]), None
            else:
                # p is read once for the value and all directions
                every = torch.cat([v[None, :, seen], dv[:, :, seen]])
                every = every.permute(1, 2, 0, 3).reshape(size, -1, (1 + m) * d_value)
                o_each = torch.bmm(p, every).view(size, rows, 1 + m, d_value).permute(2, 0, 1, 3)
                o, do = o_each[0], o_each[1:]
            if change is not None:
                change = change * p
                own_share = torch.matmul(change, v[:, seen])
                own_share.addcmul_(change.sum(-1, keepdim=True), o, value=-1)
                do = own_share if do is None else own_share.add_(do)
            out[0, :, :, own] = o.reshape(size, groups, -1, d_value)
            assert do is not None
            out[1:, :, :, own] = do.reshape(m, size, groups, -1, d_value)
        return out.view(1 + m, *heads, n, d_value)


def _flat(x: Tensor, heads: Sequence[int]) -> Tensor:
    """`(..., n, d)` as a batch of matrices, one for each of `heads`."""
    return x.expand(*heads, -1, -1).reshape(-1, *x.shape[-2:])


def _flat_each(tangents: Tensor, heads: Sequence[int]) -> Tensor:
    """Tangents `(M, ..., n, d)` as `(M, batch, n, d)`, one matrix for each of `heads`."""
    each = lead(tangents, len(heads) + 2).expand(-1, *heads, -1, -1)
    return each.reshape(len(tangents), -1, *tangents.shape[-2:])


def _sum_of_products(dx: Tensor | None, y: Tensor, x: Tensor, dy: Tensor | None) -> Tensor | None:
    """`x'_m y^T + x y'_m^T` of matrices, as one product, `(M, batch, rows, columns)`."""
    if dx is None and dy is None:
        return None
    if dy is None:
        return torch.matmul(dx, y.mT)  # type: ignore[arg-type]
    if dx is None:
        return torch.matmul(x, dy.mT)
    m = len(dx)
    wide = torch.cat([dx, x.expand(m, *x.shape)], -1).flatten(0, 1)
    tall = torch.cat([y.expand(m, *y.shape), dy], -1).flatten(0, 1)
    return torch.bmm(wide, tall.mT).view(m, len(x), x.shape[1], -1)


def _rows(mask: Tensor | None, own: slice, seen: slice) -> Any:
    """Rows `own` and keys `seen` of a mask `(..., n, n_keys)`; an axis of 1 serves all of them."""
    if mask is None:
        return None
    mask = mask[..., own, :] if mask.shape[-2] > 1 else mask
    return mask[..., seen] if mask.shape[-1] > 1 else mask


def _softmax(scores: Tensor, block: Sequence[int], mask: Tensor | None, causal: bool) -> Tensor:
    """Softmax over the keys that a mask leaves, 0 where the mask leaves none.

    Args:
        scores: `(batch, rows, keys)`, written to.
        block: the shape of `scores` by heads, `(..., n, keys)`.
        mask: True where a key is hidden, or numbers to be added.
        causal: whether attention is causal, so that every row sees a key.
    """
    if mask is None:
        return scores.softmax(-1)
    by_head = scores.view(block)
    if mask.dtype == torch.bool:
        by_head.masked_fill_(mask, -torch.inf)
    else:
        by_head += mask
    if causal:
        return scores.softmax(-1)
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.softmax(-1).masked_fill_(nothing, 0)
