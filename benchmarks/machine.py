"""Helpers of all benchmarks: interleaved timing, peak memory, CSV rows that name the machine."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import package_path
import torch
from llama import make_model

import geffect_fast

RESULTS = Path(__file__).parent / "results"

Name = TypeVar("Name")


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def driver_version() -> str:
    """Return the version of NVIDIA's driver, empty where there is none."""
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text().split() if file.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def commit() -> str:
    """Return the measured commit, with a + where files were changed; empty outside of git."""
    command = ["git", "-C", str(package_path.ROOT), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def describe_machine() -> dict[str, Any]:
    """Return the columns that make a row comparable: machine, threads, versions, date."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "geffect_fast": geffect_fast.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows`, each followed by the machine's columns."""
    machine = describe_machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def interleaved_medians(
    candidates: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Return the median seconds of each candidate."""
    return {n: statistics.median(times) for n, times in interleaved(candidates, rounds).items()}


def interleaved_minima(
    candidates: Mapping[Name, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, float]:
    """Return the least seconds of each candidate, as noise only ever adds time."""
    return {name: min(times) for name, times in interleaved(candidates, rounds, clock).items()}


def interleaved(
    candidates: Mapping[Name, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Return the seconds of each candidate, timed in turns so that drift hits all alike."""
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    for round_index in range(rounds + 1):  # the first round warms up
        for name, run in candidates.items():
            start = clock()
            run()
            if round_index:
                times[name].append(clock() - start)
    return times


def run_shapes(
    description: str | None,
    file: str,
    shapes: Sequence[tuple[int, int]],
    measure: Callable[[Any, int, int, int], list[dict[str, Any]]],
    line: Callable[[Mapping[str, Any]], str],
) -> None:
    """Run a whole script: measure every shape on a Llama, print, and write the CSV.

    Args:
        description: the script's docstring.
        file: name of the CSV.
        shapes: `(samples, length)`, the first alone for `--quick`.
        measure: gives the rows of one shape, from the model, samples, length and rounds.
        line: gives the printed line of a row.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, prints only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.quick)
    rows = []
    for n, length in shapes[:1] if args.quick else shapes:
        for row in measure(model, n, length, args.rounds):
            rows.append(row)
            print(f"{n:3} x {length:<4} {line(row)}", flush=True)
    if not args.quick:
        write_csv(RESULTS / file, rows)
        print(f"wrote {RESULTS / file}")


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Return the largest rise of this process's resident memory during `run` (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
