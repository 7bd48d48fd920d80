"""The GPU benchmark, tried out on the CPU with tiny sizes."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from geffect_fast.ops import schema

pytestmark = pytest.mark.slow

Run = Callable[..., str]

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(FOLDER))

import bench_gpu  # noqa: E402


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the script's own `main`, and return the printed text."""

    def call(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench_gpu", "--device", "cpu", "--quick", *options])
        assert bench_gpu.main() == 0
        return capsys.readouterr().out

    return call


def test_every_op_is_timed_against_plain_torch(tmp_path: Path, run: Run) -> None:
    assert "Not timed" not in run("--out", str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open(newline="")))
    assert {row["op"] for row in rows} == set(schema.SCHEMAS)
    for op in schema.SCHEMAS:
        providers = {row["provider"] for row in rows if row["op"] == op}
        assert "ours" in providers and any(not p.startswith("ours") for p in providers)
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty=+"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert {row["commit"] for row in rows} == {commit}
    assert all(float(row["ms"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert (tmp_path / "cpu.png").stat().st_size > 0


def test_budget_leaves_out_what_it_names(tmp_path: Path, run: Run) -> None:
    printed = run("--only", "segment_dot", "--budget", "0", "--out", str(tmp_path))
    assert "left out for lack of time: 1\n  segment_dot" in printed
    assert not list(tmp_path.iterdir())
