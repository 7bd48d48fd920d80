"""`evaluate --suite survey`: measures, relearning, cost and effects of models in one table."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from models import build, samples

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import write_jsonl
from geffect_fast.errors import GEffectWarning, InterruptedRunError
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.steps.probe import Probe
from geffect_fast.training.survey import part_touched, source_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
RELEARN = ["--relearn", "steps=3", "--relearn", "n_rows=2", "--relearn", "learning_rate=0.01"]


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """A study whose model was unlearned by a run, by an adapter, and by hand in one place."""
    folder = shutil.copytree(study, tmp_path_factory.mktemp("survey") / "here")
    rows = [json.loads(line) for line in (folder / "forget.jsonl").read_text("utf-8").splitlines()]
    asked = [row | {"paraphrased_question": f"Tell me. {row['question']}"} for row in rows]
    write_jsonl(asked, folder / "forget.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["unlearn", "--model", "model", *DATA, "--objective", "ga", "--steps", "2"]
        assert main([*command, "--lr", "0.01", "--out", "ga", "--quiet"]) == 0
        assert main([*command, "--lora-rank", "2", "--out", "lora", "--quiet"]) == 0
    model = load_model(folder / "model")
    with torch.no_grad():
        model.lm_head.weight.view(-1)[:7] += 1.0
    model.save_pretrained(folder / "hand")
    load_tokenizer(folder / "model").save_pretrained(folder / "hand")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


COMMAND = ["evaluate", "--models", "model", "ga/model", "hand", *DATA, "--suite", "survey"]
COMMAND += ["--holdout", "general.jsonl", "--max-new-tokens", "6", *RELEARN]


@pytest.fixture(scope="module")
def surveyed(folder, undrawn):
    with pytest.MonkeyPatch.context() as patch, undrawn():
        patch.chdir(folder)
        assert main([*COMMAND, "--objectives", "gd", "--out", "survey"]) == 0
    return gf.open_evaluation(folder / "survey")


def name_of(dataset, end):
    """The name of the model whose folder ends like this."""
    (name,) = [n for n in dataset["model"].values.tolist() if n.endswith(end)]
    return name


def test_what_comes_back_is_what_relearn_says(here, surveyed):
    expected = gf.relearn(
        "ga/model",
        load_tokenizer("model"),
        forget="forget.jsonl",
        metrics="probability,extraction_strength",
        n_rows=2,
        steps=3,
        measure_every=3,
        learning_rate=0.01,
        token_budget=int(surveyed.attrs["token_budget"]),
    )
    of = surveyed.sel(model=name_of(surveyed, "ga/model"))
    assert of["relearned_step"].values.tolist() == [0, 3]
    assert of["relearned_set"].values.tolist() == ["relearned", "others"]
    found = of["relearned"].transpose("relearned_step", "relearned_metric", "relearned_set")
    np.testing.assert_allclose(
        found.values, expected["value"].isel(model=0).transpose("step", "metric", "set"), rtol=1e-5
    )


def test_effects_are_those_at_the_original(here, surveyed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GEffectWarning)
        expected = gf.profile(
            load_model("model"),
            load_tokenizer("model"),
            forget="forget.jsonl",
            retain="retain.jsonl",
            objectives=["ga", "gd"],
        )
    assert surveyed["objective"].values.tolist() == ["ga", "gd"]
    totals = expected["g_effect"].sum(["parameter", "sample"])
    np.testing.assert_allclose(surveyed["effect"], totals.transpose("objective", "risk"), rtol=1e-4)
    for bound in ("low", "high"):
        np.testing.assert_allclose(
            surveyed[f"effect_{bound}"], expected[f"g_effect_{bound}"], rtol=1e-3
        )
    trained = dict(zip(surveyed["model"].values, surveyed["trained_on"].values, strict=True))
    assert trained.pop(name_of(surveyed, "ga/model")) == "ga" and set(trained.values()) == {""}
    assert surveyed.attrs["original"] == str(here / "model")


def test_cost_is_that_of_the_run_and_what_was_touched_is_counted(here, surveyed):
    spent = json.loads((here / "ga/cost.json").read_text(encoding="utf-8"))
    of = surveyed.sel(model=name_of(surveyed, "ga/model"))
    assert float(of["seconds"]) == spent["seconds"] > 0
    assert float(of["peak_memory"]) == spent["peak_memory"] > 2**20
    model = load_model("model")
    total = sum(p.numel() for p in model.parameters())
    by_hand = surveyed.sel(model=name_of(surveyed, "hand"))
    assert float(by_hand["touched"]) == pytest.approx(7 / total)
    assert np.isnan(float(by_hand["seconds"])) and np.isnan(float(by_hand["peak_memory"]))
    assert float(surveyed["touched"].sel(model=name_of(surveyed, "here/model"))) == 0
    assert 0.5 < float(of["touched"]) <= 1
    (lost,) = [n for n in json.loads(surveyed.attrs["survey_notes"]) if n.startswith("Time")]
    assert lost.endswith(f"so not of {by_hand['model'].item()}.")


def test_the_folder_replays_and_is_shown_and_exported(here, surveyed, capsys):
    assert main(["evaluate", "--config", "survey/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, surveyed.assign_attrs(created=again.attrs["created"]))
    capsys.readouterr()
    assert main(["show", "survey"]) == 0
    assert "the survey's assessment" in capsys.readouterr().out
    page = (here / "survey/report.html").read_text(encoding="utf-8")
    assert 'id="survey"' in page and (here / "survey/plots/relearned.png").exists()
    table = pd.read_csv("survey/summary.csv")
    name = name_of(surveyed, "ga/model")
    of = table[table["model"] == name].set_index("metric")
    assert of.loc["seconds", "value"] == float(surveyed["seconds"].sel(model=name))
    last = of.loc["probability"]
    last = last[last["statistic"] == "after 3 updates"].set_index("set")["value"]
    for part in ("relearned", "others"):
        expected = surveyed["relearned"].sel(
            model=name, relearned_step=3, relearned_metric="probability", relearned_set=part
        )
        assert last[part] == pytest.approx(float(expected))
    effect = table[table["metric"] == "e_r of gd"]["value"].item()
    assert effect == pytest.approx(float(surveyed["effect"].sel(objective="gd", risk="e_r")))
    assert main(["export", "survey", "--to", "long.csv", "--overwrite"]) == 0
    long = pd.read_csv("long.csv")
    assert {"seconds", "touched", "e_u of ga"} <= set(long["metric"])


def test_what_is_not_known_is_left_out_and_said(here):
    command = ["evaluate", "--model", "hand", *DATA, "--holdout", "general.jsonl", "--suite"]
    command += ["survey", "--max-new-tokens", "6", "--relearn", "steps=1", "--quiet"]
    assert main([*command, "--out", "alone", "--overwrite"]) == 0
    found = gf.open_evaluation("alone")
    assert found["value"].dims == ("model", "metric", "set") and found.sizes["model"] == 1
    assert np.isnan(found["touched"].item()) and "effect" not in found
    # four forget rows are fewer than relearning's default
    assert json.loads(found.attrs["relearning"])["n_rows"] == 4
    assert found["relearned_set"].values.tolist() == ["relearned"]
    assert any("(--original)" in note for note in json.loads(found.attrs["survey_notes"]))
    assert main([*command, "--original", "model", "--out", "beside", "--overwrite"]) == 0
    assert gf.open_evaluation("beside")["touched"].item() > 0


def test_a_run_is_assessed_by_step_and_an_adapter_by_its_own_elements(here):
    command = ["evaluate", "--run", "lora", *DATA, "--holdout", "general.jsonl", "--suite"]
    command += ["survey", "--max-new-tokens", "6", *RELEARN, "--quiet"]
    assert main([*command, "--out", "steps", "--overwrite"]) == 0
    found = gf.open_evaluation("steps")
    assert found["step"].values.tolist() == [0, 2]
    assert found["trained_on"].values.tolist() == ["", "ga"]
    adapter = load_model("lora/model")
    own = sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)
    total = sum(p.numel() for p in load_model("model").parameters())
    np.testing.assert_allclose(found["touched"], [0, own / total])
    assert found["seconds"].notnull().values.tolist() == [False, True]


def test_models_of_other_parameters_are_not_told_as_touched():
    small, other = build("llama"), build("gpt2")
    assert np.isnan(part_touched(small, other)[0])
    assert part_touched(small, small) == (0.0, False)


# ---- the cost of a training ----


def test_a_run_that_was_stopped_costs_what_its_updates_did(tmp_path, monkeypatch):
    """The clock advances by a second at every reading."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("geffect_fast.training.cost.time.perf_counter", lambda: float(next(ticks)))
    data = {"forget": samples([9, 7, 5], 1, 3), "retain": samples([9, 6], 2, 3)}
    stopped = []

    def run(**more):
        gf.unlearn(
            build("llama"),
            None,
            **data,
            objective="ga",
            **{"steps": 5, "batch_size": 1, "probe_rows": 1, "out": tmp_path / "run", **more},
        )

    own = Probe.measure_at

    def at(self, step, **more):
        if step == 3 and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt
        return own(self, step, **more)

    monkeypatch.setattr(Probe, "measure_at", at)
    with pytest.raises(InterruptedRunError):
        run()
    run(resume=True)
    assert stopped == [3]
    spent = json.loads((tmp_path / "run/cost.json").read_text(encoding="utf-8"))
    assert spent["seconds"] == 5.0 and spent["device"] == "cpu"


def test_only_a_model_in_the_folder_of_a_run_was_made_by_one(folder):
    assert source_run(str(folder / "model")) is None
    assert source_run(str(folder / "ga/model")).config.objective == "ga"
    assert source_run("someone/model") is None
