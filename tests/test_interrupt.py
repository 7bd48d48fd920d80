"""Ctrl-C and a full disk in a process of its own: one line, and every folder as it was."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pkgutil import resolve_name

import pytest
import xarray as xr
from bad_input.case import profile, snapshot
from bad_input.folders import a_run
from bad_input.steps import half_done

from geffect_fast.cli import main
from geffect_fast.storage.manifest import MANIFEST, Manifest, check_sums, files_below
from geffect_fast.storage.run_folder import open_run

pytestmark = pytest.mark.slow

MOMENTS = {
    "at work": ("torch.autograd.grad", 6),
    "while files change places": ("pathlib.Path.rename", 6),
}


@pytest.fixture
def here(study, tmp_path):
    """A copy of the study with a finished run in the folder run."""
    folder = shutil.copytree(study, tmp_path / "here")
    a_run(folder, None)
    return folder


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def _obedient():
    """Restore the default signals: processes in the background ignore some of them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)


def _wait_at(mark, name, call_number):
    """Make the n-th call of the function of that name leave a mark, and wait for a signal."""
    holder, _, attribute = name.rpartition(".")
    holder = resolve_name(holder)
    found, calls = getattr(holder, attribute), []

    def instead(*args, **kwargs):
        calls.append(0)
        if len(calls) == call_number:
            mark.touch()
            time.sleep(600)
        return found(*args, **kwargs)

    setattr(holder, attribute, instead)


class Stopped:
    """A command in a process of its own, which waits in a call of some function.

    The process is a fork of this one, which has imported the slow modules.
    """

    def __init__(self, folder, mark, moment, words, signals):
        self.mark = mark
        self.printed = [mark.with_name(f"{mark.name}.{name}") for name in ("out", "error")]
        self.process = get_context("fork").Process(
            target=self._run, args=(folder, moment, words, signals)
        )

    def _run(self, folder, moment, words, signals):
        for number, file in enumerate(self.printed, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        signals()
        os.chdir(folder)
        _wait_at(self.mark, *moment)
        sys.exit(main(words))

    def until_it_waits(self):
        while not self.mark.exists():
            assert self.process.is_alive(), self.said()
            time.sleep(0.02)

    def end_by(self, sent):
        """End the process by a signal, and return its exit code and its output."""
        os.kill(self.process.pid, sent)
        self.process.join(300)
        return self.process.exitcode, *self.said()

    def said(self):
        """Printed text of stdout and stderr, without the note that there are no kernels."""
        out, error = (file.read_text(encoding="utf-8") for file in self.printed)
        return out, re.sub(r"\Aops on .* run in plain torch.*\n", "", error)


@contextmanager
def stopped(folder, mark, moment, words, signals=_obedient):
    """Start a command that waits in a function, and end the command with the block."""
    command = Stopped(folder, mark, moment, words, signals)
    command.process.start()
    try:
        command.until_it_waits()
        yield command
    finally:
        command.process.kill()
        command.process.join()


@pytest.fixture
def command(here, monkeypatch, capfd):
    """Run a command of a bystander in this process: its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.chdir(here)
        capfd.readouterr()
        return main([*words]), *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("moment", "sent"),
    [
        *((moment, signal.SIGINT) for moment in MOMENTS),
        ("while files change places", signal.SIGTERM),
        ("at work", signal.SIGHUP),
    ],
)
def test_ctrl_c_leaves_the_earlier_run_whole(here, tmp_path, moment, sent):
    """The signals of schedulers and of closing terminals leave the run whole as well."""
    before, mark = snapshot(here), tmp_path / "there"
    with stopped(here, mark, MOMENTS[moment], [*profile(), "--overwrite"]) as command:
        now = {name: digest for name, digest in snapshot(here).items() if name != "run/.lock"}
        assert (now == before) == (moment == "at work")
        moved = moment == "while files change places"
        assert (here / "run/results.nc").exists() == (not moved)
        code, *printed = command.end_by(sent)
    assert code == CODES[sent]
    assert printed == ["", "error: interrupted; nothing half-written is left\n"]
    assert snapshot(here) == before


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_between_two_plots_the_numbers_of_the_new_run_are_there(
    here, command, tmp_path, sent
):
    before, mark = open_run(here / "run"), tmp_path / "there"
    plot = ("geffect_fast.report.figures.profile.instances_figure", 1)
    with stopped(here, mark, plot, [*profile(), "--overwrite"]) as running:
        code, out, error = running.end_by(sent)
    assert code == CODES.get(sent, -sent)
    if sent in CODES:
        assert (out, error.count("\n")) == ("", 1)
        assert "the numbers of run folder" in error and "geffect-fast report" in error
    after = open_run(here / "run")
    assert after.sizes != before.sizes
    assert command("report", "run")[0] == 0
    held = Manifest.read(here / "run").files
    check_sums(here / "run", held, "")
    assert {*files_below(here / "run")} == {*held, MANIFEST}
    assert {"results.nc", "run.yaml", "summary.csv", "report.html"} <= {*held}
    assert {"plots/layers.png", "plots/instances.png"} <= {*held}
    xr.testing.assert_identical(open_run(here / "run"), after)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(here, command, tmp_path):
    mark = tmp_path / "there"
    with stopped(here, mark, MOMENTS["at work"], profile(out="new")) as first:
        before = snapshot(here)
        for more in ([], ["--overwrite"]):
            code, out, error = command(*profile(out="new"), *more)
            assert (code, out) == (2, "")
            who = f"process {first.process.pid} on {platform.node()}"
            assert error == (
                f"error: run folder new is in use by {who}; "
                "wait for its end, or choose another --out\n"
            )
        assert snapshot(here) == before
        first.end_by(signal.SIGKILL)
    assert command(*profile(out="new")) == (0, "", "")
    assert not [path for path in (here / "new").iterdir() if path.name.startswith(".")]


def test_a_second_resume_is_refused(here, command, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    shutil.rmtree(here / "run")
    half_done(here, None)
    resumed = ["profile", "--quiet", "--out", "run", "--resume"]
    mark = tmp_path / "there"
    with stopped(here, mark, ("geffect_fast.steps.probe.Probe.measure_at", 1), resumed) as first:
        code, _, error = command(*resumed)
        assert code == 2
        assert f"run folder run is in use by process {first.process.pid} on" in error
    assert command(*resumed)[::2] == (0, "")


def test_nohup_goes_on(here, tmp_path):
    """A user who has SIGHUP ignored wants the command to outlive its terminal."""
    mark = tmp_path / "there"

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    at_work = MOMENTS["at work"]
    with stopped(here, mark, at_work, profile(out="new"), signals=ignore) as command:
        os.kill(command.process.pid, signal.SIGHUP)
        command.process.join(0.5)
        assert command.process.is_alive()


def test_a_full_disk_leaves_the_earlier_run_whole(here):
    """The disk is full at the end of the process too, when HDF5 closes open files."""
    before = snapshot(here)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))

    words = [sys.executable, "-m", "geffect_fast.cli", *profile(), "--overwrite"]
    done = subprocess.run(words, cwd=here, preexec_fn=limit, capture_output=True, text=True)
    out, error = done.stdout, done.stderr
    assert done.returncode == 2, error
    # The limit holds for every file of the process: a library may note that its cache is not saved.
    ours = [line for line in error.splitlines() if line.startswith("error: ")]
    assert out == "" and len(ours) == 1 and "Traceback" not in error, error
    assert ours[0].startswith("error: run folder run cannot be written: File too large")
    assert snapshot(here) == before
