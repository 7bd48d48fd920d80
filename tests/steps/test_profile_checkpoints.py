"""Profiles of saved checkpoints: each is the checkpoint's `profile`, and a stopped run resumes."""

from __future__ import annotations

import json
from shutil import copytree

import pytest
import torch
import xarray as xr
from models import build, samples

import geffect_fast as gf
from geffect_fast.errors import (
    GEffectWarning,
    InputError,
    InterruptedRunError,
    NonFiniteError,
    UnfinishedError,
)
from geffect_fast.measure.models import load_model
from geffect_fast.paths import find_checkpoints
from geffect_fast.steps.probe import Probe

DATA = {"forget": samples([5, 9, 3], 1), "retain": samples([7, 4], 2)}
GIVEN = DATA | {
    "objectives": ["ga", "npo(beta=0.5) + kl"],
    "token_budget": 64,
    "resolve": ("group",),
}
STEPS = (0, 5, 120)


def moved(model, scale):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def saved(folder, architecture="llama", steps=STEPS):
    """Checkpoints of a model that drifts."""
    model = build(architecture)
    for number, step in enumerate(steps):
        moved(model, 0.02 * number).save_pretrained(folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def whole(out):
    return gf.profile_checkpoints(out / "checkpoint-*", None, **GIVEN)


def unnamed(dataset):
    return dataset.drop_attrs(deep=False)


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "mixtral"])
def test_every_step_is_the_profile_of_its_checkpoint(architecture, tmp_path):
    saved(tmp_path, architecture, (9, 10))
    found = gf.profile_checkpoints(tmp_path / "checkpoint-*", None, **GIVEN)
    assert found.step.values.tolist() == [9, 10]
    first = load_model(tmp_path / "checkpoint-9", device="cpu")
    for step in (9, 10):
        model = load_model(tmp_path / f"checkpoint-{step}", device="cpu")
        expected = gf.profile(model, None, **GIVEN, reference_model=first)
        own = found.sel(step=step).drop_vars("step")[list(expected.data_vars)]
        xr.testing.assert_identical(unnamed(own), unnamed(expected))
    assert float(abs(found.risk_value.diff("step")).min()) > 1e-3


def test_what_the_step_axis_adds(whole, out):
    xr.testing.assert_allclose(
        whole.measured_change.isel(step=slice(1, None)),
        whole.risk_value.diff("step").transpose("step", "risk"),
        rtol=1e-12,
    )
    for name in ("measured_change", "predicted_update"):
        assert whole[name].isel(step=0).isnull().all()
        assert whole[name].isel(step=slice(1, None)).notnull().all()
    assert whole.predicted_sgd.isnull().all() and whole.learning_rate.isnull().all()
    assert whole.attrs["command"] == "profile"
    assert json.loads(whole.attrs["checkpoints"]) == [str(out / f"checkpoint-{n}") for n in STEPS]


def test_the_model_before_training_is_step_0(out, whole, tmp_path):
    copytree(out / "checkpoint-0", tmp_path / "base")
    given = GIVEN | {"model": tmp_path / "base"}
    found = gf.profile_checkpoints([out / "checkpoint-120", out / "checkpoint-5"], None, **given)
    xr.testing.assert_identical(unnamed(found), unnamed(whole))


def test_adapters_are_profiled_on_their_base(out, tmp_path):
    peft = pytest.importorskip("peft")
    base = load_model(out / "checkpoint-0", device="cpu")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(base, config)
    for number, step in enumerate((1, 2)):
        moved(model, 0.3 * (number + 1)).save_pretrained(tmp_path / f"checkpoint-{step}")
    found = gf.profile_checkpoints(tmp_path / "checkpoint-*", None, **GIVEN)
    first = load_model(tmp_path / "checkpoint-1", device="cpu")
    for step in (1, 2):
        one = load_model(tmp_path / f"checkpoint-{step}", device="cpu")
        expected = gf.profile(one, None, **GIVEN, reference_model=first)
        own = found.sel(step=step).drop_vars("step")[list(expected.data_vars)]
        xr.testing.assert_identical(unnamed(own), unnamed(expected))


def test_a_run_that_was_interrupted_goes_on_with_nothing_computed_twice(
    out, whole, tmp_path, monkeypatch
):
    after = 2
    plain, calls = Probe.measure_at, []

    def stopping(self, step, **more):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(step)
        return plain(self, step, **more)

    monkeypatch.setattr(Probe, "measure_at", stopping)
    with pytest.raises(InterruptedRunError) as caught:
        gf.profile_checkpoints(out / "checkpoint-*", None, **GIVEN, out=tmp_path / "run")
    line = f"interrupted; what was measured to step {STEPS[after - 1]} is kept: go on with --resume"
    assert str(caught.value).startswith(line) and caught.value.exit_code == 130
    monkeypatch.undo()
    from geffect_fast.measure.profiler import Profiler

    measured, measure = [], Profiler.measure
    monkeypatch.setattr(
        Profiler, "measure", lambda self, **more: measured.append(0) or measure(self, **more)
    )
    with pytest.raises(InputError, match="already holds steps; go on with --resume"):
        gf.profile_checkpoints(out / "checkpoint-*", None, **GIVEN, out=tmp_path / "run")
    again = gf.profile_checkpoints(
        out / "checkpoint-*", None, **GIVEN, out=tmp_path / "run", resume=True
    )
    assert len(measured) == len(STEPS) - after
    xr.testing.assert_identical(unnamed(again), unnamed(whole))
    xr.testing.assert_identical(gf.open_run(tmp_path / "run"), again)
    with pytest.raises(InputError, match="is complete, there is nothing to resume"):
        gf.profile_checkpoints(
            out / "checkpoint-*", None, **GIVEN, out=tmp_path / "run", resume=True
        )


def test_one_step_that_is_lost_is_measured_again(out, whole, tmp_path):
    given = GIVEN | {"out": tmp_path / "run"}
    gf.profile_checkpoints(out / "checkpoint-*", None, **given)
    (tmp_path / "run/results.nc").unlink()
    (tmp_path / "run/steps/step-00000005.nc").unlink()
    (tmp_path / "run/steps/notes.txt").write_text("mine")
    with pytest.warns(GEffectWarning, match=r"notes\.txt is no step file; it is left alone"):
        again = gf.profile_checkpoints(out / "checkpoint-*", None, **given, resume=True)
    xr.testing.assert_identical(unnamed(again), unnamed(whole))


def test_a_disk_that_is_full_at_the_end_keeps_all_steps(out, whole, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("geffect_fast.storage.step_folder.write_dataset", full)
    given = GIVEN | {"out": tmp_path / "run"}
    with pytest.raises(UnfinishedError, match=r"No space left on device; all steps are kept"):
        gf.profile_checkpoints(out / "checkpoint-*", None, **given)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"manifest.json", "steps"}
    monkeypatch.undo()
    again = gf.profile_checkpoints(out / "checkpoint-*", None, **given, resume=True)
    xr.testing.assert_identical(unnamed(again), unnamed(whole))


# ---- the choice of folders ----


def test_checkpoints_are_numbered_by_name_or_by_their_state(tmp_path):
    for name in ("checkpoint-10", "step_9", "last"):
        (tmp_path / name).mkdir()
    (tmp_path / "last/trainer_state.json").write_text('{"global_step": 11}')
    found = find_checkpoints([tmp_path / "l*", str(tmp_path / "checkpoint-10"), tmp_path / "s*"])
    names = {step: path.name for step, path in found.items()}
    assert list(names.items()) == [(9, "step_9"), (10, "checkpoint-10"), (11, "last")]


def test_a_checkpoint_of_another_architecture_is_named_with_the_tensor(out, tmp_path):
    for step in (0, 5):
        load_model(out / f"checkpoint-{step}").save_pretrained(tmp_path / f"checkpoint-{step}")
    build("llama_tied").save_pretrained(tmp_path / "checkpoint-7")
    with pytest.raises(InputError) as caught:
        gf.profile_checkpoints(tmp_path / "checkpoint-*", None, **GIVEN)
    assert f"checkpoint {tmp_path / 'checkpoint-7'}" in str(caught.value)


def test_a_setting_that_changes_the_numbers_is_named(out, tmp_path):
    for step in (0, 5):
        model = load_model(out / f"checkpoint-{step}")
        model.config.rms_norm_eps = 1e-5 * (1 + step)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(InputError, match=r"rms_norm_eps of its config is .* profile models that"):
        gf.profile_checkpoints(tmp_path / "checkpoint-*", None, **GIVEN)


def test_a_weight_that_is_nan_is_named_with_its_checkpoint(out, tmp_path):
    for step in (0, 5):
        model = load_model(out / f"checkpoint-{step}")
        with torch.no_grad():
            model.lm_head.weight[0, 0] = torch.nan if step else 0
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(NonFiniteError, match=r"checkpoint-5: lm_head\.weight holds 1 NaN"):
        gf.profile_checkpoints(tmp_path / "checkpoint-*", None, **GIVEN)
