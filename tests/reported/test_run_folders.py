"""Publicly reported errors of folders that programs write to, tried on run folders."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import xarray as xr
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.cli.signals import ended_by_signals
from geffect_fast.errors import InputError
from geffect_fast.paths import is_there
from geffect_fast.storage.lock import LOCK, locked
from geffect_fast.storage.manifest import files_below
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.save_run import save_run

CONFIG = make_config({"model": "a/b", "forget": "c/d", "retain": "e/f", "objectives": "ga"})
OLD, NEW = (make_dataset(n_blocks=1, n_forget=2, seed=seed) for seed in (1, 2))


def note(dataset, folder):
    (folder / "summary.csv").write_text("summary")


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", OLD, CONFIG, report=note)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("scilus/scilpy#55", "unrelated.trk"),
        ("AllenInstitute/bmtk#89", ".profile"),
        ("androguard/androguard#768", "work/of/ten/days.txt"),
    ],
)
def test_overwriting_removed_everything_in_the_folder(run, source, name):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    save_run(run, NEW, CONFIG, overwrite=True)
    assert (run / name).read_text() == "mine"


def test_overwriting_removed_what_a_link_leads_to(run):
    """gruntjs/grunt-contrib-symlink#9, AmineZouitine/rmt.rs#14"""
    target = run.with_name("original.csv")
    (run / "summary.csv").rename(target)
    (run / "summary.csv").symlink_to(target)
    save_run(run, NEW, CONFIG, overwrite=True)
    assert target.read_text() == "summary" and not is_there(run / "summary.csv")


@pytest.mark.parametrize("missing", [1, 8, 3000])
def test_a_file_cut_off_by_a_kill_was_read_or_crashed(run, missing):
    """Lightning-AI/pytorch-lightning#688 (8 bytes), Unidata/netcdf4-python#813"""
    file = run / "results.nc"
    os.truncate(file, file.stat().st_size - missing)
    with pytest.raises(InputError, match=r"results\.nc is torn or was replaced: it has \d+ bytes"):
        open_run(run)


def test_two_at_once_wrote_into_one_folder(run):
    """facebook/rocksdb#13914"""
    entered, done = threading.Event(), threading.Event()

    def first():
        with locked(run):
            entered.set()
            done.wait()

    other = threading.Thread(target=first)
    other.start()
    entered.wait()
    with pytest.raises(InputError, match=f"is in use by process {os.getpid()} on"):
        save_run(run, NEW, CONFIG, overwrite=True)
    done.set()
    other.join()
    xr.testing.assert_identical(open_run(run), OLD)
    save_run(run, NEW, CONFIG, overwrite=True)


def test_a_lock_stayed_behind_its_killed_owner(run):
    """tox-dev/filelock#115; the file may stay, the lock may not"""
    child = os.fork()
    if child == 0:
        with locked(run):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (run / LOCK).exists()
    save_run(run, NEW, CONFIG, overwrite=True)
    assert LOCK not in files_below(run)


def test_a_scheduler_ends_a_job(run):
    """davidsd/sdpb#201: SIGTERM, and then there is a while to clean up"""
    left = []

    def work(argv):
        try:
            with locked(run):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        except KeyboardInterrupt:
            left.extend(path.name for path in run.iterdir() if path.name.startswith("."))
            return 130
        return 0

    assert ended_by_signals(work)(None) == 143
    assert left == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
