"""Guarantees of the ops about streams, graphs, devices and waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_samples import call, tensors_of
from on_gpu import (
    DEVICE,
    GPU_DTYPES,
    OPS,
    gpu_only,
    name_of,
    poison_free_memory,
    skip_unless_cuda_kernel,
)
from torch import Tensor

EVERY_OP = pytest.mark.parametrize("op", OPS)
TYPES = pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
SLEEP = 200_000_000  # clock cycles: a tenth of a second


@EVERY_OP
@TYPES
def test_repeated_calls_give_the_same_bits(op: str, dtype: torch.dtype) -> None:
    tensors = tensors_of(op, dtype)
    first = call(op, tensors)
    assert not first.isnan().any()
    for _ in range(5):
        poison_free_memory()
        assert torch.equal(call(op, tensors), first)


@gpu_only
@EVERY_OP
def test_streams_side_by_side_give_the_same_bits(op: str) -> None:
    inputs = [tensors_of(op, torch.bfloat16, seed) for seed in (0, 1)]
    alone = [call(op, tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(DEVICE) for _ in inputs]
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, tensors, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(op, tensors))
    torch.cuda.synchronize()
    for expected, results in zip(alone, found, strict=True):
        assert all(torch.equal(result, expected) for result in results)


@gpu_only
@EVERY_OP
@TYPES
def test_work_is_put_on_the_current_stream(op: str, dtype: torch.dtype) -> None:
    """On any other stream the op would read the NaN that inputs hold before the sleep is over."""
    values = tensors_of(op, dtype)
    expected = call(op, values)
    inputs = [torch.full_like(x, torch.nan) if x.is_floating_point() else x for x in values]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for into, value in zip(inputs, values, strict=True):
            into.copy_(value)
        found = call(op, inputs)
    stream.synchronize()
    assert torch.equal(found, expected)


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    """Raise where torch waits for the device; a wait outside of torch leaves the stream idle."""
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    still_asleep = not torch.cuda.current_stream(DEVICE).query()
    torch.cuda.synchronize()
    assert still_asleep, "the call waited for the device"


@gpu_only
@EVERY_OP
@TYPES
def test_calls_do_not_wait_for_the_device(op: str, dtype: torch.dtype) -> None:
    skip_unless_cuda_kernel(op)
    tensors = tensors_of(op, dtype)
    expected = call(op, tensors)
    call(op, tensors)  # frees as much memory as the next call takes
    with synchronisation_is_an_error():
        found = call(op, tensors)
    assert torch.equal(found, expected)


@gpu_only
@pytest.mark.parametrize(
    "wait", [torch.cuda.synchronize, lambda: torch.ones(3, device=DEVICE).sum().item()]
)
def test_waiting_is_noticed(wait: Callable[[], object]) -> None:
    with pytest.raises((AssertionError, RuntimeError)), synchronisation_is_an_error():
        wait()


@gpu_only
@EVERY_OP
@TYPES
def test_graph_replays_on_new_data(op: str, dtype: torch.dtype) -> None:
    skip_unless_cuda_kernel(op)
    inputs, others = tensors_of(op, dtype), tensors_of(op, dtype, seed=1)
    expected = [call(op, tensors) for tensors in (others, inputs)]
    assert not torch.equal(*expected)
    held = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(3):
            call(op, held)
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(op, held)
    for tensors, wanted in zip((others, inputs), expected, strict=True):
        for into, value in zip(held, tensors, strict=True):
            into.copy_(value)
        poison_free_memory()
        graph.replay()
        assert torch.equal(captured, wanted)


@gpu_only
@EVERY_OP
def test_tensors_of_a_device_that_is_not_current(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    tensors = tensors_of(op, torch.bfloat16)
    expected = call(op, tensors)
    with torch.cuda.device(0):
        found = call(op, [tensor.to("cuda:1") for tensor in tensors])
        assert torch.cuda.current_device() == 0
    assert found.device == torch.device("cuda:1")
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-3, atol=1e-2)
