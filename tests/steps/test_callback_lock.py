"""A callback's folder is locked from the beginning of a training to its end, however it ends."""

from __future__ import annotations

import gc
import os
import platform
import threading
import time

import pytest
from killed import killed
from models import build, collated, samples
from test_callback import TRAINED_ON, arguments
from transformers import Trainer, TrainerCallback

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.storage.lock import LOCK, locked

MOMENTS = [("fcntl.", ""), ("os.rename", "steps/"), ("os.remove", LOCK)]
"""Kills of a training before it locks the folder, names a step and gives the folder back."""
IN_USE = f"is in use by process {os.getpid()} on {platform.node()}; wait for its end"


def training(folder, *more, steps=2):
    probe = gf.integrations.GEffectCallback(
        {"forget": samples([5], 1), "retain": samples([4], 2)},
        every=1,
        out=folder / "out",
        resolve=("sample",),
        token_budget=64,
    )
    return Trainer(
        build("llama"),
        arguments(folder, max_steps=steps),
        train_dataset=TRAINED_ON,
        data_collator=collated,
        callbacks=[probe, *more],
    )


class At(TrainerCallback):
    """A callback that calls a function at the beginning and after the first update."""

    def __init__(self, act, event="on_step_end"):
        setattr(self, event, lambda *args, **kwargs: act())


def refused_in(run):
    """The messages to another thread, to a child of `fork`, and to this very thread."""
    said = []

    def attempt():
        try:
            run()
            said.append("nothing")
        except InputError as error:
            said.append(str(error))

    other = threading.Thread(target=attempt)
    other.start()
    other.join()
    child = os.fork()
    if child == 0:
        attempt()
        os._exit(0 if IN_USE in said[-1] else 1)
    said.append(IN_USE if os.waitpid(child, 0)[1] == 0 else "nothing")
    return said


def test_others_are_refused_by_name_while_it_trains_and_nothing_of_it_is_kept(tmp_path):
    said = []

    def lock():
        with locked(tmp_path / "out"):
            pass

    def nested():
        training(tmp_path).train()

    def look():
        said.extend(refused_in(lock))
        with pytest.raises(InputError) as caught:  # the same thread, another training
            nested()
        said.append(str(caught.value))

    events = ("on_train_begin", "on_step_end", "on_epoch_end")
    run = training(tmp_path, *(At(look, event) for event in events))
    run.train()
    assert len(said) == 3 * (1 + 2 + 1) and all(IN_USE in line for line in said), said
    locks = [each for each in gc.get_objects() if type(each).__name__ == "TrainingLock"]
    kept = [each for each in locks if getattr(each, "_loop", None) is not None]  # unless refused
    assert locks and not kept and run is not None
    lock()
    assert not (tmp_path / "out" / LOCK).exists()
    assert gf.open_run(tmp_path / "out").step.values.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("on_train_begin", RuntimeError),
        ("on_step_begin", KeyboardInterrupt),
        ("on_step_end", InputError),
        ("on_step_end", MemoryError),
    ],
)
def test_an_exception_frees_it_though_everything_of_it_is_kept(tmp_path, error, event):
    def stop():
        raise error("stop")

    run = training(tmp_path, At(stop, event))
    with pytest.raises(error) as caught:
        run.train()
    watches = [thread for thread in threading.enumerate() if thread.name == "training lock"]
    for watch in watches:
        watch.join(5)
    assert not any(watch.is_alive() for watch in watches)
    assert not (tmp_path / "out" / LOCK).exists()
    assert caught.value.__traceback__ is not None and run is not None
    with locked(tmp_path / "out"):
        pass


def test_a_training_behind_one_that_failed_has_the_folder_at_once_and_for_itself(tmp_path):
    """The next training runs in the same process and thread, as in a notebook after an error."""
    said = []

    def stop():
        raise RuntimeError("stop")

    run = training(tmp_path, At(stop, "on_train_begin"))
    with pytest.raises(RuntimeError):
        run.train()
    (tmp_path / "out/steps/step-00000000.nc").unlink()

    def look():
        time.sleep(0.6)  # meanwhile the end of the first training is noticed
        said.extend(refused_in(lambda: locked(tmp_path / "out").__enter__()))

    training(tmp_path, At(look)).train()
    assert said and all(IN_USE in line for line in said), said


@pytest.mark.slow
def test_killed_at_any_moment_it_is_free(tmp_path):
    training(tmp_path / "whole").train()
    for number, moment in enumerate(MOMENTS):
        folder = tmp_path / f"run{number}"
        assert killed(lambda out: training(out.parent).train(), folder / "out", *moment)
        with locked(folder / "out"):
            pass
