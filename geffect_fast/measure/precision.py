"""Precisions of models: names, tolerances for numbers, and copies in a wider precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geffect_fast.capture.compat import is_sharded, own_part
from geffect_fast.capture.parts import mesh_of
from geffect_fast.capture.shards import shard
from geffect_fast.data.memory import free_memory
from geffect_fast.errors import InputError
from geffect_fast.measure.shared_out import whole_copy
from geffect_fast.ranks import here

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
"""Largest relative error of an exact method: of sums in another order, or, in 16 bits, half an
ulp."""

WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as settings and results have it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The least precise dtype among a model's trainable parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class Fp64Throughout(TorchDispatchMode):
    """Mode in which fp64 tensors are not converted to fp32, also in a backward.

    Models of transformers compute norms and softmax in fp32 whatever their own precision is. The
    rounding is the same with any method of taking gradients, and would hide how exact a method is.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            narrower = kwargs.get("dtype") is torch.float32
            kwargs = kwargs | {"dtype": torch.float64} if narrower else kwargs
        return func(*args, **kwargs)


@contextmanager
def computing_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Have a model whose parameters are fp64 compute in fp64 throughout; other dtypes: no effect.

    The fused kernels of mixtures of experts do not support fp64, so the experts run one by one.

    Args:
        dtype: of the model's parameters.
        model: the model.
    """
    if dtype != torch.float64:
        yield
        return
    chosen: dict[str, str | None] = getattr(model, "get_experts_implementation", dict)()
    fused = any(value not in (None, "eager") for value in chosen.values())
    set_experts: Any = model.set_experts_implementation if fused else lambda _: None
    try:
        set_experts("eager")
        with Fp64Throughout():
            yield
    finally:
        set_experts(chosen)


def widened_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in a wider precision, shared out among ranks if the model is.

    Raises:
        InputError: the copy does not fit into memory beside two gradients.
    """
    needed, device = widened_bytes(model, dtype), next(model.parameters()).device
    free = free_memory(device)
    if needed > free:
        raise InputError(
            f"model: a copy in {dtype_name(dtype)} and two gradients, which tell rounding from a "
            f"deviation, take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; check "
            "in another precision (--dtype), or a smaller model of the same architecture"
        )
    if not is_sharded(model):
        return copy.deepcopy(model).to(dtype)
    found = whole_copy(model, dtype)
    shard(found, here(), device, mesh=mesh_of(model))
    return found


def widened_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that a wider copy and two gradients take, for this rank's part of a model."""
    n_trainable = sum(own_part(p).numel() for p in model.parameters() if p.requires_grad)
    n_all = sum(own_part(p).numel() for p in model.parameters())
    return dtype.itemsize * (n_all + 2 * n_trainable)
