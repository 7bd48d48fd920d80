"""The callback in a plain Trainer: its probes are those of a profile.

The training is as without the callback.
"""

from __future__ import annotations

import copy

import pytest
import torch
import xarray as xr
from interrupted import StopAtThree
from models import build, collated, samples
from transformers import Trainer, TrainerCallback, TrainingArguments

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model

FORGET, RETAIN, OTHER = samples([5, 9, 3], 1), samples([7, 4], 2), samples([6], 3)
DATA = {"forget": FORGET, "retain": RETAIN, "general": OTHER}
OBJECTIVES = ["ga", "npo(beta=0.5) + kl"]
TRAINED_ON = samples([6] * 6, 4)


def dropping(p=0.3):
    """A Llama that drops activations in training."""
    model = build("llama")
    model.config.attention_dropout = p
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = p
    return model


def arguments(folder, **more):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 5,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        | more
    )


def trainer(model, folder, *callbacks, **more):
    return Trainer(
        model,
        arguments(folder, **more),
        train_dataset=TRAINED_ON,
        data_collator=collated,
        callbacks=list(callbacks),
    )


def callback(every=2, **more):
    options = {"objectives": OBJECTIVES, "token_budget": 64, "resolve": ("group", "sample")}
    return gf.integrations.GEffectCallback(DATA, every, **options | more)


def profile_of(model, reference):
    data = {"forget": FORGET, "retain": RETAIN, "probes": {"general": OTHER}}
    return gf.profile(
        model,
        None,
        **data,
        objectives=OBJECTIVES,
        reference_model=reference,
        token_budget=64,
        resolve=("group", "sample"),
    )


def same(step, profile):
    """Check that a step of the callback's result is the profile, bit for bit."""
    xr.testing.assert_identical(
        step[list(profile.data_vars)].drop_vars(("step", "token_id", "sequence"), errors="ignore"),
        profile.drop_attrs(deep=False),
    )


def test_a_step_is_the_profile_of_the_checkpoint_saved_there(tmp_path):
    model = build("llama")
    start, probe = copy.deepcopy(model), callback()
    trainer(model, tmp_path, probe, save_strategy="steps", save_steps=2).train()
    found = probe.result
    assert found.step.values.tolist() == [0, 2, 4, 5]
    assert found.risk.values.tolist() == ["unlearn", "retain", "general"]
    steps = {0: start, 2: tmp_path / "checkpoint-2", 4: tmp_path / "checkpoint-4", 5: model.eval()}
    for step, at in steps.items():
        saved = at if isinstance(at, torch.nn.Module) else load_model(at, device="cpu")
        expected = profile_of(saved, start)
        same(found.sel(step=step).drop_attrs(deep=False), expected)
    assert float(abs(found.risk_value.diff("step")).min()) > 1e-4
    # A linear schedule after two updates of warming up: 0, 1/2, 1, 2/3, 1/3 of the peak.
    assert found.learning_rate.values[1:] == pytest.approx([0.5e-2, 2e-2 / 3, 1e-2 / 3])


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "optim": "sgd", "neftune_noise_alpha": 5.0},
    ],
    ids=["bf16", "checkpointing"],
)
def test_training_is_the_same_with_and_without(tmp_path, more):
    model = dropping()
    start, probe, more = copy.deepcopy(model), callback(), more | {"max_steps": 3}
    without = copy.deepcopy(model)
    trainer(without, tmp_path, **more).train()
    trainer(model, tmp_path, probe, **more).train()
    assert probe.result.step.values.tolist() == [0, 2, 3]
    for (name, p), q in zip(model.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q), name
    moved = [torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    assert not all(moved)
    at_rest = dropping()  # accelerate leaves its autocast in the forward of the trained model
    at_rest.load_state_dict(model.state_dict())
    same(probe.result.sel(step=3).drop_attrs(deep=False), profile_of(at_rest, start))


class Peek(TrainerCallback):
    """A callback that notes state a probe might change, before and after the probe."""

    def __init__(self):
        self.seen = []

    def state(self, model):
        return (
            torch.get_rng_state().tolist(),
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            vars(model).get("forward"),
        )

    def on_step_end(self, args, state, control, **kwargs):
        model = kwargs["model"]
        for p in model.parameters():
            if p.grad is None and p.requires_grad:
                p.grad = torch.ones_like(p)
        self.seen.append(self.state(model))


def test_the_model_is_left_as_it_was_found(tmp_path):
    model = dropping()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, after = Peek(), Peek()
    trainer(model, tmp_path, before, callback(every=1), after, bf16=True, max_steps=2).train()
    assert len(before.seen) == 2
    for one, other in zip(before.seen, after.seen, strict=True):
        assert one[:3] == other[:3] and one[4:] == other[4:]
        assert all(
            g is h is None or torch.equal(g, h) for g, h in zip(one[3], other[3], strict=True)
        )


def test_an_interrupted_training_goes_on_where_it_ended(tmp_path, monkeypatch):
    model = dropping()
    start = copy.deepcopy(model)
    save = {"save_strategy": "steps", "save_steps": 2}
    whole = callback()
    trainer(copy.deepcopy(model), tmp_path / "whole", whole, **save).train()

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    more = {"out": tmp_path / "out", "reference_model": start}
    with pytest.raises(KeyboardInterrupt):
        trainer(copy.deepcopy(model), tmp_path, callback(**more), Killed(), **save).train()
    names = sorted(file.name for file in (tmp_path / "out/steps").iterdir())
    assert names == [f"step-0000000{n}.nc" for n in (0, 2, 4)]
    measured = []
    from geffect_fast.measure.profiler import Profiler

    plain = Profiler.measure
    monkeypatch.setattr(
        Profiler, "measure", lambda self, **k: measured.append(0) or plain(self, **k)
    )
    again = callback(**more)
    run = trainer(copy.deepcopy(model), tmp_path, again, **save)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(measured) == 1, "step 5 alone"
    xr.testing.assert_identical(
        again.result.drop_attrs(deep=False), whole.result.drop_attrs(deep=False)
    )
    xr.testing.assert_identical(
        gf.open_run(tmp_path / "out").drop_attrs(deep=False), again.result.drop_attrs(deep=False)
    )


def test_a_training_that_is_stopped_early_ends_with_a_probe(tmp_path):
    probe = callback(objectives="ga")
    trainer(build("llama"), tmp_path, StopAtThree(), probe, max_steps=9).train()
    assert probe.result.step.values.tolist() == [0, 2, 3]


def test_plain_gradient_descent_on_the_probed_data_is_what_its_effect_predicts(tmp_path):
    class Ascent(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return -super().compute_loss(model, inputs, return_outputs, None)

    rows, model = samples([6, 6, 6], 5), build("llama")
    sets = {"forget": rows, "retain": RETAIN}
    probe = gf.integrations.GEffectCallback(sets, 2, objectives=["ga"], trained="ga")
    more = {"optim": "sgd", "learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    more |= {"warmup_steps": 0, "max_grad_norm": 0, "per_device_train_batch_size": 3}
    Ascent(
        model,
        arguments(tmp_path, **more),
        train_dataset=rows,
        data_collator=collated,
        callbacks=[probe],
    ).train()
    found = probe.result.isel(step=slice(1, None))
    assert probe.result.attrs["trained_objective"] == "ga"
    assert found.predicted_sgd.values == pytest.approx(found.predicted_update.values, rel=2e-2)
    assert found.predicted_update.values == pytest.approx(found.measured_change.values, rel=2e-2)
    assert (found.measured_change.sel(risk="unlearn") > 0).all()


# ---- refusals when training begins ----


def begins(tmp_path, probe, **more):
    run = trainer(build("llama"), tmp_path, probe, **more)
    with pytest.raises(InputError) as caught:
        run.train()
    return str(caught.value)


def test_a_new_training_takes_no_steps_of_another(tmp_path):
    def probe():
        return callback(out=tmp_path / "out", objectives="ga")

    trainer(build("llama"), tmp_path, probe(), max_steps=1).train()
    with pytest.raises(InputError, match="already holds results"):
        probe()
    (tmp_path / "out/results.nc").unlink()
    line = begins(tmp_path, probe(), max_steps=1)
    assert "holds steps of an earlier run" in line and "resume from a checkpoint" in line
    line = begins(tmp_path, probe(), max_steps=1, learning_rate=1e-3)
    assert "is a step of another run" in line and "move the file away" in line


def test_the_reference_of_a_resumed_training_must_be_given(tmp_path):
    trainer(build("llama"), tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    run = trainer(build("llama"), tmp_path, callback())
    with pytest.raises(InputError, match="reference_model: is missing; give the folder"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
