"""`geffect-fast profile --checkpoints`: stopped, resumed, and replayed."""

from __future__ import annotations

import shutil

import pytest
import torch
import xarray as xr

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.measure.models import load_model
from geffect_fast.steps.probe import Probe

pytestmark = pytest.mark.usefixtures("undrawn")

WORDS = ["profile", "--quiet", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
WORDS += ["--objectives", "ga", "--resolve", "group", "--checkpoints", "out/checkpoint-*"]


@pytest.fixture
def here(here):
    """The working folder with two checkpoints."""
    model = load_model(here / "model", device="cpu")
    for step in (2, 10):
        shutil.copytree(here / "model", here / f"out/checkpoint-{step}")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        model.save_pretrained(here / f"out/checkpoint-{step}")
    return here


@pytest.mark.slow
def test_a_run_is_stopped_gone_on_with_and_replayed(here, monkeypatch, capsys, undrawn):
    plain = Probe.measure_at

    def stopping(self, step, **more):
        if step == 10:
            raise KeyboardInterrupt
        return plain(self, step, **more)

    monkeypatch.setattr(Probe, "measure_at", stopping)
    assert main([*WORDS, "--out", "run"]) == 130
    line = capsys.readouterr().err
    assert line.startswith("error: interrupted; what was measured to step 2 is kept: go on with")
    assert f"--resume --out {here / 'run'}" in line and len(line.splitlines()) == 1
    assert sorted(path.name for path in (here / "run").iterdir()) == [
        "manifest.json",
        "run.yaml",
        "steps",
    ]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "run/steps/mine.txt").write_text("x")
    with undrawn():
        assert main(["profile", "--quiet", "--out", "run", "--resume"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "mine.txt is no step file; it is left alone" in said
    names = {path.name for path in (here / "run").iterdir()}
    assert {"run.yaml", "steps", "results.nc", "summary.csv", "plots", "report.html"} <= names
    assert main(["profile", "--quiet", "--config", "run/run.yaml", "--out", "again"]) == 0
    found = gf.open_run("run")
    assert found.step.values.tolist() == [2, 10]
    xr.testing.assert_identical(
        found.drop_attrs(deep=False), gf.open_run("again").drop_attrs(deep=False)
    )
    over = ["profile", "--quiet", "--config", "again/run.yaml", "--out", "run"]
    assert main([*over, "--overwrite"]) == 2, "what is not ours is not removed"
    assert "holds steps/mine.txt, which no run made" in capsys.readouterr().err
    (here / "run/steps/mine.txt").unlink()
    assert main(over) == 2
    assert "already holds results.nc" in capsys.readouterr().err
