"""Resuming a run after damage to, or replacement of, its files or its inputs."""

from __future__ import annotations

import random
import shutil

import pytest
from bad_input.case import snapshot
from interrupted import interrupted_at

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.errors import InputError, InterruptedRunError, NonFiniteError
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.storage.seal import read_sealed
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.training.resume import MARK, check_whole, checkpoints
from geffect_fast.unlearn_settings import UnlearnConfig

TRAIN_AGAIN = "remove the folder checkpoint-2 to train again"
FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth")
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def begun(study, tmp_path_factory):
    """A study and, in `run`, a run that was interrupted behind its first checkpoint."""
    here = shutil.copytree(study, tmp_path_factory.mktemp("begun") / "here")
    config = checked_config(
        UnlearnConfig,
        {
            **{name: str(here / name) for name in ("model", "reference")},
            **{name: str(here / f"{name}.jsonl") for name in ("forget", "retain")},
            **{"objective": "npo(beta=0.1)", "steps": 4, "probe_every": 2, "lora_rank": 2},
            **{"lora_dropout": 0.2, "threads": 1, "resolve": ["sample"], "learning_rate": 1e-3},
        },
    )
    with interrupted_at(4), pytest.raises(InterruptedRunError):
        execute_unlearn(config, here / "run")
    return here


@pytest.fixture
def here(begun):
    """The study with the interrupted run, restored after the test, as configs hold its path."""
    kept = shutil.copytree(begun, begun.with_name("kept"))
    yield begun
    shutil.rmtree(begun)
    kept.rename(begun)


def refused(here):
    """The message on resuming; no file changes."""
    before = snapshot(here)
    with pytest.raises(InputError) as caught:
        execute_unlearn(load_config(here / "run/run.yaml"), here / "run", resume=True)
    assert snapshot(here) == before
    return str(caught.value)


def flip(file, dice):
    data = bytearray(file.read_bytes())
    bit = dice.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_every_bit_flip_in_a_checkpoint_is_named(here):
    dice = random.Random(4)
    (checkpoint,) = checkpoints(here / "run").values()
    check_whole(checkpoint)
    names = [path.name for path in checkpoint.iterdir() if path.name != MARK]
    assert {"adapter_model.safetensors", *STATES} <= {*names}
    for name in names:
        file = checkpoint / name
        data = file.read_bytes()
        for _ in range(8):
            flip(file, dice)
            with pytest.raises(InputError) as caught:
                check_whole(checkpoint)
            assert f"checkpoint-2/{name} is damaged or was replaced" in str(caught.value)
            assert "remove the folder checkpoint-2 to train again" in str(caught.value)
            file.write_bytes(data)
    data = (checkpoint / MARK).read_bytes()
    for _ in range(40):
        flip(checkpoint / MARK, dice)
        if read_sealed(checkpoint / MARK) is None:  # other changes are in white space
            assert not checkpoints(here / "run")
        (checkpoint / MARK).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "said", "damage"),
    [
        *((f"checkpoint-2/{name}", TRAIN_AGAIN, "flipped") for name in FILES),
        ("checkpoint-2/optimizer.pt", TRAIN_AGAIN, "empty"),
        *(
            (name, said, damage)
            for name, said in (
                (f"checkpoint-2/{MARK}", "checkpoint-2, which no unlearning run made"),
                ("steps/step-00000000.nc", "Step 0 needs that name: move the file away"),
                ("manifest.json", "is not as a run wrote it"),
            )
            for damage in ("flipped", "empty")
        ),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(here, name, said, damage):
    file = here / "run" / name
    if damage == "empty":
        file.write_bytes(b"")
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1 if b"{" in data[:1] else 64
        file.write_bytes(data)
    line = refused(here)
    assert said in line and file.name.replace(MARK, "checkpoint-2") in line


@pytest.mark.parametrize("name", [*(f"checkpoint-2/{n}" for n in STATES), "steps/step-00000000.nc"])
def test_a_missing_file_is_named(here, name):
    (here / "run" / name).unlink()
    line = refused(here)
    assert "is missing" in line and "to train again" in line
    assert (here / "run" / name).name in line or "step 0 is missing" in line


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_torn_state_of_an_earlier_version_is_named(here, name):
    """An earlier version's checkpoints have no checksums, so loading the state shows the damage."""
    mark = here / "run/checkpoint-2" / MARK
    held = read_sealed(mark)
    mark.write_text(f'{{"identity": "{held["identity"]}", "step": 2}}')
    (here / "run/checkpoint-2" / name).write_bytes(b"torn")
    assert "cannot be loaded" in refused(here)


@pytest.mark.parametrize(
    ("option", "name", "by"),
    [
        ("--model", "model/model.safetensors", "reference/model.safetensors"),
        ("--model", "model/config.json", None),
        ("--reference", "reference/model.safetensors", "model/model.safetensors"),
        ("--forget", "forget.jsonl", "retain.jsonl"),
        ("run.yaml is", "run/run.yaml", None),
    ],
)
def test_what_was_replaced_is_named(here, option, name, by):
    if by is None:
        (here / name).write_text((here / name).read_text() + "\n")
    else:
        shutil.copy(here / by, here / name)
    line = refused(here)
    assert option in line and (here / name).name in line


def test_a_model_from_python_that_is_another_is_named(tmp_path):
    from models import build, samples

    given = {"forget": samples([5, 7], 1), "retain": samples([6, 3], 2), "objective": "ga"}
    given |= {"steps": 2, "probe_every": 1, "out": tmp_path / "run"}
    with interrupted_at(1), pytest.raises(InterruptedRunError):
        gf.unlearn(build("llama"), None, **given)
    other = build("llama")
    other.lm_head.weight.data[0, 0] += 1e-3
    with pytest.raises(InputError, match="weights of model is not what the run"):
        gf.unlearn(other, None, **given, resume=True)
    gf.unlearn(build("llama"), None, **given, resume=True)


def test_a_training_that_diverges_or_may_not_begin_leaves_the_run_it_was_to_replace(here):
    config = load_config(here / "run/run.yaml")
    execute_unlearn(config, here / "run", resume=True)
    before = snapshot(here)
    wild = config.model_copy(update={"learning_rate": 1e38, "optimizer": "sgd", "steps": 9})
    with pytest.raises(
        NonFiniteError, match=r"step \d.*; the run that was to be replaced in .*run"
    ):
        execute_unlearn(wild, here / "run", overwrite=True)
    assert snapshot(here) == before
    # the model that the run unlearns is not replaced
    own = config.model_copy(update={"model": str(here / "run/model")})
    with pytest.raises(InputError, match=r"--model .*run/model is of the run in .* --overwrite"):
        execute_unlearn(own, here / "run", overwrite=True)
    assert snapshot(here) == before
