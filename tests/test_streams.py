"""Commands whose output cannot be written: a closed pipe, a full disk."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input.case import check, profile, snapshot

from geffect_fast.cli import COMMANDS, main

pytestmark = pytest.mark.usefixtures("undrawn")

UNLEARN = [*profile(objectives=None, refusals=None), "--objective", "ga", "--steps", "2"]
DATA = ["--out", "new", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
KEPT = ["--metric", "probability"]  # nothing is memorised here
RUNS = {
    "run": [*profile(refusals=None), "--resolve", "sample,token"],
    "one": ["unlearn", *UNLEARN[1:], "--probe-rows", "2"],
    "two": ["unlearn", *UNLEARN[1:], "--probe-rows", "2", "--lr", "0.01"],
}
PRINTING = {
    "help": ["--help"],
    "help of a command": ["profile", "--help"],
    "version": ["--version"],
    "env": ["env"],
    "objectives": ["objectives"],
    "check": check(),
    "profile": ["profile", *profile(refusals=None, out="new")[2:]],
    "sweep": ["sweep", *profile(refusals=None, objectives="wga(alpha=0:1:2)", out="new")[2:]],
    "unlearn": ["unlearn", *RUNS["one"][2:], "--out", "new"],
    "show": ["show", "run"],
    "tokens": ["tokens", "run"],
    "tokens --html": ["tokens", "run", "--html", "page.html"],
    "report": ["report", "run", "--out", "page.html"],
    "export": ["export", "run", "--to", "table.csv"],
    "evaluate": ["evaluate", *DATA, "--models", "model"],
    "control": ["control", *DATA, "--original", "model", "--unlearned", "one/model", *KEPT],
    "relearn": ["relearn", *DATA[:4], "--model", "model", "--steps", "1", "--measure-every", "1"],
    "weights": ["weights", "run", "--out", "weighted.jsonl", "--retain-budget", "0"],
    "compare": ["compare", "one", "two"],
    "a mistake": ["show", "no-such-run"],
}


@pytest.fixture(scope="module")
def study(study, tmp_path_factory):
    """A copy of the study with finished runs."""
    folder = shutil.copytree(study, tmp_path_factory.mktemp("streams") / "here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for out, words in RUNS.items():
            assert main([*words, "--out", out]) == 0
    return folder


def closed_pipe(buffering):
    """A text stream to a pipe that nobody reads any more."""
    there, here = os.pipe()
    os.close(there)
    return io.TextIOWrapper(os.fdopen(here, "wb", -1), line_buffering=buffering)


def test_the_table_has_every_command():
    named = {words[0] for words in PRINTING.values()}
    assert {command.__name__ for command in COMMANDS} - named == {"demo"}  # minutes of training


@pytest.mark.parametrize("name", PRINTING)
def test_a_closed_pipe_ends_a_command_silently(here, name, monkeypatch, capfd):
    ends_silently(here, PRINTING[name], True, monkeypatch, capfd)


@pytest.mark.parametrize("name", ["show", "version", "a mistake"])
def test_a_closed_pipe_shows_also_where_output_is_kept_to_the_end(here, name, monkeypatch, capfd):
    ends_silently(here, PRINTING[name], False, monkeypatch, capfd)


def ends_silently(here, words, buffering, monkeypatch, capfd):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, closed_pipe(buffering))
    streams = sys.stdout, sys.stderr
    assert main(words) == 141
    assert (sys.stdout, sys.stderr) == streams
    for stream in streams:
        stream.close()  # nothing is left for Python to complain of
    assert capfd.readouterr() == ("", "")
    assert not list(here.rglob(".unfinished-*")) and not list(here.rglob("*.part"))


def test_a_finished_run_stays_though_nobody_reads_of_it(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe(True))
    assert main(PRINTING["profile"]) == 141
    monkeypatch.undo()
    assert main(["show", str(here / "new")]) == 0


def test_head_takes_two_lines_of_a_run(here):
    before = snapshot(here)
    command = f"{shlex.quote(sys.executable)} -m geffect_fast.cli show run | head -2"
    words = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert len(done.stdout.splitlines()) == 2 and "error" not in done.stderr, done.stderr
    assert "Broken pipe" not in done.stderr and snapshot(here) == before


def test_a_full_disk_under_the_output_is_said_in_a_line(here, monkeypatch, capfd):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["show", "run"]) == 2
        monkeypatch.undo()
    line = capfd.readouterr().err
    assert line == (
        "error: what is printed cannot be written: No space left on device; free some space\n"
    )


def test_output_closed_from_the_start_is_no_failure(here, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["show", "run"]) == 0
