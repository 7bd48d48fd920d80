"""Threads on a shared machine: settings before torch is loaded, and messages about them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch  # noqa: F401  whether it is there decides

from geffect_fast import threads
from geffect_fast.threads import usable_cores

OURS = ("OMP_", "GOMP_", "KMP_", "MKL_")
COMMAND = ["-m", "geffect_fast", "env"]
SCRIPT = ["-c", "import sys; sys.argv[0] = '/usr/bin/geffect-fast'; import geffect_fast, torch"]
PROGRAM = ["-c", "import geffect_fast"]
BUSY = """
import os
os.getloadavg = lambda: (50.0, 50.0, 50.0)
import geffect_fast
import geffect_fast.measure.profile
"""


def started(words, cpus=None, **environment):
    """The text that a process of Python prints on stderr."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    done = subprocess.run(
        [sys.executable, *words],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=None if cpus is None else lambda: os.sched_setaffinity(0, cpus),
    )
    return done.stderr


def settings(words, cpus=None, **environment):
    """OpenMP's own settings, as the library shows them when torch loads it."""
    shown = started(words, cpus, OMP_DISPLAY_ENV="verbose", **environment)
    return dict(re.findall(r"^\s*(?:\[host\] )?(\w+) ?= ?'(.*)'$", shown, re.MULTILINE))


@pytest.mark.parametrize("words", [COMMAND, SCRIPT], ids=["module", "script"])
def test_a_command_lets_threads_sleep_as_they_wait(words):
    found = settings(words)
    assert int(found["GOMP_SPINCOUNT"]) == 0
    assert found["OMP_NUM_THREADS"] == str(usable_cores())


def test_a_command_follows_its_affinity_and_leaves_the_waiting_that_the_user_has_set():
    found = settings(SCRIPT, {min(os.sched_getaffinity(0))}, GOMP_SPINCOUNT="7")
    assert (int(found["GOMP_SPINCOUNT"]), found["OMP_NUM_THREADS"]) == (7, "1")


def test_what_the_user_has_set_stays():
    found = settings(SCRIPT, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="3")
    assert (found["OMP_WAIT_POLICY"], found["OMP_NUM_THREADS"]) == ("ACTIVE", "3")
    assert int(found["GOMP_SPINCOUNT"]) > 0
    found = settings(SCRIPT, OMP_NUM_THREADS="3")
    assert (int(found["GOMP_SPINCOUNT"]), found["OMP_NUM_THREADS"]) == (0, "3")


def test_a_program_is_left_alone():
    assert int(settings(PROGRAM)["GOMP_SPINCOUNT"]) > 0


def test_a_program_on_a_busy_machine_is_told_once():
    said = started(["-c", BUSY])
    assert said.count("set OMP_WAIT_POLICY=passive") == 1 and "load 50.0" in said


@pytest.mark.parametrize(
    ("load", "loaded", "environment", "said"),
    [
        (50.0, False, {}, True),
        (50.0, False, {"OMP_WAIT_POLICY": "passive"}, False),
        (50.0, False, {"OMP_NUM_THREADS": "1"}, False),
        (0.0, False, {}, False),
        (50.0, True, {}, False),
    ],
    ids=["busy", "they sleep", "they are few", "it is idle", "torch is there already"],
)
def test_nothing_is_said_where_nothing_can_be_won(
    load, loaded, environment, said, monkeypatch, caplog
):
    for name in os.environ:
        if name.startswith(OURS):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch")
    threads.prepare()
    assert ("OMP_WAIT_POLICY" in caplog.text) == said


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "99900000 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
    ids=["one", "half", "no limit", "many", "version 1", "version 1, no limit", "odd", "none"],
)
def test_a_control_group_limits_the_number(tmp_path, files, expected):
    """ollama/ollama#17916: the cores of the host are counted, and the quota is ignored."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    every = usable_cores(tmp_path / "nothing")
    assert usable_cores(tmp_path) == (every if expected is None else expected)
