"""`gf.unlearn`: probes that do not change the training, whose risks move as predicted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from models import build, samples, with_dropout

import geffect_fast as gf
from geffect_fast.errors import InputError, NonFiniteError
from geffect_fast.measure.models import load_model

DATA = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6], 2, 3)}
OPTIONS = {"steps": 4, "learning_rate": 1e-3, "batch_size": 2, "probe_rows": "all"}


def run(model, objective="ga", **more):
    return gf.unlearn(model, None, **DATA, objective=objective, **(OPTIONS | more))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_weights_equal(model, other):
    for name, p in weights(model).items():
        assert torch.equal(p, other[name]), name


def test_a_probe_is_the_profile_of_the_checkpoint_and_changes_nothing(tmp_path):
    """Dropout is on in training: a probe that drew random numbers would change the masks."""
    objective = "npo(beta=0.5) + kl"
    given = {"probe_every": 2, "accumulation": 2, "scheduler": "linear", "objectives": ["ga"]}

    def fresh():
        return with_dropout(build("gpt2"), 0.3)

    result = run(fresh(), objective, out=tmp_path / "run", keep_checkpoints=True, **given)
    assert result.step.values.tolist() == [0, 2, 4]
    for step in (2, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        expected = gf.profile(
            load_model(folder), None, **DATA, objectives=[objective, "ga"], reference_model=fresh()
        )
        live = result.sel(step=step).drop_vars("step")
        xr.testing.assert_equal(
            live[list(expected.data_vars)].drop_vars(
                ["token", "token_id", "token_text", "sequence"], errors="ignore"
            ),
            expected,
        )
    quiet = fresh()
    run(quiet, objective, **(given | {"probe_every": 4, "objectives": []}))
    assert_weights_equal(load_model(tmp_path / "run" / "model"), weights(quiet))


def test_the_changes_are_those_predicted_and_plain_descent_by_the_effect_alone():
    model = build("llama", torch.float64)
    before = weights(model)
    result = run(
        model,
        "wga(alpha=0.5) + gd",
        optimizer="sgd",
        learning_rate=1e-5,
        batch_size=5,
        retain_batch_size=3,
        scheduler="linear",
        warmup_steps=2,
    )
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert result.learning_rate.values[1:].tolist() == [0.0, 5e-6, 1e-5, 5e-6]
    later = result.isel(step=slice(2, None))
    assert (np.abs(later.measured_change) > 1e-9).all()
    np.testing.assert_allclose(later.predicted_sgd, later.predicted_update, rtol=1e-6)
    np.testing.assert_allclose(later.predicted_update, later.measured_change, rtol=1e-2)
    assert result.attrs["trained_objective"] == "wga(alpha=0.5) + gd"
    assert result.attrs["command"] == "unlearn"


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor"])
def test_any_optimizer_is_predicted_by_its_update(optimizer):
    model = build("llama", torch.float64)
    result = run(model, "ga", optimizer=optimizer, learning_rate=1e-6, batch_size=5)
    later = result.isel(step=slice(1, None))
    assert (later.measured_change.sel(risk="unlearn") > 0).all()
    np.testing.assert_allclose(later.predicted_update, later.measured_change, rtol=2e-2, atol=1e-9)


def test_bf16_autocast_trains_otherwise_and_is_measured_as_ever():
    plain, mixed = build("llama"), build("llama")
    expected = run(plain, steps=1)
    found = run(mixed, steps=1, precision="bf16")
    xr.testing.assert_equal(found.isel(step=0).drop_attrs(), expected.isel(step=0).drop_attrs())
    moved = torch.cat([p.flatten() for p in weights(mixed).values()])
    exact = torch.cat([p.flatten() for p in weights(plain).values()])
    assert not torch.equal(moved, exact)
    assert float((moved - exact).abs().max()) <= 2.1e-3  # Adam's first step is of the size of lr
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    ids = {"input_ids": torch.arange(6)[None]}
    logits = mixed(**ids).logits
    fresh = build("llama")
    fresh.load_state_dict(mixed.state_dict())
    assert torch.equal(logits, fresh(**ids).logits)  # its forward holds no autocast
    assert mixed.config.use_cache == fresh.config.use_cache


def test_gradient_checkpointing_changes_no_number():
    plain, checkpointed = build("llama"), build("llama")
    expected = run(plain, "npo(beta=0.5) + kl")
    found = run(checkpointed, "npo(beta=0.5) + kl", checkpointing=True)
    xr.testing.assert_allclose(found.drop_attrs(), expected.drop_attrs(), rtol=1e-5)


def test_lora_trains_the_adapter_alone_against_the_model_as_it_was(tmp_path):
    model = build("llama")
    before = weights(model)
    out = tmp_path / "run"
    result = run(
        model, "npo(beta=0.5) + kl", lora_rank=2, lora_dropout=0.2, learning_rate=1e-2, out=out
    )
    assert all("lora_" in name for name in result.parameter.values)
    assert abs(result.measured_change.isel(step=-1)).min() > 1e-5
    kept = [n for n, p in model.named_parameters() if "lora_" not in n]
    named = dict(model.named_parameters())
    assert len(kept) == len(before)
    for name in kept:
        assert torch.equal(named[name], before[name.replace(".base_layer", "")])
    assert (out / "model" / "adapter_model.safetensors").exists()


def test_default_rows_cost_at_most_one_training_step_and_are_those_of_other_objectives():
    forget = samples([55, 63, 51, 58, 54, 57, 52, 60] * 5, 1, 3)
    retain = samples([55, 60, 52] * 10, 2, 3)
    found = [
        gf.unlearn(build("llama"), None, forget=forget, retain=retain, objective=each, steps=1)
        for each in ("npo + kl", "ga", "gd")
    ]
    result = found[0]
    assert len({other.attrs["probe_rows"] for other in found}) == 1
    assert all(0.4 < other.attrs["probe_cost"] <= 1 for other in found)
    rows = json.loads(result.attrs["probe_rows"])
    assert len(rows["forget"]) == len(rows["retain"]) >= 3
    gaps = np.diff(rows["forget"])
    assert gaps.max() - gaps.min() <= 1
    assert result.sample.values.tolist() == [*rows["forget"], *rows["retain"]]
    assert json.loads(result.attrs["training"])["batch_size"] == 32


def test_without_retain_rows_none_are_drawn(monkeypatch):
    from geffect_fast.training import trainer as training

    seen = []
    step = training.UnlearnTrainer.training_step
    monkeypatch.setattr(
        training.UnlearnTrainer,
        "training_step",
        lambda self, model, rows, *a: seen.append(dict(rows)) or step(self, model, rows, *a),
    )
    run(build("llama"), "ga", steps=2)
    run(build("llama"), "gd", steps=2, retain_batch_size=1)
    assert [{name: len(rows) for name, rows in each.items()} for each in seen] == [
        *[{"forget": 2}] * 2,
        *[{"forget": 2, "retain": 1}] * 2,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6}, "batch_size: 6 is more than the 5 rows of forget"),
        ({"batch_size": 2, "accumulation": 3}, "batch_size: 2 times 3 is more than the 5 rows"),
        ({"steps": 0}, "steps: should be greater than 0, got 0"),
        ({"step": 5}, "unknown field 'step'; did you mean 'steps'?"),
        ({"objectives": ["ga"]}, "objectives: 'ga' is the same as 'ga'; give it once"),
        ({"lora_rank": 2, "lora_targets": ["nowhere"]}, "has no nowhere to adapt"),
    ],
)
def test_wrong_arguments_cost_one_line_and_change_nothing(change, message, tmp_path):
    model = build("llama")
    before = weights(model)
    with pytest.raises(InputError, match=message):
        run(model, **change, out=tmp_path / "run")
    assert_weights_equal(model, before)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_blows_up_says_where_and_keeps_what_it_has(tmp_path):
    with pytest.raises(NonFiniteError, match=r"^step \d: .*try a smaller"):
        run(build("llama"), learning_rate=1e30, optimizer="sgd", out=tmp_path / "run")
    steps = sorted(path.name for path in (tmp_path / "run" / "steps").iterdir())
    assert steps[0] == "step-00000000.nc"
    assert not (tmp_path / "run" / "results.nc").exists()
