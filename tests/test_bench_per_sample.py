"""The per-sample benchmark's contestants agree with plain autograd, on a tiny model."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_per_sample.py"
PEERS = {"geffect_fast", "loop", "vmap(grad)", "ghost clipping"}


def test_every_contestant_is_right(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    options = ["--quick", "--threads", "1", "--rounds", "1", "--shape", "5x24", "--out", str(out)]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader(out.open(newline="")))
    found = {
        quantity: {row["contestant"] for row in rows if row["quantity"] == quantity}
        for quantity in dict.fromkeys(row["quantity"] for row in rows)
    }
    assert found == {
        "": {"training step"},
        "norms": PEERS,
        "direction": PEERS | {"jvp"},
        "pairs": PEERS,
        "one objective, two risks": {"geffect_fast"},
        "gradient of one risk": {"geffect_fast"},
    }
    for row in rows:
        if row["contestant"] != "training step":
            limit = 1e-5 if row["contestant"] == "geffect_fast" else 1e-3
            assert float(row["error"]) < limit, row
