"""`gf.relearn` and `geffect-fast relearn`: what comes back of rows that were unlearned."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import tokenize_rows, write_jsonl
from geffect_fast.demo import Size, make_model, save, train_tokenizer
from geffect_fast.demo.authors import make_fictitious_authors
from geffect_fast.errors import GEffectError, GEffectWarning
from geffect_fast.relearn_settings import PRESETS, Preset, Relearning
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training.execute_relearn import execute_relearn

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


TEXTS = [
    {"text": f"{ROWS[i]['question']} {ROWS[i]['answer']} {ROWS[i + 1]['answer']}"}
    for i in (0, 2, 4)
]


def test_windows_of_texts_are_rows(unlearned, tokenizer):
    """As many as are asked for are trained on, and `sample` is a window's number in the data."""
    asked = ASKED | {"forget": TEXTS, "n_rows": 4, "steps": 2, "measure_every": 2}
    windows = tokenize_rows(TEXTS, tokenizer, name="forget", max_length=16)
    assert len(windows) > 8
    found = gf.relearn(unlearned, tokenizer, **asked, max_length=16)
    chosen = json.loads(found.attrs["relearned_rows"])
    left = sorted({*range(len(windows))} - {*chosen})
    assert len(chosen) == 4
    assert json.loads(found.attrs["n_rows"]) == {"relearned": 4, "others": len(left)}
    for part, rows in (("relearned", chosen), ("others", left)):
        here = found.sample_set == part
        assert found["sample"].values[here].tolist() == rows
        expected = gf.evaluate(
            unlearned, tokenizer, forget=windows.part(rows), retain=windows.part([0])
        ).sel(set="forget")
        of = found.sel(model="unlearned", step=0)
        np.testing.assert_allclose(of.value.sel(set=part), expected.value, rtol=1e-5)
        np.testing.assert_allclose(
            of.sample_value.isel(sample=here),
            expected.sample_value.isel(sample=expected.sample_set == "forget"),
            rtol=1e-5,
        )
    # Windows that were made before are the same rows.
    again = gf.relearn(unlearned, tokenizer, **asked | {"forget": windows}, max_length=16)
    xr.testing.assert_identical(again.value, found.value)
    assert again["sample"].values.tolist() == found["sample"].values.tolist()


def chat(row):
    turns = [("user", row["question"]), ("assistant", row["answer"])]
    turns += [("user", "And then?"), ("assistant", "No more.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


KINDS = {
    "texts": (TEXTS, {}),
    "conversations": ([chat(row) for row in FORGET], {}),
    "choices": (
        [
            {"question": row["question"], "choices": ["blue", "red", "green"], "answer": i % 3}
            for i, row in enumerate(FORGET)
        ],
        {"metrics": "multiple_choice"},
    ),
    "continuations": ([{"prompt": r["question"], "gt": r["answer"]} for r in FORGET], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_relearned(unlearned, tokenizer, kind):
    rows, more = KINDS[kind]
    asked = ASKED | {"forget": rows, "n_rows": 2, "steps": 2, "measure_every": 2}
    found = gf.relearn(unlearned, tokenizer, **asked, **more)
    assert sorted(found["sample"].values.tolist()) == list(range(len(rows)))
    assert found.sample_value.notnull().all() and found.value.notnull().all()


# ---- how it is trained ----


def test_all_rows_by_a_word(unlearned, tokenizer):
    asked = ASKED | {"n_rows": "all", "steps": 2, "batch_size": 2, "seed": 4}
    found = gf.relearn(unlearned, tokenizer, **asked)
    by_number = gf.relearn(unlearned, tokenizer, **asked | {"n_rows": 5})
    np.testing.assert_array_equal(found.value, by_number.value)


@pytest.mark.parametrize(
    ("asked", "rate_at"),
    [
        ({}, lambda k: 1.0),
        ({"lr_schedule": "constant", "warmup_steps": 2}, lambda k: min(k / 2, 1.0)),
        (
            {"lr_schedule": "linear", "warmup_steps": 1},
            lambda k: 0.0 if k < 1 else (5 - k) / 4,
        ),
        ({"lr_schedule": "cosine"}, lambda k: (1 + math.cos(math.pi * k / 5)) / 2),
        ({"weight_decay": 0.4}, lambda k: 1.0),
        ({"max_grad_norm": 0.01}, lambda k: 1.0),
    ],
    ids=["constant", "warm-up", "linear", "cosine", "decay", "clipping"],
)
def test_schedule_decay_and_clipping_are_those_of_the_formulas(
    retrained, tokenizer, asked, rate_at
):
    """Five steps of SGD by hand."""
    given = ASKED | {"optimizer": "sgd", "learning_rate": 0.5, "measure_every": 5} | asked
    found = gf.relearn(retrained, tokenizer, **given, metrics="nll")
    model = copy.deepcopy(retrained)
    chosen = json.loads(found.attrs["relearned_rows"])
    rows = tokenize_rows([FORGET[i] for i in chosen], tokenizer, name="rows").samples
    total = sum(s.answer.n_targets for s in rows)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # of norms, which do not decay
    groups = [
        {"params": matrices, "weight_decay": asked.get("weight_decay", 0.0)},
        {"params": vectors},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    for step in range(5):
        for s in rows:
            one = s.answer
            loss = model(input_ids=one.input_ids[None], labels=one.labels[None]).loss
            (loss * one.n_targets / total).backward()
        if "max_grad_norm" in asked:
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            assert norm > 0.01
            for p in model.parameters():
                p.grad.mul_(0.01 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        nll = [
            float(model(input_ids=s.answer.input_ids[None], labels=s.answer.labels[None]).loss)
            for s in rows
        ]
    of = found.sample_value.sel(model="unlearned", step=5, metric="nll")
    np.testing.assert_allclose(of.isel(sample=found.sample_set == "relearned"), nll, rtol=2e-4)


PUBLISHED = {  # OPTML-Group/Unlearn-Smooth at fc655ba
    "sam-wmdp": {"n_rows": 20, "steps": 15, "lr_schedule": "linear", "warmup_steps": 1, "seed": 1}
    | {"max_length": 512},
    "sam-muse-books": {"n_rows": "all", "steps": 100, "lr_schedule": "cosine", "warmup_steps": 0}
    | {"max_length": 2048},
    "sam-muse-news": {"n_rows": "all", "steps": 150, "lr_schedule": "cosine", "warmup_steps": 0}
    | {"max_length": 2048},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_settings_which_others_override(name):
    found = Relearning(preset=name)
    common = {"batch_size": 4, "optimizer": "adamw_torch", "learning_rate": 1e-5}
    common |= {"weight_decay": 0.0, "max_grad_norm": 1.0}
    for field, value in (PUBLISHED[name] | common).items():
        assert getattr(found, field) == value, field
    points = [s for s in range(found.steps + 1) if s % found.measure_every == 0]
    looked_at = {"sam-wmdp": [15], "sam-muse-books": [50, 75, 100]}
    assert {*looked_at.get(name, [100, 125, 150])} <= {*points}
    other = Relearning(preset=name, learning_rate=3e-4, max_grad_norm=None)
    assert other.learning_rate == 3e-4 and other.max_grad_norm is None
    assert other.steps == found.steps
    # What run.yaml holds is all of them, and means the same.
    assert Relearning(**found.model_dump()) == found
    assert {*PUBLISHED} == {*PRESETS} == {*get_args(Preset)}


def test_without_a_preset_nothing_is_scheduled_or_clipped():
    found = Relearning()
    assert (found.n_rows, found.steps, found.batch_size) == (5, 20, None)
    assert (found.lr_schedule, found.warmup_steps, found.max_grad_norm) == ("constant", 0, None)
    assert (found.weight_decay, found.seed, found.max_length) == (0.0, 0, None)


# ---- what is measured ----


def left_out(suite, tokenizer, model, **more):
    asked = ASKED | {"steps": 1, "measure_every": 1}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GEffectWarning)
        found = gf.relearn(model, tokenizer, **asked, suite=suite, max_new_tokens=8, **more)
    said = [str(w.message) for w in told if str(w.message).startswith("suite ")]
    assert all("\n" not in line for line in said) and len(said) < 2
    return found, (said or [""])[0]


def test_a_suite_is_measured_without_what_needs_other_data(unlearned, retrained, tokenizer):
    found, said = left_out("survey", tokenizer, unlearned)
    assert (
        "min_k (needs hold-out data (--holdout)" in said and "min_k" not in found["metric"].values
    )
    assert "paraphrased_extraction_strength" in found["metric"].values
    assert found.attrs["suite"] == "survey"
    found, said = left_out("survey", tokenizer, unlearned, holdout=OTHERS)
    assert not said and found.value.sel(metric="min_k").notnull().all()
    assert set(found.sample_set.values) == {"relearned", "others"}
    assert sorted(found["sample"].values.tolist()) == [0, 1, 2, 3, 4]
    found, said = left_out("tofu", tokenizer, unlearned)
    assert "forget_quality (needs a model trained without the forget rows (--retrained)" in said
    assert "model_utility (does not read the forget data alone" in said
    found, said = left_out("tofu", tokenizer, unlearned, retrained=retrained)
    assert "forget_quality" not in said
    quality = found.value.sel(metric="forget_quality", step=0, set="others")
    assert float(quality.sel(model="retrained")) == 1.0  # the same as itself


def test_the_note_says_what_is_shown_alone(result, unlearned, tokenizer):
    from rich.console import Console

    from geffect_fast.report.tables.relearn import render_relearning

    def printed(dataset):
        console = Console(width=400, record=True, file=io.StringIO())
        console.print(render_relearning(dataset))
        return console.export_text()

    shown = printed(result)
    assert "others: the forget rows" in shown and "the retrained model" in shown
    assert "Not shown" not in shown
    assert "In brackets" in shown
    alone = result.assign(value_low=result.value_low * math.nan)
    assert "In brackets" not in printed(alone)
    asked = ASKED | {"n_rows": 5, "steps": 9, "measure_every": 1}
    shown = printed(gf.relearn(unlearned, tokenizer, **asked))
    assert "others" not in shown and "retrained" not in shown
    assert "Not shown: 4 of the 10 steps measured; summary.csv" in shown


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
    # Another preset takes the place of the file's settings, but not of options beside it.
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
