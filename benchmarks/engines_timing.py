"""Whole runs on a GPU: seconds, memory, a limit in time, and what the host asked of the device."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from machine import peak_extra_bytes

MOST_RUNS, LONG_ENOUGH = 3, 6.0
"""Runs after the first, and the seconds of all runs after which none is begun."""

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls that return only when the device has caught up; `cudaMemcpyAsync` does not."""


class Timed(NamedTuple):
    """Median seconds of the runs after the first (of the first if it was all), how many, memory."""

    seconds: float
    runs: int
    peak_bytes: int


class Traced(NamedTuple):
    """One run under the profiler.

    Attributes:
        kernels: that ran on the device, copies and fills apart.
        waits: of the host, calls of `WAITS`.
        kernel_seconds: sum of the kernels' times.
        wall_seconds: of the run, which the profiler slows down.
    """

    kernels: int
    waits: int
    kernel_seconds: float
    wall_seconds: float

    @property
    def busy_percent(self) -> float:
        """How much of the run the device spent in kernels."""
        return 100 * self.kernel_seconds / self.wall_seconds


class TraceEvent(Protocol):
    """What is read of torch's raw profiler events."""

    def name(self) -> str:
        """Of the kernel or the runtime call."""

    def device_type(self) -> Any:
        """Where it took place."""

    def duration_ns(self) -> int:
        """How long it took."""


class OverTime(BaseException):
    """The time that a part may take is up; no handler of errors takes it for one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OverTime` in the body once `seconds` are up; only in the main thread."""

    def over(_signal: int, _frame: FrameType | None) -> None:
        raise OverTime(f"over its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Times whole runs on one device, waits for it included."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds of one run."""
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def measure(self, run: Callable[[], Any], most_runs: int = MOST_RUNS) -> Timed:
        """Time a run and some more; the first warms up unless `most_runs` is 0."""
        times: list[float] = []
        peak = self._peak_of(lambda: times.append(self.once(run)))
        while len(times) <= most_runs and sum(times) < LONG_ENOUGH:
            times.append(self.once(run))
        counted = times[1:] or times
        return Timed(statistics.median(counted), len(counted), peak)

    def trace(self, run: Callable[[], Any]) -> Traced | None:
        """Count what one run does on a GPU; None on a CPU, which has no kernels."""
        if not self.is_gpu:
            return None
        # The device's activity alone: with every operator of the host a trace takes minutes.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            wall = self.once(run)
        return counted(profiler.profiler.kineto_results.events(), wall)

    def release(self) -> None:
        """Give back what the last run has left."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def _peak_of(self, run: Callable[[], Any]) -> int:
        """The most memory beside what is held before."""
        if not self.is_gpu:
            return peak_extra_bytes(run)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before


def counted(events: Sequence[TraceEvent], wall_seconds: float) -> Traced:
    """Kernels and waits among raw events, which `key_averages` would take many seconds to sort."""
    kernels = waits = nanoseconds = 0
    for event in events:
        name = event.name()
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if not name.startswith(("Memcpy", "Memset")):
                kernels += 1
                nanoseconds += event.duration_ns()
        elif name in WAITS:
            waits += 1
    return Traced(kernels, waits, nanoseconds / 1e9, wall_seconds)
