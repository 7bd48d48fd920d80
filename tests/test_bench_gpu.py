"""The GPU benchmark, tried out on the CPU with tiny sizes."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from geffect_fast.ops import schema

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_op_is_timed_against_plain_torch(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not timed" not in done.stdout
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open(newline="")))
    assert {row["op"] for row in rows} == set(schema.SCHEMAS)
    for op in schema.SCHEMAS:
        providers = {row["provider"] for row in rows if row["op"] == op}
        assert "ours" in providers and any(not p.startswith("ours") for p in providers)
    command = ["git", "-C", str(SCRIPT.parent), "describe", "--always", "--dirty=+"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert {row["commit"] for row in rows} == {commit}
    assert all(float(row["ms"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert (tmp_path / "cpu.png").stat().st_size > 0


def test_budget_leaves_out_what_it_names(tmp_path: Path) -> None:
    done = run("--only", "segment_dot", "--budget", "0", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "left out for want of time: 1\n  segment_dot" in done.stdout
    assert not list(tmp_path.iterdir())
