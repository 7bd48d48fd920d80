"""`gf.relearn` and `geffect-fast relearn`: the rows that come back after unlearning."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
import xarray as xr
from relearn_rows import ASKED, FORGET, OTHERS, PUBLISHED, ROWS
from report_views import text_of

import geffect_fast as gf
from geffect_fast.data import tokenize_rows
from geffect_fast.errors import GEffectWarning
from geffect_fast.relearn_settings import PRESETS, Preset, Relearning


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
    """The reference is five steps of torch's SGD on transformers' logits, one row at a time."""
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
    """The training takes as many windows as asked; `sample` is a window's number in the data."""
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


# ---- the training ----


def test_all_rows_may_be_trained_on(unlearned, tokenizer):
    """All rows are asked for by a word, or by their number."""
    asked = ASKED | {"n_rows": "all", "steps": 2, "batch_size": 2, "seed": 4}
    found = gf.relearn(unlearned, tokenizer, **asked)
    assert found["set"].values.tolist() == ["relearned"]
    assert found["sample"].values.tolist() == [0, 1, 2, 3, 4]
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
    """The reference takes five steps of SGD by hand."""
    given = ASKED | {"optimizer": "sgd", "learning_rate": 0.5, "measure_every": 5} | asked
    found = gf.relearn(retrained, tokenizer, **given, metrics="nll")
    model = copy.deepcopy(retrained)
    chosen = json.loads(found.attrs["relearned_rows"])
    rows = tokenize_rows([FORGET[i] for i in chosen], tokenizer, name="rows").samples
    total = sum(s.answer.n_targets for s in rows)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # for norms, which do not decay
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
    # run.yaml holds all options, with the same meaning.
    assert Relearning(**found.model_dump()) == found
    assert {*PUBLISHED} == {*PRESETS} == {*get_args(Preset)}


def test_without_a_preset_nothing_is_scheduled_or_clipped():
    found = Relearning()
    assert (found.n_rows, found.steps, found.batch_size) == (5, 20, None)
    assert (found.lr_schedule, found.warmup_steps, found.max_grad_norm) == ("constant", 0, None)
    assert (found.weight_decay, found.seed, found.max_length) == (0.0, 0, None)


# ---- the measurements ----


def left_out(suite, tokenizer, model, **more):
    asked = ASKED | {"steps": 1, "measure_every": 1}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GEffectWarning)
        found = gf.relearn(model, tokenizer, **asked, suite=suite, max_new_tokens=8, **more)
    said = [str(w.message) for w in told if str(w.message).startswith("suite ")]
    assert all("\n" not in line for line in said) and len(said) < 2
    return found, (said or [""])[0]


@pytest.mark.slow
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
    assert float(quality.sel(model="retrained")) == 1.0  # equal to itself


def test_the_note_says_what_is_shown_alone(result, unlearned, tokenizer):
    from geffect_fast.report.tables.measures import render_relearning

    def printed(dataset):
        return text_of(render_relearning(dataset), 400)

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
