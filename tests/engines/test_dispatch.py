"""Bounds on the operations and waits of a profile, by the table of `bench_dispatch.py`.

The benchmark explains what is counted. Each bound is a few times a training step's own operations:
up to there the device, not the host, is the limit.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_dispatch  # noqa: E402


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out, threads = tmp_path_factory.mktemp("dispatch") / "rows.csv", torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_dispatch", "--attention", "eager", "--out", str(out)])
        bench_dispatch.main()
    torch.set_num_threads(threads)
    rows = list(csv.DictReader(out.open(newline="")))
    return {(row["engine"], row["phase"]): (int(row["calls"]), int(row["waits"])) for row in rows}


def test_reverse_engine(table):
    step = table["", "training step"][0]
    calls, waits = table["reverse", "objective pass"]
    assert calls <= 1.3 * step and waits == 0
    calls, waits = table["reverse", "risk gradients"]
    assert calls <= 2.1 * step and waits == 0  # two risks
    calls, waits = table["reverse", "whole profile"]
    assert calls <= 4.5 * step and waits <= 64


def test_forward_engine(table):
    calls, waits = table["forward", "whole profile"]
    assert calls <= 18_000 and waits <= 64


def test_phases_are_all_there(table):
    phases = ["preparing", "risk gradients", "objective pass", "measuring", "whole profile"]
    assert list(table) == [
        ("", "training step"),
        *(("reverse", phase) for phase in phases),
        *(("forward", phase) for phase in phases),
    ]
    for engine in ("reverse", "forward"):
        calls = [table[engine, phase][0] for phase in phases]
        assert calls[1] + calls[2] < calls[3] < calls[4]
