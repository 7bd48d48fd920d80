"""`geffect-fast evaluate`: several models, a run and its checkpoints, suites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from loaded_models import watch_models

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import write_jsonl
from geffect_fast.demo import save
from geffect_fast.errors import InputError
from geffect_fast.metrics import SUITES

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def study(tmp_path_factory, model, retrained, tokenizer, sets):
    folder = tmp_path_factory.mktemp("evaluate")
    for name, each in (("known", model), ("retrained", retrained)):
        save(each, tokenizer, folder / name)
    for name in ("forget", "retain", "holdout"):
        write_jsonl(sets[name], folder / f"{name}.jsonl")
    for name, rows in sets["probes"].items():
        write_jsonl(rows, folder / f"{name}.jsonl")
    return folder


DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--holdout", "holdout.jsonl"]


@pytest.mark.usefixtures("drawn")
def test_several_models_lie_along_an_axis(here, model, tokenizer, sets, capsys):
    command = ["evaluate", "--models", "known", "retrained", *DATA, "--metrics", "nll,min_k(k=0.2)"]
    assert main([*command, "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "min_k(k=0.2)" in printed
    assert "known" in printed
    found = gf.open_evaluation("run")
    assert found.value.dims == ("model", "metric", "set")
    assert found["model"].values.tolist() == ["known", "retrained"]
    own = gf.evaluate(
        model,
        tokenizer,
        **{k: sets[k] for k in ("forget", "retain", "holdout")},
        metrics="nll,min_k(k=0.2)",
    )
    np.testing.assert_allclose(found.value.sel(model="known"), own.value, rtol=1e-6)
    known, other = found.value.sel(metric="nll", set="forget").values
    assert known < other
    lines = (here / "run/summary.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "model,metric,set,statistic,value,value_low,value_high"
    assert len(lines) == 1 + 2 * (3 + 1)
    # A run folder like others: replayed to the bit, guarded, shown again.
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "run", "--quiet"]) == 2
    assert "already holds evaluation.nc" in capsys.readouterr().err
    assert main(["show", "run"]) == 0
    assert "min_k(k=0.2)" in capsys.readouterr().out
    (here / "run/evaluation.nc").write_bytes(b"torn")
    with pytest.raises(InputError, match="torn or was replaced"):
        gf.open_evaluation("run")


@pytest.mark.usefixtures("drawn")
def test_a_run_of_measures_is_reported_and_exported(here, capsys):
    command = ["evaluate", "--models", "known", "retrained", *DATA, "--metrics", "nll,min_k(k=0.2)"]
    assert main([*command, "--out", "run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:] == ["run", "run/plots/measures.png", "run/report.html"]
    page = (here / "run/report.html").read_text(encoding="utf-8")
    assert "<h1>Measures: run</h1>" in page and str(here / "known") in page
    # missing files come back, and existing ones stay
    (here / "run/plots/measures.svg").unlink()
    (here / "run/plots/measures.png").unlink()
    (here / "run/report.html").unlink()
    summary = (here / "run/summary.csv").read_bytes()
    assert main(["report", "run"]) == 0
    assert (here / "run/report.html").read_text(encoding="utf-8") == page
    assert (here / "run/plots/measures.svg").exists()
    assert (here / "run/summary.csv").read_bytes() == summary
    assert main(["report", "run/evaluation.nc", "--out", "page.html"]) == 0
    assert (here / "page.html").read_text(encoding="utf-8") == page
    # one long table: numbers of sets, and of rows
    capsys.readouterr()
    assert main(["export", "run", "--to", "long.csv"]) == 0
    assert main(["export", "run", "--to", "long.parquet"]) == 0
    found = gf.open_evaluation("run")
    table = pd.read_csv("long.csv")
    pd.testing.assert_frame_equal(pd.read_parquet("long.parquet"), table, check_dtype=False)
    assert list(table) == [
        *("model", "metric", "set", "statistic", "sample", "question"),
        *("value", "value_low", "value_high"),
    ]
    rows = table[table["statistic"] == "row"]
    assert len(rows) == int(found["sample_value"].notnull().sum())
    assert len(table) - len(rows) == int(found["value"].notnull().sum())
    one = rows[(rows.model == "retrained") & (rows.metric == "nll") & (rows["set"] == "retain")]
    of = found["sample_value"].sel(model="retrained", metric="nll")
    of = of.isel(sample=(found["sample_set"] == "retain").values)
    np.testing.assert_allclose(one["value"], of)
    assert one["sample"].tolist() == of["sample"].values.tolist()
    assert one["question"].tolist() == of["question"].values.tolist()


@pytest.mark.usefixtures("drawn")
def test_a_report_that_fails_costs_no_number(here, capsys, monkeypatch):
    monkeypatch.setattr("geffect_fast.report.figures.measures.measures_figure", lambda _: 1 / 0)
    command = ["evaluate", "--model", "known", *DATA, "--metrics", "nll", "--quiet"]
    assert main([*command, "--out", "run"]) == 3
    assert "here/run are whole, but " in capsys.readouterr().err
    assert gf.open_evaluation("run").value.notnull().any()
    assert (here / "run/summary.csv").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(["report", "run"]) == 0
    assert (here / "run/plots/measures.png").exists()


def test_one_model_is_in_memory_at_a_time(here, monkeypatch):
    models = watch_models(monkeypatch)
    shutil.copytree("known", "third")
    command = ["evaluate", "--models", "known", "retrained", "third", *DATA, "--metrics", "nll"]
    assert main([*command, "--out", "run", "--quiet"]) == 0
    assert len(models) == 3
    found = gf.open_evaluation("run").value
    np.testing.assert_array_equal(found.sel(model="third"), found.sel(model="known"))


def test_the_checkpoints_of_a_run_lie_along_its_steps(here):
    for step, source in ((5, "retrained"), (20, "known")):
        shutil.copytree(here / source, here / f"run/checkpoint-{step}")
    command = ["evaluate", "--run", "run", *DATA, "--metrics", "nll", "--quiet"]
    assert main([*command, "--tokenizer", "known", "--out", "measures"]) == 0
    found = gf.open_evaluation("measures")
    assert found["step"].values.tolist() == [5, 20]
    before, after = found.value.sel(metric="nll", set="forget").values
    assert after < before


def test_an_unlearning_run_is_evaluated_from_its_beginning_to_its_end(here):
    command = ["unlearn", "--model", "known", *DATA[:4], "--objective", "ga", "--steps", "4"]
    command += ["--save-every", "2", "--probe-every", "2", "--lr", "0.01", "--keep-checkpoints"]
    assert main([*command, "--probe-rows", "2", "--out", "run", "--quiet"]) == 0
    command = ["evaluate", "--run", "run", *DATA[:4], "--metrics", "nll", "--quiet"]
    assert main([*command, "--out", "measures"]) == 0
    found = gf.open_evaluation("measures").value.sel(metric="nll", set="forget")
    assert found["step"].values.tolist() == [0, 2, 4]
    assert found.values[0] < found.values[1] < found.values[2]  # ascent forgets
    assert main([*command, "--models", "run/model", "--out", "end"]) == 2
    command = ["evaluate", "--models", "run/model", *DATA[:4], "--metrics", "nll", "--quiet"]
    assert main([*command, "--out", "end"]) == 0
    end = gf.open_evaluation("end").value.sel(metric="nll", set="forget")
    assert float(end) == found.values[2]


@pytest.mark.parametrize("suite", SUITES)
def test_suites(here, suite):
    rows = [json.loads(line) for line in Path("retain.jsonl").read_text("utf-8").splitlines()]
    write_jsonl([{"prompt": r["question"], "gt": r["answer"]} for r in rows], "books.jsonl")
    probes = [f"--probe={name}={name}.jsonl" for name in ("real_authors", "world_facts", "books")]
    command = ["evaluate", "--model", "known", *DATA, *probes, "--suite", suite, "--quiet"]
    command += ["--retain-model", "retrained", "--max-new-tokens", "8", "--out", "run"]
    assert main(command) == 0
    found = gf.open_evaluation("run")
    assert found["metric"].values.tolist() == list(SUITES[suite])
    assert found.attrs["suite"] == suite
    every = found.value.notnull().any("set")
    assert every.all()
