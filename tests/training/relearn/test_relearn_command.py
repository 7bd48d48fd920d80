"""`geffect-fast relearn`, from folders to a run that replays, and its refusals."""

from __future__ import annotations

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from bad_input.case import snapshot
from loaded_models import watch_models
from relearn_rows import ASKED, FORGET, OTHERS, PUBLISHED

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import write_jsonl
from geffect_fast.demo import save
from geffect_fast.errors import GEffectError, GEffectWarning
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training.execute_relearn import execute_relearn

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, unlearned, retrained, tokenizer):
    folder = tmp_path_factory.mktemp("saved")
    save(unlearned, tokenizer, folder / "unlearned")
    save(retrained, tokenizer, folder / "retrained")
    write_jsonl(FORGET, folder / "forget.jsonl")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(shutil.copytree(saved, tmp_path / "here"))
    return tmp_path / "here"


COMMAND = ["relearn", "--model", "unlearned", "--forget", "forget.jsonl", "--rows", "2"]
COMMAND += ["--steps", "5", "--measure-every", "2", "--lr", "3e-3"]


def test_one_model_is_in_memory_at_a_time(here, monkeypatch):
    models = watch_models(monkeypatch)
    shutil.copytree("unlearned", "original")
    command = [*COMMAND, "--retrained", "retrained", "--original", "original", "--metrics", "nll"]
    assert main([*command, "--out", "run", "--quiet"]) == 0
    assert len(models) == 3


def test_from_folders_to_a_run_that_replays(here, capsys, result, undrawn):
    before = snapshot(here)
    with undrawn():
        assert main([*COMMAND, "--retrained", "retrained", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "measures by step" in printed and "others" in printed
    found = gf.open_evaluation("run")
    after = snapshot(here)
    assert {name: after[name] for name in before} == before
    wanted = result.sel(model=["unlearned", "retrained"])
    np.testing.assert_allclose(found.value, wanted.value, rtol=1e-4, atol=1e-6)
    assert main(["relearn", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))
    assert main(["show", "run"]) == 0
    assert "measures by step" in capsys.readouterr().out
    assert not list(here.rglob("checkpoint-*")) and not list(here.rglob("trainer_state.json"))
    lines = (here / "run/summary.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "model,step,metric,set,statistic,value,value_low,value_high"


def test_a_preset_of_the_command_is_recorded_whole(here, capsys):
    command = ["relearn", "--model", "unlearned", "--forget", "forget.jsonl", "--quiet"]
    command += ["--preset", "sam-wmdp"]
    assert main([*command, "--out", "run"]) == 2
    assert "20 is more than the 5 rows" in capsys.readouterr().err
    assert main([*command, "--rows", "all", "--out", "run"]) == 0
    found = gf.open_evaluation("run")
    assert found["step"].values.tolist() == [0, 5, 10, 15]
    training = json.loads(found.attrs["training"])
    written = yaml.safe_load((here / "run/run.yaml").read_text(encoding="utf-8"))
    asked = PUBLISHED["sam-wmdp"] | {"n_rows": "all", "batch_size": 4, "max_grad_norm": 1.0}
    for field, value in (asked | {"preset": "sam-wmdp"}).items():
        assert training[field] == value and written[field] == value, field
    assert main(["relearn", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))
    # Another preset replaces the file's settings, but not options beside it.
    command = ["relearn", "--config", "run/run.yaml", "--preset", "sam-muse-books", "--quiet"]
    command += ["--steps", "2", "--measure-every", "1", "--out", "other"]
    assert main(command) == 0
    training = json.loads(gf.open_evaluation("other").attrs["training"])
    assert training["lr_schedule"] == "cosine" and training["steps"] == 2
    assert training["max_length"] == 2048 and training["warmup_steps"] == 0


def test_other_rows_are_told_before_any_training(here, monkeypatch):
    assert main([*COMMAND, "--out", "run", "--quiet"]) == 0
    write_jsonl(OTHERS + FORGET[:1], here / "forget.jsonl")

    def never(*args, **kwargs):
        raise AssertionError("trained before the rows were compared")

    monkeypatch.setattr("geffect_fast.training.relearn.UnlearnTrainer.train", never)
    config = load_config(here / "run/run.yaml")
    told = pytest.warns(GEffectWarning, match="are other tokens than the config recorded")
    with told, pytest.raises(AssertionError, match="before the rows"):
        execute_relearn(config, here / "again")


@pytest.mark.slow
def test_a_suite_and_holdout_rows_of_the_command(here, capsys):
    write_jsonl(OTHERS, here / "holdout.jsonl")
    command = [*COMMAND, "--suite", "survey", "--holdout", "holdout.jsonl", "--quiet"]
    assert main([*command, "--out", "run"]) == 0
    assert "left out" not in capsys.readouterr().err
    found = gf.open_evaluation("run")
    assert "min_k" in found["metric"].values
    assert {*json.loads(found.attrs["digests"])} == {"relearned", "others", "holdout"}
    assert main([*COMMAND, "--suite", "survey", "--quiet", "--out", "less"]) == 0
    told = capsys.readouterr().err
    assert "suite survey: left out are min_k" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rows", "9"], "9 is more than the 5 rows of forget"),
        (["--rows", "0"], "--rows"),
        (["--steps", "0"], "--steps"),
        (["--measure-every", "6"], "6 is more than the 5 steps"),
        (["--batch-size", "3"], "3 is more than the 2 rows"),
        (["--lr", "nan"], "--learning-rate"),
        (["--optimizer", "adamw_toch"], "adamw_torch"),
        (["--original", "nowhere/at/all"], "original model nowhere/at/all does not exist"),
        (["--metrics", "probabilty"], "'probability'"),
        (["--metrics", "min_k"], "needs hold-out data"),
        (["--metrics", "model_utility"], "model_utility"),
        (["--metrics", "forget_quality"], "forget_quality needs a model trained without"),
        (["--metrics", "reference"], "reference needs a reference model, which is not read here"),
        (["--rows", "some"], "--rows"),
        (["--rows", "all", "--batch-size", "6"], "6 is more than the 5 rows of forget"),
        (["--preset", "sam-wdmp"], "did you mean 'sam-wmdp'"),
        (["--lr-schedule", "cosin"], "did you mean 'cosine'"),
        (["--max-grad-norm", "0"], "--max-grad-norm"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--data-format", "csv"], "forget.jsonl"),
        (["--model", ""], "must not be empty"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(here, capsys, more, said):
    before = snapshot(here)
    assert main([*COMMAND, *more, "--out", "run", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert snapshot(here) == before and not (here / "run").exists()


def poisoned(model):
    model = copy.deepcopy(model)
    model.lm_head.weight.data[0, 0] = math.nan
    return model


def test_refused_in_one_line(unlearned, tokenizer):
    for model, more, said in (
        (poisoned(unlearned), {}, "lm_head.weight holds 1 NaN"),
        (copy.deepcopy(unlearned).requires_grad_(False), {}, "can be trained"),
        (unlearned, {"learning_rate": 1e30, "optimizer": "sgd"}, "unlearned model, step"),
        (unlearned, {"retrained": torch.nn.Linear(2, 2)}, "retrained"),
        (unlearned, {"n_row": 3}, "did you mean 'n_rows'"),
    ):
        with pytest.raises(GEffectError) as caught:
            gf.relearn(model, tokenizer, **ASKED | more)
        assert said in str(caught.value) and "\n" not in str(caught.value)
