"""The specification of every op in plain torch; runs on any device, accumulates in fp32 or better.

Signatures are those of `schema.py`: canonical ranks, arguments already checked. No quantity larger
than the inputs plus one segment's intermediates is stored, but low-precision inputs are converted
whole.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

GRAM_BLOCK = 4096


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which inputs of `dtype` are summed and results are given."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _segment_sum(per_token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum the last axis over segments: `(..., total_tokens)` to `(..., n)`, in a fixed order."""
    if cu_seqlens.numel() == 1:
        return per_token.new_zeros((*per_token.shape[:-1], 0))
    # Not torch.segment_reduce, which has no forward-mode derivative, nor index_add_, which is not
    # deterministic on CUDA.
    parts = per_token.split(torch.diff(cu_seqlens).tolist(), dim=-1)
    return torch.stack([part.sum(dim=-1) for part in parts], dim=-1)


def multi_tensor_gram(
    grads: list[Tensor], n_lists: int, groups: list[int], n_groups: int
) -> Tensor:
    """`out[groups[p], j, k] += <grads[j][p], grads[k][p]>`, `grads` flattened list by list."""
    n_tensors = len(groups)
    # Summing a long row at once would lose digits, so blocks are summed in fp32 and added in fp64.
    out = grads[0].new_zeros((n_groups, n_lists, n_lists), dtype=torch.float64)
    for index, group in enumerate(groups):
        flat = [tensor.reshape(-1) for tensor in grads[index::n_tensors]]
        for blocks in zip(*(tensor.split(GRAM_BLOCK) for tensor in flat), strict=True):
            rows = _wide(torch.stack(blocks))
            out[group] += rows @ rows.T
    return out.to(accumulation_dtype(grads[0].dtype))


def segment_bilinear(
    a: Tensor, g: Tensor, v: Tensor, cu_seqlens: Tensor, per_token: bool = False
) -> Tensor:
    """`out[m, i] = sum_{t in i} g_t^T V_m a_t`, or every token's own term."""
    a, g = _wide(a), _wide(g)
    terms = a.new_zeros((v.shape[0], a.shape[0]))
    for m, direction in enumerate(v):
        terms[m] = torch.linalg.vecdot(a @ _wide(direction).T, g)
    return terms if per_token else _segment_sum(terms, cu_seqlens)


def segment_dot(z: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`out[k, m, i] = sum_{t in i} z[m, t] . g[k, t]`."""
    z, g = _wide(z), _wide(g)
    terms = torch.matmul(g.transpose(0, 1), z.permute(1, 2, 0))  # (total_tokens, K, M)
    return _segment_sum(terms.permute(1, 2, 0), cu_seqlens)


def segment_product(x: Tensor, y: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`out[i, :] = sum_{t in i} x_t * y_t`, elementwise."""
    return _segment_sum((_wide(x) * _wide(y)).T, cu_seqlens).T.contiguous()


def ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`out[i] = ||sum_{t in i} g_t a_t^T||_F^2`, by token Grams or the gradient."""
    offsets = cu_seqlens.tolist()
    d_in, d_out = a.shape[1], g.shape[1]
    out = a.new_zeros(len(offsets) - 1, dtype=accumulation_dtype(a.dtype))
    for i, (start, end) in enumerate(pairwise(offsets)):
        a_i, g_i = _wide(a[start:end]), _wide(g[start:end])
        if (end - start) * (d_in + d_out) < d_in * d_out:
            out[i] = torch.sum((a_i @ a_i.T) * (g_i @ g_i.T))
        else:
            out[i] = torch.sum(torch.square(g_i.T @ a_i))
    return out


def ghost_norm_of_one_input(a: Tensor, g: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """`ghost_norm` of gradients `[g_1; g_2; ..] a^T`, rows below rows."""
    return ghost_norm(a, torch.cat(g, dim=1), cu_seqlens)


def token_grams(a: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Every segment's `a_i a_i^T`, row by row, one segment behind the other: `(sum of T_i^2,)`."""
    a = _wide(a)
    pieces = [a[start:end] for start, end in pairwise(cu_seqlens.tolist())]
    return torch.cat([a.new_zeros(0), *((a_i @ a_i.T).flatten() for a_i in pieces)])


def ghost_norm_of_grams(grams: Tensor, g: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    """`ghost_norm_of_one_input`, given `token_grams(a)` in place of `a`."""
    of_g = token_grams(torch.cat(g, dim=1), cu_seqlens)
    squares = torch.diff(cu_seqlens).square()
    return _segment_sum(grams * of_g, torch.nn.functional.pad(squares.cumsum(0), (1, 0)))


def ghost_dot(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, a2: Tensor, g2: Tensor, cu_seqlens2: Tensor
) -> Tensor:
    """`out[i, j] = <sum_{s in i} g_s a_s^T, sum_{t in j} g2_t a2_t^T>_F`."""
    offsets = cu_seqlens.tolist()
    a2, g2 = _wide(a2), _wide(g2)
    n_samples, n_samples2 = len(offsets) - 1, cu_seqlens2.numel() - 1
    out = a2.new_zeros((n_samples, n_samples2))
    for i, (start, end) in enumerate(pairwise(offsets)):
        a_i, g_i = _wide(a[start:end]), _wide(g[start:end])
        pairs = (a_i @ a2.T) * (g_i @ g2.T)
        out[i] = _segment_sum(pairs.sum(dim=0), cu_seqlens2)
    return out
