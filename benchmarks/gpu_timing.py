"""Times on a GPU: events around single calls, a cold second-level cache, measured ceilings.

A call's time is the device's time: the device is kept busy while the host prepares the call, for 5
ms at most, so that no launch is waited for. Reading other memory empties the cache: writing would
leave data in the cache that must still reach memory, and the call would wait for it. A call's own
waits on the host count. On the CPU the same functions measure with the host's clock, to try a
benchmark out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

FEWEST, MOST = 10, 200
SHORTEST, LONGEST = 0.02, 0.2  # seconds of timed calls: no less, no more where 3 calls fit
MOST_BUSY = 5e-3


class Ceilings(NamedTuple):
    """Rates of the device: bytes a second that a copy reads and writes, operations of products."""

    copy: float
    low_precision: float
    fp32: float

    def seconds(self, n_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """The least time that bytes and operations of `dtype` take."""
        rate = self.fp32 if dtype == torch.float32 else self.low_precision
        return max(n_bytes / self.copy, flops / rate)


class Measured(NamedTuple):
    """Median seconds of a call, and the most memory it holds beside its inputs."""

    seconds: float
    peak_extra_bytes: int


class Timer:
    """A timer of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        l2_bytes = 2**20
        if self.is_gpu:
            l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
        self._read_before = torch.zeros(2 * l2_bytes // 4, dtype=torch.int32, device=device)
        self._cycles_per_second = self._clock_rate() if self.is_gpu else 0.0

    def measure(self, calls: Sequence[Callable[[], Any]]) -> Measured:
        """Time calls that differ in their inputs, in turns."""
        for call in calls:
            call()
        host_seconds = self._host_seconds(calls[0])
        peak = self._peak_extra_bytes(calls[0])
        times: list[float] = []
        while not _enough(times):
            times.append(self._once(calls[len(times) % len(calls)], host_seconds))
        return Measured(statistics.median(times), peak)

    def ceilings(self) -> Ceilings:
        """Measure a copy of a GiB and matrix products, on random data."""
        n_copied, side = (2**30, 8192) if self.is_gpu else (2**22, 256)
        source = torch.randint(255, (n_copied,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = self.measure([lambda: target.copy_(source)]).seconds

        def rate(dtype: torch.dtype, n: int) -> float:
            x, y = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            return 2 * n**3 / self.measure([lambda: x @ y]).seconds

        low = torch.bfloat16 if self.is_gpu else torch.float32
        return Ceilings(2 * n_copied / copy, rate(low, side), rate(torch.float32, side // 2))

    def free_bytes(self) -> float:
        """Device memory that a benchmark may fill."""
        if not self.is_gpu:
            return 2**33
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    # ---- one call ----

    def _once(self, call: Callable[[], Any], host_seconds: float) -> float:
        self._read_before.amax()
        if not self.is_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        busy = min(1.5 * host_seconds + 2e-5, MOST_BUSY)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(busy * self._cycles_per_second))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _host_seconds(self, call: Callable[[], Any]) -> float:
        """Seconds that the host needs to put a call's work on the stream."""
        self.synchronize()
        start = time.perf_counter()
        call()
        found = time.perf_counter() - start
        self.synchronize()
        return found

    def _peak_extra_bytes(self, call: Callable[[], Any]) -> int:
        if not self.is_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _clock_rate(self) -> float:
        """Cycles of torch.cuda._sleep in a second."""
        cycles = 10_000_000
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # the first call wakes the device
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (begin.elapsed_time(end) / 1e3)


def _enough(times: Sequence[float]) -> bool:
    total = sum(times)
    if len(times) >= MOST or (len(times) >= 3 and total >= LONGEST):
        return True
    return len(times) >= FEWEST and total >= SHORTEST
