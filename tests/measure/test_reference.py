"""A reference that is the model itself shows in a warning, an attribute, the table and the page."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import peft
import pytest
import torch
from models import build, samples
from report_views import words_of

import geffect_fast as gf
from geffect_fast.errors import GEffectWarning
from geffect_fast.report.html.page import page_html
from geffect_fast.report.summary.sweep import Swept
from geffect_fast.report.tables.profile import render_profile
from geffect_fast.report.tables.sweep import render_sweep

SETS = {"forget": samples([9, 7, 11], 1), "retain": samples([8, 10], 2)}


@pytest.fixture(scope="module")
def model():
    return build("llama", dtype=torch.float64)


def other(model):
    moved = copy.deepcopy(model)
    with torch.no_grad():
        next(moved.parameters()).mul_(1.1)
    return moved


def with_adapter(model, seed=0, scale=0.0):
    """A LoRA around a copy of the model; with B = 0 its outputs are the model's."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.3)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.full_like(parameter, scale))
    return wrapped


def sets_for(objective):
    if objective != "dpo":
        return SETS
    rows = zip(SETS["forget"], samples([5, 5, 5], 9), strict=True)
    return SETS | {"forget": [row | {"alternative": refused} for row, refused in rows]}


ENGINES = ("reverse", "forward")
COMPARING = ("npo(beta=0.5)", "ga + kl", "dpo")
KINDS = ("new adapter", "other A", "same adapter", "saved adapter")


@pytest.mark.parametrize(
    ("kind", "objective", "engine"),  # every kind with every objective
    [(k, o, ENGINES[(i + j) % 2]) for i, k in enumerate(KINDS) for j, o in enumerate(COMPARING)],
)
def test_models_that_compute_the_same_are_one(kind, objective, engine, model, tmp_path):
    trained = 0.1 if kind in ("same adapter", "saved adapter") else 0.0
    reference = model
    if kind != "new adapter":
        reference = with_adapter(model, seed=kind == "other A", scale=trained)
    if kind == "saved adapter":
        model.save_pretrained(tmp_path / "base")
        reference.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        reference.save_pretrained(tmp_path / "adapter")
        reference = tmp_path / "adapter"
    options = {"objectives": [objective], "engine": engine, "resolve": ("sample",)}
    options |= sets_for(objective) | {"reference_model": reference}
    with pytest.warns(GEffectWarning, match="reference: the model itself"):
        result = gf.profile(with_adapter(model, scale=trained), None, **options)
    assert result.attrs["reference_is_model"] == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", COMPARING)
def test_a_model_that_computes_a_little_else_is_another(objective, engine, model):
    options = {"objectives": [objective], "engine": engine, "resolve": ("sample",)}
    options |= sets_for(objective) | {"reference_model": model}
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        result = gf.profile(with_adapter(model, scale=1e-9), None, **options)
    assert "reference_is_model" not in result.attrs


def test_a_reference_that_is_another_on_one_row_alone_is_another(model):
    """The reference's embeddings differ for tokens of the last row only."""
    reference, last = copy.deepcopy(model), set(SETS["forget"][-1]["input_ids"])
    new = min(last - {t for row in SETS["forget"][:-1] for t in row["input_ids"]})
    with torch.no_grad():
        reference.get_input_embeddings().weight[new] *= 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        gf.profile(model, None, **SETS, objectives=["npo"], reference_model=reference)
    one = SETS | {"forget": SETS["forget"][:-1]}
    with pytest.warns(GEffectWarning, match="reference: the model itself"):
        gf.profile(model, None, **one, objectives=["npo"], reference_model=reference)


def given(kind, model, tmp_path):
    if kind != "folder":
        return {"none": None, "itself": model, "copy": copy.deepcopy(model)}[kind]
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "objective"),
    [("none", "npo"), ("itself", "ga + kl"), ("copy", "npo"), ("folder", "ga + kl")],
)
def test_a_reference_that_is_the_model_is_said(kind, objective, model, tmp_path):
    with pytest.warns(GEffectWarning, match="reference: the model itself"):
        result = gf.profile(
            model,
            None,
            **SETS,
            objectives=[objective],
            reference_model=given(kind, model, tmp_path),
        )
    assert result.attrs["reference_is_model"] == 1
    assert "Reference: the model itself" in words_of(render_profile(result))
    if kind == "none":
        assert "Reference: the model itself" in page_html({"run": result})


def test_another_reference_and_objectives_without_one_are_not_warned_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        compared = gf.profile(model, None, **SETS, objectives=["npo"], reference_model=other(model))
        alone = gf.profile(model, None, **SETS, objectives=["ga", "simnpo"])
    for result in (compared, alone):
        assert "reference_is_model" not in result.attrs
        assert "Reference" not in words_of(render_profile(result))


def test_over_the_steps_of_a_training_it_is_the_beginning(model):
    """The reference is the model before training by design, which is no reason for a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        result = gf.unlearn(
            copy.deepcopy(model), None, **SETS, objective="npo", steps=1, resolve=("sample",)
        )
    assert "reference_is_model" not in result.attrs


def test_a_sweep_without_reference_is_one_point(model):
    objectives = ["npo(beta=0.01:4:12,log)", "ga"]
    with pytest.warns(GEffectWarning, match="the model itself"):
        same = gf.sweep(model, None, **SETS, objectives=objectives)
    assert set(same.same_as.values) == {"npo(beta=0.01)", "ga"}
    assert same.pareto.sum() <= 2 and not same.pareto[1:12].any()
    assert "(the same: npo(beta=0.0172405), " in Swept.of(same).label(0)
    assert "Reference: the model itself" in words_of(render_sweep(same))
    apart = gf.sweep(model, None, **SETS, objectives=objectives, reference_model=other(model))
    np.testing.assert_array_equal(apart.same_as, apart.objective)
