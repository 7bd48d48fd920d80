"""The Python interface of the fused kernels: inner products of gradients that are never stored.

All ops take bfloat16, float16, float32 or float64 inputs of one dtype and any strides. They sum in
fp32 or better and return float32 (float64 for float64 inputs), bitwise equal from run to run.
Packed sequences are given by `cu_seqlens` offsets; an empty segment gives 0. The ops measure and
have no derivative: an input that requires grad while grad mode is on, or that carries a
forward-mode tangent, is an error, never a silent detach.

On CUDA the ops copy operands of matrix products whose rows have gaps between elements or do not
begin on 16 bytes, and gradients that are not dense in one layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect_fast.errors import InputError
from geffect_fast.ops import backend
from geffect_fast.ops.backend import force_reference, providers
from geffect_fast.ops.checks import (
    check_alike,
    check_cu_seqlens,
    check_rows,
    check_size,
    check_tensor,
)

__all__ = [
    "force_reference",
    "ghost_dot",
    "ghost_norm",
    "multi_tensor_gram",
    "providers",
    "segment_bilinear",
    "segment_dot",
]

ANY_RANK = tuple(range(65))


def _group_of_each(
    groups: Sequence[int] | Tensor | None, n_tensors: int, n_groups: int | None
) -> tuple[list[int], int]:
    """Return the group of every tensor and the number of groups."""
    op = "multi_tensor_gram"
    if groups is None:
        indices = list(range(n_tensors))
    else:
        values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
        if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
            raise InputError(f"{op}: `groups` must hold integers, one a tensor")
        indices = values
    if len(indices) != n_tensors:
        raise InputError(f"{op}: `groups` names {len(indices)} groups for {n_tensors} tensors")
    if n_groups is None:
        n_groups = max(indices, default=-1) + 1
    if any(not 0 <= index < n_groups for index in indices):
        raise InputError(
            f"{op}: `groups` must lie in 0..{n_groups - 1}, got {sorted(set(indices))}"
        )
    return indices, n_groups


def multi_tensor_gram(
    grads: Sequence[Sequence[Tensor]],
    groups: Sequence[int] | Tensor | None = None,
    *,
    n_groups: int | None = None,
) -> Tensor:
    """Gram matrices of K lists of same-shaped gradient tensors, one for each group of tensors.

        out[c, j, k] = sum_{p: groups[p] = c} <grads[j][p], grads[k][p]>

    Args:
        grads: K >= 1 lists of P tensors; `grads[j][p]` has the shape of `grads[0][p]`, any strides,
            one dtype and device for all.
        groups: P integers in `0..n_groups-1`, the group of each tensor; None: each tensor is a
            group of its own.
        n_groups: number of groups; None: one more than the largest index in `groups`.

    Returns:
        `(n_groups, K, K)`, symmetric, float32 (float64 for float64 inputs).

    Raises:
        InputError: lists that do not match, a bad group, dtype or device, an input that needs grad.

    Source: definition 1 of arXiv 2502.19301, its gradient inner products layer by layer.

        forget, retain = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        multi_tensor_gram([list(forget), list(retain)])[:, 0, 1]   # <forget, retain> by tensor
    """
    op = "multi_tensor_gram"
    if len(grads) == 0:
        raise InputError(f"{op}: `grads` is empty; give at least one list of tensors")
    lists = [list(tensors) for tensors in grads]
    indices, n_groups = _group_of_each(groups, len(lists[0]), n_groups)
    for j, tensors in enumerate(lists):
        if len(tensors) != len(lists[0]):
            raise InputError(
                f"{op}: `grads[{j}]` has {len(tensors)} tensors but `grads[0]` has {len(lists[0])}"
            )
        for p, tensor in enumerate(tensors):
            check_tensor(op, f"grads[{j}][{p}]", tensor, ANY_RANK)
            check_alike(op, ("grads[0][0]", lists[0][0]), (f"grads[{j}][{p}]", tensor))
            if tensor.shape != lists[0][p].shape:
                raise InputError(
                    f"{op}: `grads[{j}][{p}]` has shape {tuple(tensor.shape)} but `grads[0][{p}]`"
                    f" has {tuple(lists[0][p].shape)}"
                )
    if not lists[0]:
        return torch.zeros(n_groups, len(lists), len(lists))
    flat = [tensor for tensors in lists for tensor in tensors]
    return backend.call(op, flat[0].device, flat, len(lists), indices, n_groups)


def segment_bilinear(
    a: Tensor, g: Tensor, v: Tensor, cu_seqlens: Tensor, *, per_token: bool = False
) -> Tensor:
    """Inner products of every sample's weight gradient with M directions, no gradient formed.

        out[m, i] = sum_{t in i} g_t^T V_m a_t = < sum_{t in i} g_t a_t^T, V_m >

    Args:
        a: layer inputs `(total_tokens, d_in)`.
        g: output gradients `(total_tokens, d_out)`.
        v: directions `(M, d_out, d_in)`, or one, `(d_out, d_in)`.
        cu_seqlens: offsets of the samples `(n + 1,)`, int32 or int64.
        per_token: return the summand of every token instead of the sums.

    Returns:
        `(M, n)`, with `per_token` `(M, total_tokens)`; without the first axis for a 2-D `v`.

    Raises:
        InputError: a shape, dtype, device or offset that does not fit, an input that requires grad.

    Source: the reverse engine's identity, `grad_W <g, W a> = g a^T`.

        a, g, v = torch.randn(5, 3), torch.randn(5, 4), torch.randn(4, 3)
        segment_bilinear(a, g, v, torch.tensor([0, 2, 5]))   # ((a @ v.T) * g).sum(1) by sample
    """
    op = "segment_bilinear"
    check_rows(op, ("a", "g", "cu_seqlens"), a, g, cu_seqlens)
    check_tensor(op, "v", v, (2, 3))
    check_alike(op, ("a", a), ("v", v))
    check_size(op, "v", v, -2, g.shape[1], "`g` (d_out)")
    check_size(op, "v", v, -1, a.shape[1], "`a` (d_in)")
    directions = v if v.dim() == 3 else v.unsqueeze(0)
    out = backend.call(op, a.device, a, g, directions, cu_seqlens, per_token)
    return out if v.dim() == 3 else out[0]


def segment_dot(z: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Row-by-row dot products summed over samples, for M cached `z` by K gradients `g`.

        out[k, m, i] = sum_{t in i} z[m, t] . g[k, t]

    Args:
        z: `(M, total_tokens, d)` or `(total_tokens, d)`, such as the cached `A V_m^T`; a permuted
            view of a `(total_tokens, M, d)` product is as good.
        g: `(K, total_tokens, d)` or `(total_tokens, d)`.
        cu_seqlens: offsets of the samples `(n + 1,)`, int32 or int64.

    Returns:
        `(K, M, n)`; the axis of a 2-D argument is absent.

    Raises:
        InputError: a shape, dtype, device or offset that does not fit, an input that requires grad.

    Source: the memory-bound half of `segment_bilinear`.

        z, g = torch.randn(2, 5, 4), torch.randn(5, 4)
        segment_dot(z, g, torch.tensor([0, 2, 5])).shape   # (2, 2): directions, samples
    """
    op = "segment_dot"
    check_tensor(op, "z", z, (2, 3))
    check_tensor(op, "g", g, (2, 3))
    check_alike(op, ("z", z), ("g", g))
    check_size(op, "g", g, -2, z.shape[-2], "`z` (total_tokens)")
    check_size(op, "g", g, -1, z.shape[-1], "`z` (d)")
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, z.shape[-2], z.device)
    z_3d = z if z.dim() == 3 else z.unsqueeze(0)
    g_3d = g if g.dim() == 3 else g.unsqueeze(0)
    out = backend.call(op, z.device, z_3d, g_3d, cu_seqlens)
    if z.dim() == 2:
        out = out[:, 0]
    return out if g.dim() == 3 else out[0]


def ghost_norm(a: Tensor, g: Tensor | Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
    """Squared Frobenius norm of every sample's weight gradient, without storing the gradient.

        out[i] = || sum_{t in i} g_t a_t^T ||_F^2

    Args:
        a: layer inputs `(total_tokens, d_in)`.
        g: output gradients `(total_tokens, d_out)`, or a list of the output gradients of several
            layers that were called with `a`. The squared norms of these layers are added up and
            share the Gram matrix of `a`.
        cu_seqlens: offsets of the samples `(n + 1,)`, int32 or int64.

    Returns:
        `(n,)`, the SQUARED norms, float32 (float64 for float64 inputs).

    Raises:
        InputError: a shape, dtype, device or offset that does not fit, an input that requires grad.

    Source: Goodfellow, arXiv 1510.01799; for sequences Li et al., arXiv 2110.05679.

        a, g = torch.randn(5, 3), torch.randn(5, 4)
        ghost_norm(a, g, torch.tensor([0, 2, 5])).sqrt()   # norms of two samples' gradients
    """
    op = "ghost_norm"
    gs = [g] if isinstance(g, Tensor) else list(g)
    if not gs:
        raise InputError(f"{op}: `g` is an empty list; give the output gradients of a layer")
    check_rows(op, ("a", "g", "cu_seqlens"), a, gs[0], cu_seqlens, *gs[1:])
    several = "ghost_norm_of_one_input"
    if len(gs) > 1 and backend.has_native(several, a.device.type):
        return backend.call(several, a.device, a, gs, cu_seqlens)
    return backend.call(op, a.device, a, gs[0] if len(gs) == 1 else torch.cat(gs, 1), cu_seqlens)


def ghost_dot(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, a2: Tensor, g2: Tensor, cu_seqlens2: Tensor
) -> Tensor:
    """Inner products of all pairs of two sets' per-sample weight gradients, without storing them.

        out[i, j] = < sum_{s in i} g_s a_s^T, sum_{t in j} g2_t a2_t^T >

    Args:
        a: layer inputs of the first set `(total_tokens, d_in)`.
        g: output gradients of the first set `(total_tokens, d_out)`.
        cu_seqlens: offsets of the first set's samples `(N + 1,)`, int32 or int64.
        a2: layer inputs of the second set `(total_tokens2, d_in)`.
        g2: output gradients of the second set `(total_tokens2, d_out)`.
        cu_seqlens2: offsets of the second set's samples `(N2 + 1,)`.

    Returns:
        `(N, N2)`, float32 (float64 for float64 inputs).

    Raises:
        InputError: a shape, dtype, device or offset that does not fit, an input that requires grad.

    Source: the pairwise form of `ghost_norm`.

        a, g, cu = torch.randn(5, 3), torch.randn(5, 4), torch.tensor([0, 2, 5])
        ghost_dot(a, g, cu, a, g, cu).diagonal()   # equals ghost_norm(a, g, cu)
    """
    op = "ghost_dot"
    check_rows(op, ("a", "g", "cu_seqlens"), a, g, cu_seqlens)
    check_rows(op, ("a2", "g2", "cu_seqlens2"), a2, g2, cu_seqlens2)
    check_alike(op, ("a", a), ("a2", a2))
    check_size(op, "a2", a2, 1, a.shape[1], "`a` (d_in)")
    check_size(op, "g2", g2, 1, g.shape[1], "`g` (d_out)")
    return backend.call(op, a.device, a, g, cu_seqlens, a2, g2, cu_seqlens2)
