"""Argument checks of the ops; every message names the op and the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from geffect_fast.errors import InputError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OFFSET_DTYPES = (torch.int32, torch.int64)


def check_tensor(op: str, name: str, tensor: Tensor, ranks: tuple[int, ...]) -> None:
    """Require a strided tensor of a supported dtype and one of `ranks` dimensions."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{op}: `{name}` must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise InputError(
            f"{op}: `{name}` must be dense, got layout {tensor.layout}; use to_dense()"
        )
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"{op}: `{name}` has dtype {tensor.dtype};"
            " convert it to bfloat16, float16, float32 or float64"
        )
    if tensor.dim() not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise InputError(
            f"{op}: `{name}` must have {wanted} dimensions, got shape {tuple(tensor.shape)}"
        )


def check_alike(op: str, first: tuple[str, Tensor], *others: tuple[str, Tensor]) -> None:
    """Require one dtype and one device of all tensors; the argument that differs is named."""
    name, tensor = first
    for other_name, other in others:
        if other.dtype != tensor.dtype:
            raise InputError(
                f"{op}: `{other_name}` has dtype {other.dtype} but `{name}` has {tensor.dtype};"
                " convert one of them"
            )
        if other.device != tensor.device:
            raise InputError(
                f"{op}: `{other_name}` is on {other.device} but `{name}` is on {tensor.device}"
            )


def check_size(op: str, name: str, tensor: Tensor, dim: int, wanted: int, like: str) -> None:
    """Require `tensor.shape[dim] == wanted`, the size of what `like` describes."""
    if tensor.shape[dim] != wanted:
        raise InputError(
            f"{op}: `{name}` has {tensor.shape[dim]} along dimension {dim} but {like} has {wanted}"
        )


def check_cu_seqlens(
    op: str, name: str, cu_seqlens: Tensor, total_tokens: int, device: torch.device
) -> None:
    """Require offsets `0 = c_0 <= c_1 <= ... <= c_n = total_tokens`.

    The numbers are checked on the CPU only: reading them on another device would wait for it.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in OFFSET_DTYPES:
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise InputError(f"{op}: `{name}` must be an int32 or int64 tensor, got {found}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise InputError(
            f"{op}: `{name}` must have shape (n_samples + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise InputError(f"{op}: `{name}` is on {cu_seqlens.device} but the data is on {device}")
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()  # comparing tensors would take ten times as long
    if offsets[0] != 0:
        raise InputError(f"{op}: `{name}` must start at 0, got {offsets[0]}")
    if offsets[-1] != total_tokens:
        raise InputError(
            f"{op}: `{name}` must end at total_tokens = {total_tokens}, got {offsets[-1]}"
        )
    if offsets != sorted(offsets):
        raise InputError(f"{op}: `{name}` must not decrease; it holds offsets, not lengths")


def check_rows(
    op: str, names: tuple[str, str, str], a: Tensor, g: Tensor, cu_seqlens: Tensor, *others: Tensor
) -> None:
    """Require inputs `a`, output gradients `g` (and `others`) and offsets of a packed sequence."""
    a_name, g_name, offsets_name = names
    check_tensor(op, a_name, a, (2,))
    for gradient in (g, *others):
        check_tensor(op, g_name, gradient, (2,))
        check_alike(op, (a_name, a), (g_name, gradient))
        check_size(op, g_name, gradient, 0, a.shape[0], f"`{a_name}` (total_tokens)")
    check_cu_seqlens(op, offsets_name, cu_seqlens, a.shape[0], a.device)
