"""The device of the tests in this folder, and functions that move tensors and samples to it.

An import of this module skips the importing one where there is no GPU or no CUDA kernel. Set
`GEFFECT_FAST_GPU_TEST_DEVICE=cpu` to run all tests that need no GPU on small sizes, as a dry run.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from op_samples import Sample
from torch import Tensor

from geffect_fast import ops
from geffect_fast.ops import backend, schema

DEVICE = torch.device(os.environ.get("GEFFECT_FAST_GPU_TEST_DEVICE", "cuda:0"))
IS_GPU = DEVICE.type == "cuda"
LOW_PRECISION = (torch.bfloat16, torch.float16)
GPU_DTYPES = (*LOW_PRECISION, torch.float32)


def why_missing() -> str | None:
    """Return why nothing here can be tested, None where it can."""
    if not IS_GPU:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    served = [row for row in ops.providers() if row.device == "cuda"]
    return None if any(row.provider == "cuda" for row in served) else served[0].reason


if (_reason := why_missing()) is not None:
    pytest.skip(f"nothing to test on a GPU: {_reason}", allow_module_level=True)

OPS = list(schema.SCHEMAS)
gpu_only = pytest.mark.skipif(not IS_GPU, reason="a dry run on the CPU")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def skip_unless_cuda_kernel(op: str) -> None:
    """Skip a test that the reference cannot pass: it reads offsets on the host, and so waits."""
    if not backend.has_native(op, "cuda"):
        pytest.skip(f"{op} has no CUDA kernel")


def skip_unless_free(n_bytes: int, what: str) -> None:
    """Skip a test that needs more GPU memory than is free."""
    torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info(DEVICE)[0]) < n_bytes:
        pytest.skip(f"{what} needs {n_bytes / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free")


def moved(tensor: Tensor) -> Tensor:
    """`tensor` on the device, with its strides, its misalignment and its gaps between elements."""
    if tensor.device == DEVICE:
        return tensor
    memory = tensor.new_empty(0).set_(tensor.untyped_storage())
    return memory.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(sample: Sample) -> Sample:
    """The sample with its data on the device; the grouping of tensors stays on the host."""

    def move(arg: Any) -> Any:
        if isinstance(arg, list):
            return [move(item) for item in arg]
        return moved(arg) if isinstance(arg, Tensor) else arg

    host_side = 1 if sample.op == "multi_tensor_gram" else len(sample.args)
    return sample._replace(args=(*map(move, sample.args[:host_side]), *sample.args[host_side:]))


def poison_free_memory() -> None:
    """Fill free blocks of the allocator with 0xff: NaN in every dtype, -1 as an index."""
    if not IS_GPU:
        return
    # Enough memory is free that later requests are not served, zeroed, by the driver.
    seeds = [torch.empty(2**20, dtype=torch.uint8, device=DEVICE) for _ in range(4)]
    seeds.append(torch.empty(2**29, dtype=torch.uint8, device=DEVICE))
    del seeds
    stream = torch.cuda.current_stream(DEVICE).cuda_stream
    sizes = []
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] != torch.cuda.current_device() or segment["stream"] != stream:
            continue
        # Requests of up to 1 MiB, and no others, are served from the segments of small blocks.
        most = 2**20 if segment["segment_type"] == "small" else 2**40
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                whole, rest = divmod(block["size"], most)
                sizes += [most] * whole + [rest] * (rest > 0)
    # The best fit for the largest request is the largest block, and so on.
    held = [
        torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
        for size in sorted(sizes, reverse=True)
    ]
    del held
