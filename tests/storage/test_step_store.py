"""Step files: whole or absent, found again, and never taken for those of another run."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import xarray as xr
from synthetic import make_dataset

from geffect_fast.errors import InputError, UnfinishedError
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.step_store import StepStore

FULL = OSError(errno.ENOSPC, "No space left on device")


def result(seed=0, resolve=()):
    made = make_dataset(n_blocks=2, n_forget=3, n_retain=1, seed=seed, resolve=resolve)
    return made.assign(learning_rate=np.nan)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    """The folder of a run with steps 0 and 10."""
    store = StepStore(tmp_path / "run/steps", "mine")
    store.write(0, result(0))
    store.write(10, result(1))
    return tmp_path / "run/steps"


@pytest.mark.parametrize("in_memory", [True, False])
def test_steps_come_back_as_they_were_in_order(tmp_path, in_memory):
    def by_place(seed):
        return result(seed, ("parameter", "sample"))

    store = StepStore(None if in_memory else tmp_path / "steps", "mine")
    for step in (10, 0, 123_456_789):
        store.write(step, by_place(step % 7))
    assert store.steps == [0, 10, 123_456_789] and store.left_alone == []
    xr.testing.assert_identical(store.read(10), by_place(10 % 7).assign_coords(step=10))
    whole = store.combined()
    assert whole.g_effect.dims[0] == "step" and whole.step.dtype == np.int64
    assert whole.attrs == by_place(0).attrs
    for step in store.steps:
        left, right = whole.sel(step=step), by_place(step % 7).assign_coords(step=step)
        xr.testing.assert_equal(left, right)
    assert "step" not in whole.question.dims and "step" in whole.learning_rate.dims


def test_a_store_opened_again_has_the_steps_that_were_written(folder):
    again = StepStore(folder, "mine")
    assert again.steps == [0, 10]
    again.write(20, result(2))
    assert StepStore(folder, "mine").steps == [0, 10, 20]
    assert names(folder) == [f"step-000000{n}.nc" for n in ("00", "10", "20")]
    with pytest.raises(ValueError, match="step 20 is there already"):
        again.write(20, result(3))
    xr.testing.assert_equal(open_run(folder / "step-00000020.nc").drop_vars("step"), result(2))


def damages():
    def cut(file):
        os.truncate(file, file.stat().st_size // 2)

    def middle(file):
        data = bytearray(file.read_bytes())
        data[len(data) // 2 - 500 : len(data) // 2 + 500] = bytes(1000)
        file.write_bytes(data)

    def empty(file):
        os.truncate(file, 0)

    def other(file):
        StepStore(file.parent / "x", "another").write(10, result())
        (file.parent / "x/step-00000010.nc").rename(file)
        (file.parent / "x").rmdir()

    def renumbered(file):
        file.write_bytes((file.parent / "step-00000000.nc").read_bytes())

    def folder(file):
        file.unlink()
        file.mkdir()

    torn = "is torn or not NetCDF"
    return [
        (cut, torn),
        (middle, "is damaged: its checksum is not that of what was written"),
        (empty, torn),
        (other, "is a step of another run"),
        (renumbered, "holds step 0"),
        (folder, "is no file"),
    ]


@pytest.mark.parametrize(("damage", "said"), damages(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_file_that_is_no_step_of_this_run_is_named_and_left_alone(folder, damage, said):
    file = folder / "step-00000010.nc"
    damage(file)
    before = file.read_bytes() if file.is_file() else None
    store = StepStore(folder, "mine")
    assert store.steps == [0]
    (line,) = store.left_alone
    assert str(file) in line and said in line and line.endswith("; it is left alone")
    assert len(line.splitlines()) == 1
    for refused in (lambda: store.write(10, result(1)), lambda: store.check_free([20, 10])):
        with pytest.raises(InputError, match="Step 10 needs that name: move the file away"):
            refused()
    store.write(20, result(2))
    assert store.steps == [0, 20] and StepStore(folder, "mine").steps == [0, 20]
    assert (file.read_bytes() if file.is_file() else None) == before


def test_foreign_names_are_named_and_what_a_killed_process_left_goes(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "step-1.nc").write_text("mine")
    (folder / ".step-00000020.nc.part").write_text("half")
    store = StepStore(folder, "mine")
    assert [line.split("/")[-1] for line in store.left_alone] == [
        "notes.txt is no step file; it is left alone",
        "step-1.nc is no step file; it is left alone",
    ]
    store.write(30, result())
    assert names(folder) == [
        "notes.txt",
        "step-00000000.nc",
        "step-00000010.nc",
        "step-00000030.nc",
        "step-1.nc",
    ]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename", "io.FileIO.write"])
def test_a_full_disk_keeps_the_steps_that_were_written(folder, call, monkeypatch):
    store = StepStore(folder, "mine")

    def full(*_args):
        raise FULL

    if call == "io.FileIO.write":  # a builtin type, which DiskFile wraps
        monkeypatch.setattr("geffect_fast.storage.disk.DiskFile.check", full)
    else:
        monkeypatch.setattr(call, full)
    with pytest.raises(UnfinishedError, match="step 20 cannot be written") as caught:
        store.write(20, result(2))
    assert caught.value.exit_code == 3
    assert "No space left on device; steps 0 to 10 are kept" in str(caught.value)
    assert "--resume" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    assert names(folder) == ["step-00000000.nc", "step-00000010.nc"]
    store.write(20, result(2))
    assert StepStore(folder, "mine").steps == [0, 10, 20]


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_args):
        raise FULL

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left") as caught:
        StepStore(tmp_path / "run/steps", "mine").write(0, result())
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_combine_is_an_error(tmp_path):
    with pytest.raises(InputError, match="holds no step of this run"):
        StepStore(tmp_path / "steps", "mine").combined()
