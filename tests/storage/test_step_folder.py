"""A run of several steps that replaces another, which stays until the new run is whole."""

from __future__ import annotations

import pytest
import xarray as xr
from killed import killed
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.errors import InputError, InterruptedRunError, NonFiniteError
from geffect_fast.storage.disk import REPLACED, UNFINISHED
from geffect_fast.storage.lock import LOCK, locked
from geffect_fast.storage.manifest import MANIFEST, Manifest, check_sums, files_below
from geffect_fast.storage.run_folder import NEXT, STEPS, open_run
from geffect_fast.storage.save_run import add_report, save_run
from geffect_fast.storage.step_folder import (
    check_resumed,
    check_start,
    finish,
    new_run,
    telling_what_is_kept,
)
from geffect_fast.storage.step_store import StepStore

CONFIG = make_config({"model": "a/b", "forget": "c/d", "retain": "e/f", "objectives": "ga"})
OLD, *NEW = (make_dataset(resolve=(), seed=seed) for seed in (1, 2, 3))


def note(dataset, folder):
    (folder / "summary.csv").write_text(f"summary {float(dataset.g_effect.sum())}")


def go(out, resume=False, until=lambda step: None, **more):
    """A run of two steps, whose measurements take no time."""
    with locked(out):
        folder = check_start(out, resume, **more)
        with telling_what_is_kept(folder):
            if not resume:
                with new_run(folder, CONFIG, {"--model": {}}):
                    pass
            store = StepStore(folder / STEPS, "mine")
            for step in range(2):
                until(step)
                if step not in store.steps:
                    store.write(step, NEW[step])
            finish(folder, store.combined(), note)


def interrupt(step):
    if step == 1:
        raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", OLD, CONFIG, report=note)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected") / "run"
    go(folder)
    return folder


def assert_new(folder, expected):
    manifest = Manifest.read(folder)
    check_sums(folder, manifest.files, "")
    assert {*files_below(folder)} == {*manifest.files, MANIFEST}
    assert manifest == Manifest.read(expected)


def test_the_earlier_run_stays_until_the_new_one_is_whole(run, expected):
    (run / "mine.txt").write_text("mine")
    before = {name: (run / name).read_bytes() for name in files_below(run)}
    with pytest.raises(InterruptedRunError) as caught:
        go(run, overwrite=True, until=interrupt)
    assert f"measured to step 0 is kept: go on with --resume --out {run} (" in str(caught.value)
    xr.testing.assert_identical(open_run(run), OLD)
    assert before == {name: (run / name).read_bytes() for name in before}
    with pytest.raises(InputError, match=r"already holds results\.nc; go on with --resume, choose"):
        go(run)
    go(run, resume=True)
    (run / "mine.txt").unlink()
    assert_new(run, expected)


def test_numbers_that_are_none_leave_the_earlier_run_and_say_so(run, expected):
    def diverge(step):
        if step == 1:
            raise NonFiniteError("step 1: the loss is nan; try a smaller --learning-rate")

    before = {name: (run / name).read_bytes() for name in files_below(run)}
    with pytest.raises(NonFiniteError, match=f"be replaced in {run} is as it was"):
        go(run, overwrite=True, until=diverge)
    assert before == {name: (run / name).read_bytes() for name in files_below(run)}
    with pytest.raises(
        NonFiniteError, match=r"what was measured to step 0 is kept in .*/new/steps"
    ):
        go(run.parent / "new", until=diverge)
    go(run.parent / "new", resume=True)
    assert_new(run.parent / "new", expected)


def test_another_run_takes_the_place_of_one_that_was_interrupted(run, expected):
    with pytest.raises(InterruptedRunError):
        go(run, overwrite=True, until=interrupt)
    go(run, overwrite=True)
    assert_new(run, expected)


def overwrite(folder):
    """Replace a run by a step run."""
    go(folder, overwrite=True)


BEFORE = {  # the new run is made, and its files take the place of the earlier ones
    "the settings": ("os.rename", f"{NEXT}/.run.yaml"),
    "a step is written": ("open", f"{NEXT}/steps/.step-00000001.nc", 2),
    "a step": ("os.rename", f"{NEXT}/steps/.step-00000001.nc"),
    "the result": ("os.rename", f"{NEXT}/results.nc"),
    "the earlier result is set aside": ("os.rename", "results.nc"),
    "a step comes": ("os.rename", "steps/step-00000001.nc"),
    "the note goes": ("os.rename", REPLACED, 6),
}
BEHIND = {
    "the folder goes": ("os.rename", f"{UNFINISHED}{NEXT}"),
    "the summary comes": ("os.rename", "summary.csv", 2),
    "the end": ("os.remove", LOCK),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", BEFORE | BEHIND)
def test_killed_at_any_moment_the_earlier_run_is_there_or_the_new_one(run, expected, moment):
    assert killed(overwrite, run, *(BEFORE | BEHIND)[moment])
    result = open_run(run)
    assert "step" in result.dims if moment in BEHIND else result.identical(OLD)
    if moment in BEFORE:
        begun = (run / NEXT / "run.yaml").exists()
        assert begun == (moment != "the settings")
        try:
            go(run, resume=begun, overwrite=not begun)
        except InputError as error:  # the new run is whole
            assert "is complete" in str(error)
    with locked(run):
        pass
    if "summary.csv" not in Manifest.read(run).files:  # killed when its numbers were there
        add_report(run, open_run(run), note)
    assert_new(run, expected)


def test_other_inputs_are_not_gone_on_with(tmp_path):
    with pytest.raises(InterruptedRunError):
        go(tmp_path / "run", until=interrupt)
    check_resumed(tmp_path / "run", {"--model": {}})
    file = {"model.safetensors": {"bytes": 3, "sha256": "0"}}
    with pytest.raises(InputError, match=r"model\.safetensors of --model is not what the run"):
        check_resumed(tmp_path / "run", {"--model": file})
