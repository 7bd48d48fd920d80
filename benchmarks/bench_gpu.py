"""Every op on a GPU against plain torch, torch.compile and the device's own limits.

    python benchmarks/bench_gpu.py                    # writes benchmarks/results/<gpu>.csv and .png
    python benchmarks/bench_gpu.py --only ghost_norm  # the cases whose op and shape hold this text
    python benchmarks/bench_gpu.py --device cpu       # tiny shapes: tries the script, not a device

Measured first: the bandwidth of a large copy (bytes read and written) and the rate of a bf16
product of 8192^3. `percent_of_roofline` is the time that the least bytes and operations of a case
would take at these, over the time measured; least means that every input is read once and every
result written once. Times are medians, by CUDA events, with the second-level cache overwritten
before every run and two sets of random inputs in rotation. A candidate whose numbers differ from
ours is an error. `ours` is the op as it chooses its form, `ours:<form>` a form forced by
GEFFECT_FAST_BILINEAR_FORM or GEFFECT_FAST_GHOST_FORM; `ratio` is a candidate's time over that of
`ours`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_cases
import torch
from gpu_cases import Case
from machine import RESULTS, write_csv


class Ceilings(NamedTuple):
    """What the device does at best: bytes a second, and operations a second in bf16."""

    bytes_per_second: float
    flops_per_second: float

    def least_seconds(self, case: Case) -> float:
        """Return the time that the case's bytes and operations would take at the ceilings."""
        return max(case.n_bytes / self.bytes_per_second, case.flops / self.flops_per_second)


class Timer:
    """Times functions of one of several inputs, the cache cold."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device = device
        self.repetitions = 3 if quick else 10
        self.seconds = 0.02 if quick else 0.2
        cache = 4 * 2**20
        if device.type == "cuda":
            cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.flushed = torch.empty(cache, dtype=torch.int8, device=device)

    def once(self, run: Callable[[], Any]) -> float:
        """Return the seconds of one run."""
        self.flushed.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, run: Callable[[Any], Any], inputs: list[Any]) -> float:
        """Return the median seconds over the inputs in rotation."""
        for given in inputs:
            run(given)
        times: list[float] = []
        while len(times) < self.repetitions or (sum(times) < self.seconds and len(times) < 100):
            given = inputs[len(times) % len(inputs)]
            times.append(self.once(lambda: run(given)))  # noqa: B023
        return statistics.median(times)


def measure_ceilings(timer: Timer) -> Ceilings:
    """Measure a copy of 2 GiB and a bf16 product of 8192^3 (tiny ones on a CPU)."""
    on_gpu = timer.device.type == "cuda"
    n_bytes, side = (2**31, 8192) if on_gpu else (2**24, 256)
    source = torch.randint(127, (n_bytes,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    copy = timer.median(target.copy_, [source])
    pair = [torch.randn(side, side, device=timer.device).bfloat16() for _ in range(2)]
    product = timer.median(lambda p: p[0] @ p[1], [pair])
    return Ceilings(2 * n_bytes / copy, 2 * side**3 / product)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which the CUDA kernels read at every call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def relative_error(found: Any, expected: Any) -> float:
    """Return ||found - expected|| / ||expected|| over all tensors of a result."""
    found, expected = (
        torch.cat([t.detach().double().flatten() for t in (x if isinstance(x, tuple) else (x,))])
        for x in (found, expected)
    )
    return float((found - expected).norm() / expected.norm())


def peak_megabytes(run: Callable[[], Any], device: torch.device) -> float:
    """Return by how much the device's memory rises at most during `run`; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, timer: Timer, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Check and time all candidates of one case, ours first."""
    inputs = [case.make(seed) for seed in range(2)]
    expected = case.candidates["ours"](inputs[0])
    rows: list[dict[str, Any]] = []
    for provider, run in case.candidates.items():
        with environment(case.variables.get(provider, {})):
            try:
                found = run(inputs[0])
                error = 0.0 if provider in case.partial else relative_error(found, expected)
                del found
                if not error < case.tolerance:
                    raise SystemExit(f"{case.op} {case.shape}: {provider} differs by {error:.2g}")
                seconds = timer.median(run, inputs)
                peak = peak_megabytes(lambda: run(inputs[0]), timer.device)  # noqa: B023
            except torch.OutOfMemoryError:
                print(f"{case.op} {case.shape}: {provider} does not fit the memory", flush=True)
                continue
        ours = rows[0]["ms"] / 1e3 if rows else seconds
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "provider": provider,
                "ms": round(seconds * 1e3, 5),
                "ratio": round(seconds / ours, 3),
                "gb_per_s": round(case.n_bytes / seconds / 1e9, 1),
                "tflop_per_s": round(case.flops / seconds / 1e12, 2),
                "percent_of_roofline": round(100 * ceilings.least_seconds(case) / seconds, 1),
                "peak_mb": round(peak, 1),
                "relative_error": float(f"{error:.2g}"),
            }
        )
    return rows


def print_case(rows: list[dict[str, Any]]) -> None:
    """Print a case on one line: ours, then the others' ratios."""
    ours = rows[0]
    others = "  ".join(f"{row['provider']} {row['ratio']:.2f}" for row in rows[1:])
    print(
        f"{ours['op']:17s} {ours['shape']:34s} {ours['dtype']:9s} {ours['ms']:9.4f} ms"
        f" {ours['percent_of_roofline']:5.1f} %  {others}",
        flush=True,
    )


def driver() -> str:
    """Return the version of NVIDIA's driver, empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw every candidate's ratio by op: right of 1 is slower than ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({row["op"] for row in rows})
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 1.1 + 1.5 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        own = [row for row in rows if row["op"] == name and row["provider"] != "ours"]
        providers = list(dict.fromkeys(row["provider"] for row in own))
        for row in own:
            axis.plot(row["ratio"], providers.index(row["provider"]), "o", alpha=0.5, color="C0")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_yticks(range(len(providers)), providers, fontsize=7)
        axis.set_ylim(-0.7, len(providers) - 0.3)
        axis.set_title(name, fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("time over ours (one dot a shape)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run the cases within the budget, print the table, write CSV and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu tries the script on tiny shapes")
    parser.add_argument("--only", default="", help="cases whose op and shape contain this text")
    parser.add_argument("--quick", action="store_true", help="few repetitions; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    parser.add_argument(
        "--budget", type=float, default=280, help="seconds; later cases are left out"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --device cpu tries the script alone")
    start = time.perf_counter()
    torch.manual_seed(0)
    device = torch.device(options.device)
    timer = Timer(device, options.quick or device.type == "cpu")
    ceilings = measure_ceilings(timer)
    print(
        f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s,"
        f" bf16 product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    left_out = []
    for case in gpu_cases.cases(device):
        if options.only not in f"{case.op} {case.shape}":
            continue
        if time.perf_counter() - start > options.budget:
            left_out.append(f"{case.op} {case.shape}")
            continue
        measured = measure(case, timer, ceilings)
        print_case(measured)
        rows += measured
    if left_out:
        print(f"left out after {options.budget:.0f} s: {'; '.join(left_out)}")
    if options.quick or options.only or not rows:
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else "dry-run"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    facts = {
        "copy_gb_per_s": round(ceilings.bytes_per_second / 1e9),
        "matmul_tflop_per_s": round(ceilings.flops_per_second / 1e12),
        "driver": driver(),
    }
    write_csv(options.out / f"{slug}.csv", [{**row, **facts} for row in rows])
    draw(rows, options.out / f"{slug}.png")
    print(f"wrote {options.out / slug}.csv and .png")


if __name__ == "__main__":
    main()
