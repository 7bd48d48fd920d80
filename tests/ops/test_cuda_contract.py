"""Guarantees of the CUDA kernels beyond their values, tested without a GPU."""

from __future__ import annotations

import cuda_shim
import pytest
import torch
from op_samples import Maker
from torch import Tensor

pytestmark = pytest.mark.slow

if (_reason := cuda_shim.why_missing()) is not None:
    pytest.skip(_reason, allow_module_level=True)

MAKE = Maker(torch.float32)
A, G, CU = MAKE.rows([3, 0, 4], 5, 6)
GHOST_DOT = (A, G, CU, A[:4], G[:4], CU.new_tensor([0, 4]))
ARGUMENTS = {
    "multi_tensor_gram": ([A, A], 2, [0], 1),
    "segment_bilinear": (A, G, MAKE(2, 6, 5), CU),
    "segment_dot": (MAKE(2, 7, 6), MAKE(2, 7, 6), CU),
    "ghost_norm": (A, G, CU),
    "ghost_dot": GHOST_DOT,
}


def call(op: str, *args: object) -> Tensor:
    return cuda_shim.call(f"{cuda_shim.NAMESPACE}::{op}", *args)


@pytest.mark.parametrize(("position", "name"), [(2, "cu_seqlens"), (5, "cu_seqlens2")])
def test_wrong_offsets_of_either_set_are_reported(position: int, name: str) -> None:
    cuda_shim.load_kernels()
    args = list(GHOST_DOT)
    args[position] = torch.tensor([0, 2**31 - 1])
    assert bool(call("ghost_dot", *args).isnan().all())
    with pytest.raises(RuntimeError, match=f"ghost_dot: `{name}` of an earlier call"):
        call("ghost_dot", *GHOST_DOT)
    assert bool(call("ghost_dot", *GHOST_DOT).isfinite().all())


@pytest.mark.parametrize("op", ARGUMENTS)
def test_float64_is_refused(op: str) -> None:
    def double(arg: object) -> object:
        if isinstance(arg, list):
            return [double(item) for item in arg]
        return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg

    cuda_shim.load_kernels()
    with pytest.raises(RuntimeError, match=f"{op}: dtype Double has no CUDA kernel"):
        call(op, *map(double, ARGUMENTS[op]))
