"""What CUDA kernels promise beyond their values, tested without a GPU."""

from __future__ import annotations

import cuda_shim
import pytest
import torch
from op_samples import Maker, sample_inputs
from torch import Tensor

if (_reason := cuda_shim.why_missing()) is not None:
    pytest.skip(_reason, allow_module_level=True)

CASES = [
    pytest.param(dtype, index, id=f"{sample.op}-{sample.name}-{str(dtype).removeprefix('torch.')}")
    for dtype in (torch.float32, torch.bfloat16)
    for index, sample in enumerate(sample_inputs(dtype))
]
MAKE = Maker(torch.float32)
A, G, CU = MAKE.rows([3, 0, 4], 5, 6)
WITH_OFFSETS = {
    "segment_bilinear": (A, G, MAKE(2, 6, 5), CU),
    "segment_dot": (MAKE(2, 7, 6), MAKE(2, 7, 6), CU),
    "ghost_norm": (A, G, CU),
    "ghost_dot": (A, G, CU, A[:4], G[:4], CU.new_tensor([0, 4])),
}


def skip_unless_served(op: str) -> None:
    if not cuda_shim.serves(op):
        pytest.skip(f"{op} has no CUDA kernel")


def call(op: str, *args: object) -> Tensor:
    return cuda_shim.call(f"{cuda_shim.NAMESPACE}::{op}", *args)


@pytest.mark.parametrize(("dtype", "index"), CASES)
def test_order_of_threads_and_blocks_does_not_matter(dtype: torch.dtype, index: int) -> None:
    """Where a barrier is missing, it does."""
    sample = sample_inputs(dtype)[index]
    skip_unless_served(sample.op)
    with cuda_shim.serving():
        forward = sample.run()
        for order in (cuda_shim.REVERSE, cuda_shim.SHUFFLED):
            with cuda_shim.thread_order(order):
                assert torch.equal(sample.run(), forward)


@pytest.mark.parametrize("op", WITH_OFFSETS)
@pytest.mark.parametrize("offsets", [[0, 9], [1, 7], [0, 6], [0, 8, 7], [0, -1, 7], [0, 2**31 - 1]])
def test_wrong_offsets_give_nan_and_are_reported_once(op: str, offsets: list[int]) -> None:
    """Nobody waits for the device, so that the next call reports them."""
    skip_unless_served(op)
    right = call(op, *WITH_OFFSETS[op])
    wrong = [torch.tensor(offsets) if arg is CU else arg for arg in WITH_OFFSETS[op]]
    assert bool(call(op, *wrong).isnan().any())
    with pytest.raises(RuntimeError, match=f"{op}: `cu_seqlens` of an earlier call"):
        call(op, *WITH_OFFSETS[op])
    assert torch.equal(call(op, *WITH_OFFSETS[op]), right)


def test_wrong_offsets_of_the_second_set() -> None:
    skip_unless_served("ghost_dot")
    args = WITH_OFFSETS["ghost_dot"]
    assert bool(call("ghost_dot", *args[:5], torch.tensor([0, 5])).isnan().any())
    with pytest.raises(RuntimeError, match="ghost_dot: `cu_seqlens2` of an earlier call"):
        call("ghost_dot", *args)


@pytest.mark.parametrize("op", WITH_OFFSETS)
def test_float64_is_refused(op: str) -> None:
    skip_unless_served(op)
    args = [arg.double() if arg.is_floating_point() else arg for arg in WITH_OFFSETS[op]]
    with pytest.raises(RuntimeError, match=f"{op}: dtype Double has no CUDA kernel"):
        call(op, *args)
