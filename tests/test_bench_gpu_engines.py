"""The GPU benchmark of whole profiles, tried out on the CPU, and `make gpu`, which runs all."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import engines_report  # noqa: E402
from engines_runner import Runner  # noqa: E402
from engines_timing import OverTime, Timed, counted, time_limit  # noqa: E402

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "benchmarks" / "bench_gpu_engines.py"
FROM_A_CLONE = f"""
import importlib.util, runpy, sys
sys.path[:] = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]
assert importlib.util.find_spec("geffect_fast") is None, "it is installed"
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
"""Runs the script as if the package were not installed."""

JOBS = {
    "reverse, 1 objective, parameter x sample",
    "reverse, 1 objective, parameter x sample, norms",
    "reverse, 7 objectives, parameter x sample",
    "forward, 1 objective, sample x token",
    "forward, 21 objectives, sample x token",
    "auto, 21 objectives, sample",
}


def test_every_part_runs_and_the_ways_agree(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path)]
    command = [sys.executable, "-c", FROM_A_CLONE, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out for lack of time: 0" in done.stdout
    rows = list(csv.DictReader((tmp_path / "engines_cpu.csv").open(newline="")))
    assert not [row for row in rows if row["problem"]]
    assert all(float(row["seconds"]) > 0 for row in rows)
    for samples in ("2", "4"):
        of = [row for row in rows if row["samples"] == samples]
        assert {row["what"] for row in of if row["section"] == "engine"} == JOBS
        assert [row["of_step"] for row in of if row["what"] == engines_report.STEP] == ["1.0"]
    compared = {row["what"] for row in rows if row["difference"]}
    ways = ("loop", "vmap(grad)")
    assert compared >= {f"{q}: {way}" for q in ("norms", "direction", "pairs") for way in ways}
    assert "forward, 1 objective, sample x token" in compared
    published = [row["what"] for row in rows if row["section"] == "published"]
    assert published == [
        "published algorithm, 21 objectives, kept on the device",
        "published algorithm, 21 objectives, as released",
    ]
    assert {row["transformers"] for row in rows} != {""}
    table = engines_report.readme_table(rows)
    assert all(f"| {job} | 2 |" in table for job in JOBS)


@pytest.fixture
def runner() -> Runner:
    return Runner(torch.device("cpu"), budget=float("inf"), limit=0.2)


def test_part_that_fails_is_a_row_and_the_next_one_runs(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error:\n no such thing")

    runner.run("broken", fail, 0)
    runner.run(
        "whole", lambda: runner.add("engine", "whole", Timed(2.0, 3, 0), step=1.0) and None, 0
    )
    assert runner.failed
    broken, whole = runner.rows
    assert broken["problem"] == "RuntimeError: CUDA error: no such thing"
    assert (whole["of_step"], whole["problem"]) == (2.0, "")
    assert "broken" in capsys.readouterr().out


def test_part_over_its_time_ends_and_is_named(runner: Runner) -> None:
    def hang() -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # a handler of errors must not catch this
                continue

    runner.run("endless", hang, 0)
    runner.run("hopeless", hang, 5.0)  # this part needs more time than is left, and is not begun
    assert runner.left_out == ["endless (over its 0 s)", "hopeless"]
    assert not runner.failed and not runner.rows


def test_time_limit_ends_with_its_body() -> None:
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(OverTime), time_limit(0.05):
        time.sleep(1)


def test_ways_that_differ_fail(runner: Runner) -> None:
    runner.add("per sample", "norms: loop", Timed(1.0, 1, 0), difference=0.2)
    assert runner.failed and runner.rows[0]["problem"] == "differs by more than 0.05"


def test_kernels_and_waits_are_counted_apart_from_copies() -> None:
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name: str, device: object, nanoseconds: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=lambda: name, device_type=lambda: device, duration_ns=lambda: nanoseconds
        )

    traced = counted(
        [
            event("gemm", cuda, 3_000_000),
            event("vectorized_elementwise_kernel", cuda, 2_000_000),
            event("Memcpy DtoH (Device -> Pinned)", cuda, 7_000_000),
            event("Memset (Device)", cuda, 7_000_000),
            event("cudaStreamSynchronize", cpu, 9_000_000),
            event("cudaMemcpy", cpu, 9_000_000),
            event("cudaMemcpyAsync", cpu, 9_000_000),
            event("cudaLaunchKernel", cpu, 9_000_000),
        ],
        wall_seconds=0.02,
    )
    assert (traced.kernels, traced.waits) == (2, 2)
    assert traced.busy_percent == pytest.approx(25)


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"-m pytest"*) echo "3 failed"; exit 1;;
    *bench_gpu_engines.py*) sleep 30;;
esac
echo "done: $*"
"""


def test_make_gpu_runs_all_steps_and_fails_where_one_does(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    out = tmp_path / "found"
    command = ["make", "-s", "gpu", f"PYTHON={python}", f"GPU_OUT={out}", "GPU_SECONDS_engines=1"]
    done = subprocess.run(
        [*command, "TORCH_CUDA_ARCH_LIST=9.0a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    *_, build, test, engines, bench = done.stdout.rstrip().splitlines()
    assert build.startswith("gpu-build: passed") and "setup.py" in build
    assert test.startswith("gpu-test: FAILED (1)") and test.endswith("3 failed")
    assert engines == "gpu-engines: FAILED, over its 1 s"
    assert bench.startswith("gpu-bench: passed") and "bench_gpu.py" in bench
    logs = {"build.log", "test.log", "engines.log", "bench.log"}
    assert {file.name for file in out.iterdir()} == logs
    one = subprocess.run(
        [*command, "GPU_STEPS=bench"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert one.returncode == 0, one.stdout
