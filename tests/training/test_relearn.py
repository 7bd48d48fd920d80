"""`gf.relearn` and `geffect-fast relearn`: what comes back of rows that were unlearned."""

from __future__ import annotations

import copy
import hashlib
import json
import math

import numpy as np
import pytest
import torch
import xarray as xr

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import tokenize_rows, write_jsonl
from geffect_fast.demo import Size, make_model, save, train_tokenizer
from geffect_fast.demo.authors import make_fictitious_authors
from geffect_fast.errors import GEffectError

ROWS = make_fictitious_authors(2, seed=3)
FORGET, OTHERS = ROWS[:5], ROWS[5:9]
ASKED = {"forget": FORGET, "n_rows": 2, "steps": 5, "measure_every": 2, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{row['question']} {row['answer']}" for row in ROWS], 320)


def fitted(model, tokenizer, rows, steps, sign=1.0, lr=1e-2):
    given = [s.answer for s in tokenize_rows(rows, tokenizer, name="rows").samples]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        one = given[step % len(given)]
        loss = model(input_ids=one.input_ids[None], labels=one.labels[None]).loss
        (sign * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def blank(tokenizer):
    torch.manual_seed(1)
    return make_model(tokenizer, Size(hidden=32, n_layers=2))


@pytest.fixture(scope="module")
def original(blank, tokenizer):
    return fitted(copy.deepcopy(blank), tokenizer, [*FORGET, *OTHERS], 90)


@pytest.fixture(scope="module")
def retrained(blank, tokenizer):
    """One that never saw the forget rows."""
    return fitted(copy.deepcopy(blank), tokenizer, OTHERS, 60)


@pytest.fixture(scope="module")
def unlearned(original, tokenizer):
    """A little ascent, which hides what it does not remove."""
    return fitted(copy.deepcopy(original), tokenizer, FORGET, 5, sign=-1.0, lr=3e-3)


@pytest.fixture(scope="module")
def result(unlearned, original, retrained, tokenizer):
    return gf.relearn(unlearned, tokenizer, original=original, retrained=retrained, **ASKED)


def test_what_was_memorised_comes_back_faster(result):
    of = result.value.sel(metric="probability")
    assert of.dims == ("model", "step", "set")
    assert result["model"].values.tolist() == ["unlearned", "original", "retrained"]
    assert result["step"].values.tolist() == [0, 2, 4, 5]
    last = of.sel(step=5)
    for part in ("relearned", "others"):
        assert last.sel(set=part, model="unlearned") > last.sel(set=part, model="retrained")
    hidden = of.sel(model="unlearned", set="relearned")
    assert hidden.sel(step=5) > hidden.sel(step=0)


def test_step_0_is_evaluate(result, unlearned, retrained, tokenizer):
    chosen = json.loads(result.attrs["relearned_rows"])
    assert len(chosen) == 2
    left = [i for i in range(5) if i not in chosen]
    for name, model in (("unlearned", unlearned), ("retrained", retrained)):
        for part, rows in (("relearned", chosen), ("others", left)):
            expected = gf.evaluate(
                model, tokenizer, forget=[FORGET[i] for i in rows], retain=OTHERS
            ).sel(set="forget")
            found = result.sel(model=name, step=0, set=part)
            for number in ("value", "value_low", "value_high"):
                np.testing.assert_allclose(found[number], expected[number], rtol=1e-5)
            here = result.sample_set == part
            of = result.sample_value.sel(model=name, step=0).isel(sample=here)
            there = expected.sample_value.isel(sample=expected.sample_set == "forget")
            np.testing.assert_allclose(of, there, rtol=1e-5)
            assert result["sample"].values[here].tolist() == rows
            asked = [FORGET[i]["question"] for i in rows]
            assert result.question.values[here].tolist() == asked


def test_training_is_plain_descent_on_the_rows_mean_loss(retrained, tokenizer):
    """Five steps of torch's own SGD, by transformers' own logits, one row at a time."""
    asked = ASKED | {"optimizer": "sgd", "learning_rate": 0.5, "measure_every": 5}
    found = gf.relearn(retrained, tokenizer, **asked, metrics="nll")
    chosen = json.loads(found.attrs["relearned_rows"])
    model = copy.deepcopy(retrained)
    rows = tokenize_rows([FORGET[i] for i in chosen], tokenizer, name="rows").samples
    total = sum(s.answer.n_targets for s in rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        for s in rows:
            one = s.answer
            loss = model(input_ids=one.input_ids[None], labels=one.labels[None]).loss
            (loss * one.n_targets / total).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nll = [
            float(model(input_ids=s.answer.input_ids[None], labels=s.answer.labels[None]).loss)
            for s in rows
        ]
    of = found.sample_value.sel(model="unlearned", step=5, metric="nll")
    np.testing.assert_allclose(of.isel(sample=found.sample_set == "relearned"), nll, rtol=1e-3)


def test_models_are_left_as_they_were_and_bits_are_the_same_again(
    result, unlearned, original, retrained, tokenizer
):
    before = [copy.deepcopy(m.state_dict()) for m in (unlearned, original, retrained)]
    torch.manual_seed(99)
    again = gf.relearn(unlearned, tokenizer, original=original, retrained=retrained, **ASKED)
    xr.testing.assert_identical(again, result.assign_attrs(created=again.attrs["created"]))
    for model, state in zip((unlearned, original, retrained), before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


def test_all_rows_may_be_trained_on(unlearned, tokenizer):
    asked = ASKED | {"n_rows": 5, "steps": 2, "batch_size": 2, "seed": 4}
    found = gf.relearn(unlearned, tokenizer, **asked)
    assert found["set"].values.tolist() == ["relearned"]
    assert found["sample"].values.tolist() == [0, 1, 2, 3, 4]


def test_of_an_adapter_what_it_adds_is_trained(original, tokenizer):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = peft.get_peft_model(copy.deepcopy(original), config).train()
    before = copy.deepcopy(adapter.state_dict())
    asked = ASKED | {"steps": 2, "learning_rate": 0.1}
    found = gf.relearn(adapter, tokenizer, **asked, metrics="nll").value
    assert adapter.training
    first, last = (found.sel(model="unlearned", set="relearned", step=s).item() for s in (0, 2))
    assert first != last
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---- the command ----


@pytest.fixture
def here(tmp_path, monkeypatch, unlearned, retrained, tokenizer):
    save(unlearned, tokenizer, tmp_path / "unlearned")
    save(retrained, tokenizer, tmp_path / "retrained")
    write_jsonl(FORGET, tmp_path / "forget.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sums(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


COMMAND = ["relearn", "--model", "unlearned", "--forget", "forget.jsonl", "--rows", "2"]
COMMAND += ["--steps", "5", "--measure-every", "2", "--lr", "3e-3"]


def test_from_folders_to_a_run_that_replays(here, capsys, result):
    before = sums(here)
    assert main([*COMMAND, "--retrained", "retrained", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "measures by step" in printed and "others" in printed
    found = gf.open_evaluation("run")
    after = sums(here)
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
        (["--model", ""], "must not be empty"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(here, capsys, more, said):
    before = sums(here)
    assert main([*COMMAND, *more, "--out", "run", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sums(here) == before and not (here / "run").exists()


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
