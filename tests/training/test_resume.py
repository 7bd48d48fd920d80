"""Killed, out of disk, or stopped by Ctrl-C, a run resumes to the very same numbers."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
import xarray as xr
from bad_input.case import largest_file
from killed import killed
from safetensors.torch import load_file

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.demo import save
from geffect_fast.errors import InputError, InterruptedRunError, UnfinishedError
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.measure.profiler import Profiler
from geffect_fast.storage.disk import UNFINISHED
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import UnlearnConfig

MOMENTS = [
    ("os.rename", ".run.yaml"),
    ("os.rename", ".manifest.json"),
    ("open", "steps/.step-00000000.nc", 2),  # written, but for its checksum
    ("os.rename", "steps/.step-00000002.nc"),
    ("open", ".unfinished-checkpoint/checkpoint-2/geffect_fast.json"),
    ("os.rename", ".unfinished-checkpoint/checkpoint-2"),
    ("shutil.rmtree", ".unfinished-checkpoint"),
    ("os.rename", ".unfinished-checkpoint/checkpoint-4"),
    ("os.rename", ".unfinished-checkpoint-2"),
    ("open", ".unfinished-", 6),  # amid the files of the result
    ("os.rename", ".replaced-"),
    ("os.rename", "model/adapter_model.safetensors"),
    ("os.rename", ".replaced-", 3),
    ("os.rename", ".unfinished-checkpoint-4"),
    ("os.remove", ".lock"),
]
"""Changes of the disk that a run does not live to see, in the order of a run."""
PART = "steps/.step-00000002.nc.part"


@pytest.fixture(scope="module")
def config(study):
    """Dropout, a schedule, an optimizer with a state, and rows drawn anew: all must be restored."""
    return checked_config(
        UnlearnConfig,
        {
            **{name: str(study / name) for name in ("model",)},
            **{name: str(study / f"{name}.jsonl") for name in ("forget", "retain")},
            **{"objective": "npo(beta=0.1) + kl", "steps": 4, "probe_every": 2, "batch_size": 3},
            **{"learning_rate": 1e-3, "scheduler": "cosine", "lora_rank": 2, "lora_dropout": 0.3},
            **{"threads": 1, "resolve": ["sample"]},
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    execute_unlearn(config, folder)
    return folder


@pytest.fixture(scope="module")
def again(whole, tmp_path_factory):
    """The folder of a run from `run.yaml`."""
    folder = tmp_path_factory.mktemp("again") / "run"
    execute_unlearn(load_config(whole / "run.yaml"), folder)
    return folder


def assert_same_run(folder, whole):
    found, expected = gf.open_run(folder), gf.open_run(whole)
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    for each in (found, expected):
        del each.attrs["created"]
    assert found.attrs == expected.attrs
    name = "model/adapter_model.safetensors"
    ours, theirs = load_file(folder / name), load_file(whole / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    left = {path.name for path in folder.iterdir()}
    assert left == {"run.yaml", "results.nc", "cost.json", "steps", "model", "manifest.json"}


def go_on(config, folder, **more):
    resume = (folder / "run.yaml").exists()
    try:
        return execute_unlearn(config, folder, resume=resume, **more)
    except InputError as error:  # killed after the last file
        assert "is complete, there is nothing to resume" in str(error)


@pytest.mark.slow
def test_killed_before_each_kind_of_change_a_run_ends_with_the_same_numbers(
    config, whole, tmp_path
):
    folder = tmp_path / "run"
    for moment in MOMENTS:
        assert killed(partial(go_on, config), folder, *moment), moment
    go_on(config, folder)
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 2])
def test_a_checkpoint_half_removed_is_none_and_goes(config, whole, tmp_path, nth):
    """The kill comes after the files are gone and before the folder, of the first or last one."""
    folder = tmp_path / "run"
    removed = f"{UNFINISHED}checkpoint-"
    assert killed(partial(go_on, config), folder, "os.rmdir", removed, nth)
    assert any(path.name.startswith(UNFINISHED) for path in folder.iterdir())
    go_on(config, folder)
    assert_same_run(folder, whole)


def test_killed_behind_its_result_a_run_is_complete_and_its_checkpoints_go(config, tmp_path):
    folder = tmp_path / "run"
    execute_unlearn(config.model_copy(update={"keep_checkpoints": True}), folder)
    saved = folder / "run.yaml"
    text = saved.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="is complete"):
        execute_unlearn(config, folder, resume=True)
    assert len([*folder.glob("checkpoint-*")]) == 2
    saved.write_text(text.replace("keep_checkpoints: true", "keep_checkpoints: false"))
    with pytest.raises(InputError, match="is complete"):
        execute_unlearn(config, folder, resume=True)
    assert not [*folder.glob("checkpoint-*")]


class _Measured:
    """A counter of measurements that interrupts after a given one."""

    def __init__(self, monkeypatch, stop_at=None):
        self.count, self.stop_at = 0, stop_at
        measure = Profiler.measure

        def counted(profiler, **more):
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            return measure(profiler, **more)

        monkeypatch.setattr(Profiler, "measure", counted)


@pytest.mark.parametrize("stop_at", [3])
def test_ctrl_c_keeps_the_steps_and_says_how_to_go_on(
    config, whole, tmp_path, monkeypatch, stop_at
):
    folder = tmp_path / "run"
    measured = _Measured(monkeypatch, stop_at)
    with pytest.raises(InterruptedRunError) as caught:
        execute_unlearn(config, folder)
    assert caught.value.exit_code == 130
    assert f"--resume --out {folder}" in str(caught.value)
    execute_unlearn(config, folder, resume=True)
    assert measured.count == 3 + 1  # none twice but the interrupted one
    assert_same_run(folder, whole)


def test_what_a_killed_process_left_half_written_goes(config, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "results.nc").unlink()
    for left in (
        *(f"{UNFINISHED}{name}" for name in ("checkpoint/checkpoint-2", "model", "abc")),
        PART,
    ):
        (folder / left).touch() if left is PART else (folder / left).mkdir(parents=True)
    execute_unlearn(config, folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_rarer_checkpoints_train_again_what_they_miss_and_measure_it_once(
    config, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    rarer = config.model_copy(update={"save_every": 4})
    measured = _Measured(monkeypatch, 3)
    with pytest.raises(InterruptedRunError):
        execute_unlearn(rarer, folder)
    assert not list(folder.glob("checkpoint-*"))
    execute_unlearn(rarer, folder, resume=True)
    assert measured.count == 3 + 1
    assert load_config(folder / "run.yaml").save_every == 4
    found, expected = gf.open_run(folder), gf.open_run(whole)
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))


@pytest.mark.parametrize("full_at", ["checkpoint", "result"])
def test_a_full_disk_keeps_what_was_written(config, whole, tmp_path, full_at):
    folder = tmp_path / "run"
    sizes = [path.stat().st_size for path in (whole / "steps").iterdir()]
    if full_at == "checkpoint":  # larger than a step: the optimizer's state
        config = config.model_copy(update={"lora_rank": 64})
        shutil.rmtree(folder, ignore_errors=True)
    limit = max(sizes) + 4000
    with largest_file(limit), pytest.raises(UnfinishedError) as caught:
        execute_unlearn(config, folder)
    assert caught.value.exit_code == 3 and "go on with --resume" in str(caught.value)
    kept = sorted(path.name for path in (folder / "steps").iterdir())
    assert kept[:2] == ["step-00000000.nc", "step-00000002.nc"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    if full_at == "result":
        execute_unlearn(config, folder, resume=True)
        assert_same_run(folder, whole)


def test_run_yaml_replays_the_run_bitwise(whole, again):
    assert_same_run(again, whole)


def test_what_cannot_be_resumed_is_said_and_nothing_is_touched(config, whole, tmp_path):
    for change, message in [
        ({"steps": 8}, "resume: steps is 8, and the run in .* was begun with 4"),
        ({"learning_rate": 1.0}, "resume: learning_rate is 1.0"),
        ({}, "is complete, there is nothing to resume"),
    ]:
        folder = shutil.copytree(whole, tmp_path / "copy")
        if change:
            (folder / "results.nc").unlink()
        before = sorted(folder.rglob("*"))
        with pytest.raises(InputError, match=message):
            execute_unlearn(config.model_copy(update=change), folder, resume=True)
        assert sorted(folder.rglob("*")) == before
        shutil.rmtree(folder)


def test_steps_of_other_data_are_not_gone_on_with(config, tmp_path, whole, study):
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "model")
    (folder / "results.nc").unlink()
    rows = (study / "forget.jsonl").read_text().splitlines()
    changed = tmp_path / "forget.jsonl"
    changed.write_text("\n".join([*rows[1:], rows[0]]))
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace(str(study / "forget.jsonl"), str(changed)))
    with pytest.raises(InputError, match="the rows of forget are other tokens"):
        execute_unlearn(load_config(folder / "run.yaml"), folder, resume=True)


def test_a_model_that_changed_meanwhile_is_noticed(config, whole, tmp_path, study):
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "model")
    (folder / "results.nc").unlink()
    model = load_model(study / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save(model, load_tokenizer(study / "model"), tmp_path / "model")
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace(str(study / "model"), str(tmp_path / "model")))
    with pytest.raises(InputError, match="step 0 was measured of another model"):
        execute_unlearn(load_config(folder / "run.yaml"), folder, resume=True)


def test_another_run_is_replaced_when_asked_and_only_then(config, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(InputError, match=r"already holds results\.nc; choose another"):
        execute_unlearn(config, folder)
    other = config.model_copy(update={"steps": 3, "scheduler": "constant"})
    execute_unlearn(other, folder, overwrite=True)
    assert gf.open_run(folder).step.values.tolist() == [0, 2, 3]
    assert sorted(path.name for path in (folder / "steps").iterdir())[-1] == "step-00000003.nc"


@pytest.mark.parametrize("name", ["checkpoint-3", "model"])
def test_what_no_run_made_is_never_removed(config, tmp_path, name):
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True)
    with pytest.raises(InputError, match=f"holds {name}, which no unlearning run made"):
        execute_unlearn(config, folder, overwrite=True)
    assert [path.name for path in folder.iterdir()] == [name]
