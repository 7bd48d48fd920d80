"""Ctrl-C and a full disk, to a process of its own: one line, and every folder as it was."""

from __future__ import annotations

import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import xarray as xr
from bad_input.case import profile, snapshot
from bad_input.folders import a_run
from bad_input.steps import half_done

from geffect_fast.cli import main
from geffect_fast.storage.manifest import MANIFEST, Manifest, check_sums, files_below
from geffect_fast.storage.run_folder import open_run

WAITING = """
import sys, time
from pathlib import Path

def waits(name, call_number):
    calls = []
    def instead(*args, **kwargs):
        calls.append(0)
        if len(calls) == call_number:
            Path(sys.argv[1]).touch()
            time.sleep(600)
        return found(*args, **kwargs)
    holder, _, attribute = name.rpartition(".")
    holder = __import__("pkgutil").resolve_name(holder)
    found = getattr(holder, attribute)
    setattr(holder, attribute, instead)

waits(sys.argv[2], int(sys.argv[3]))
from geffect_fast.cli import main
sys.exit(main(sys.argv[4:]))
"""
"""A program that stops at a call of some function, and there waits for a signal."""

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


def _obedient():
    """Signals as a terminal's own commands have them; those in the background ignore some."""
    for each in CODES:
        signal.signal(each, signal.SIG_DFL)


@contextmanager
def running(words, folder, preexec_fn=_obedient):
    """A process, ended when the block is."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *words], cwd=folder, preexec_fn=preexec_fn, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(process):
    """All it prints on stdout and stderr, less the note that no kernels are here."""
    out, error = process.communicate(timeout=300)
    return out, re.sub(r"\Aops on .* run in plain torch.*\n", "", error)


def waiting(mark, process):
    """Until the program of `WAITING` has come to where it stops."""
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.fixture
def command(here, monkeypatch, capfd):
    """Runs a command of a bystander, in this process: its exit code, stdout and stderr."""

    def run(*words):
        monkeypatch.chdir(here)
        capfd.readouterr()
        return main([*words]), *capfd.readouterr()

    return run


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize(
    ("moment", "sent"),
    [
        *((moment, signal.SIGINT) for moment in MOMENTS),
        ("while files change places", signal.SIGTERM),
        ("at work", signal.SIGHUP),
    ],
)
def test_ctrl_c_leaves_the_earlier_run_whole(here, tmp_path, moment, sent):
    """And so do the signals of schedulers and of terminals that close."""
    before, mark = snapshot(here), tmp_path / "there"
    function, call_number = MOMENTS[moment]
    words = ["-c", WAITING, str(mark), function, str(call_number), *profile(), "--overwrite"]
    with running(words, here) as process:
        waiting(mark, process)
        now = {name: digest for name, digest in snapshot(here).items() if name != "run/.lock"}
        assert (now == before) == (moment == "at work")
        moved = moment == "while files change places"
        assert (here / "run/results.nc").exists() == (not moved)
        process.send_signal(sent)
        printed = said(process)
    assert process.returncode == CODES[sent]
    assert printed == ("", "error: interrupted; nothing half-written is left\n")
    assert snapshot(here) == before


@pytest.mark.parametrize("sent", [*CODES, signal.SIGKILL])
def test_stopped_between_two_plots_the_numbers_of_the_new_run_are_there(
    here, command, tmp_path, sent
):
    before, mark = open_run(here / "run"), tmp_path / "there"
    plot = ("geffect_fast.report.figures.profile.instances_figure", "1")
    words = ["-c", WAITING, str(mark), *plot, *profile(), "--overwrite"]
    with running(words, here) as process:
        waiting(mark, process)
        process.send_signal(sent)
        out, error = said(process)
    assert process.returncode == CODES.get(sent, -sent)
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


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(here, command, tmp_path, sent):
    mark = tmp_path / "there"
    words = ["-c", WAITING, str(mark), "torch.autograd.grad", "6", *profile(out="new")]
    with running(words, here) as first:
        waiting(mark, first)
        before = snapshot(here)
        for more in ([], ["--overwrite"]):
            code, out, error = command(*profile(out="new"), *more)
            assert (code, out) == (2, "")
            assert error == (
                f"error: run folder new is in use by process {first.pid} on {platform.node()}; "
                "wait for its end, or choose another --out\n"
            )
        assert snapshot(here) == before
        first.send_signal(sent)
        first.wait()
    assert command(*profile(out="new")) == (0, "", "")
    assert not [path for path in (here / "new").iterdir() if path.name.startswith(".")]


def test_a_second_resume_is_refused(here, command, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    shutil.rmtree(here / "run")
    half_done(here, None)
    resumed = ["profile", "--quiet", "--out", "run", "--resume"]
    mark = tmp_path / "there"
    words = ["-c", WAITING, str(mark), "geffect_fast.steps.probe.Probe.at", "1", *resumed]
    with running(words, here) as first:
        waiting(mark, first)
        code, _, error = command(*resumed)
        assert code == 2
        assert f"run folder run is in use by process {first.pid} on" in error
        first.kill()
    assert command(*resumed)[::2] == (0, "")


def test_nohup_goes_on(here, tmp_path):
    """Who has SIGHUP ignored wants the command to outlive its terminal."""
    mark = tmp_path / "there"
    words = ["-c", WAITING, str(mark), "torch.autograd.grad", "6", *profile(out="new")]

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with running(words, here, preexec_fn=ignore) as process:
        waiting(mark, process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None


def test_a_full_disk_leaves_the_earlier_run_whole(here):
    """Also at the end of the process, when HDF5 closes what is still open."""
    before = snapshot(here)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))

    words = ["-m", "geffect_fast.cli", *profile(), "--overwrite"]
    with running(words, here, preexec_fn=limit) as process:
        out, error = said(process)
    assert process.returncode == 2, error
    # The limit holds for every file of the process: a library may note that its cache is not saved.
    ours = [line for line in error.splitlines() if line.startswith("error: ")]
    assert out == "" and len(ours) == 1 and "Traceback" not in error, error
    assert ours[0].startswith("error: run folder run cannot be written: File too large")
    assert snapshot(here) == before
