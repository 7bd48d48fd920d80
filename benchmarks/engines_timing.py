"""Whole runs on a GPU: seconds, memory, a time limit, and the host's requests to the device."""

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
"""The most runs after the first, and the total seconds after which no new run begins."""

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Runtime calls that return only when the device has caught up; `cudaMemcpyAsync` does not."""


class Timed(NamedTuple):
    """Median seconds of the runs after the first (or of an only run), their number, and memory."""

    seconds: float
    runs: int
    peak_bytes: int


class Traced(NamedTuple):
    """One run under the profiler.

    Attributes:
        kernels: number of kernels on the device, without copies and fills.
        waits: number of the host's waits, calls of `WAITS`.
        kernel_seconds: sum of the kernels' times.
        wall_seconds: time of the run, which the profiler slows down.
    """

    kernels: int
    waits: int
    kernel_seconds: float
    wall_seconds: float

    @property
    def busy_percent(self) -> float:
        """The percentage of the run that the device spent in kernels."""
        return 100 * self.kernel_seconds / self.wall_seconds


class TraceEvent(Protocol):
    """The parts of torch's raw profiler events that are read here."""

    def name(self) -> str:
        """Name of the kernel or the runtime call."""

    def device_type(self) -> Any:
        """Device on which the event took place."""

    def duration_ns(self) -> int:
        """Duration in nanoseconds."""


class OverTime(BaseException):
    """The end of a part's time; handlers of errors do not catch it."""


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
    """A clock of whole runs on one device, waits for the device included."""

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
        """Count the kernels and waits of one run on a GPU; None on a CPU, which has no kernels."""
        if not self.is_gpu:
            return None
        # Only the device's activity: with every operator of the host a trace takes minutes.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            wall = self.once(run)
        return counted(profiler.profiler.kineto_results.events(), wall)

    def release(self) -> None:
        """Free the memory of the last run."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def _peak_of(self, run: Callable[[], Any]) -> int:
        """The peak of memory above the memory that was held before."""
        if not self.is_gpu:
            return peak_extra_bytes(run)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before


def counted(events: Sequence[TraceEvent], wall_seconds: float) -> Traced:
    """Kernels and waits among raw events; `key_averages` would take many seconds to sort these."""
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
