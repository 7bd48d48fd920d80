"""Reports of runs that are missing, torn or not comparable, and unusable places for reports."""

from __future__ import annotations

import errno

from bad_input.case import Case, both, cut, holds, patched
from bad_input.compare import AB, A, copied, plain, with_b
from bad_input.folders import a_run
from measured import measures

import geffect_fast as gf
from geffect_fast.storage.results_file import write_dataset
from geffect_fast.storage.run_folder import EVALUATION

FULL = OSError(errno.ENOSPC, "No space left on device")


def measures_in(name: str):
    """A folder that holds measures, without a run.yaml or a manifest."""

    def put(here, _patch):
        (here / name).mkdir()
        write_dataset(measures(), here / name / EVALUATION)

    return put


def asked(*words: str) -> list[str]:
    return ["report", *words]


CASES = [
    Case("a report of nothing", asked(), "Missing argument", "report --help"),
    Case(
        "a report of no run", asked("gone"), "run folder gone does not exist", "give a run folder"
    ),
    Case(
        "a report of a folder that is no run",
        asked("model"),
        "run folder model holds no results.nc",
        "it is not a run folder",
    ),
    Case(
        "a report of a torn result",
        asked("run"),
        "run/results.nc is torn",
        "repeat the run",
        both(a_run, cut("run/results.nc", 900)),
    ),
    Case(
        "a report of a run whose config is torn",
        asked("run", "--out", "page.html"),
        "run/run.yaml is torn or was replaced",
        "put back what was there",
        both(a_run, holds("run/run.yaml", "[")),
    ),
    Case(
        "a report of two runs of measures",
        asked("run", "other", "--out", "page.html"),
        "run run holds measures, of which a page shows one run",
        "evaluate several models in one run (--models A B)",
        both(measures_in("run"), measures_in("other")),
    ),
    Case(
        "a report of torn measures",
        asked("run"),
        "run is torn or not NetCDF",
        "repeat the run",
        both(measures_in("run"), cut("run/evaluation.nc", 900)),
    ),
    Case(
        "an export of measures to a name of no kind",
        ["export", "run", "--to", "run.txt"],
        "export run.txt",
        "must end in .parquet or .csv",
        measures_in("run"),
    ),
    Case(
        "a report in a folder that is not there",
        asked("run", "--out", "gone/page.html"),
        "folder gone does not exist",
        "make it first",
        a_run,
    ),
    Case(
        "a folder in the way of a report",
        asked("run", "--out", "model", "--overwrite"),
        "report model is a folder",
        "choose another --out",
        a_run,
    ),
    Case(
        "a report over a file",
        asked("run", "--out", "forget.jsonl"),
        "report forget.jsonl is there already",
        "choose another --out or --overwrite",
        a_run,
    ),
    Case(
        "a report's name too long",
        asked("run", "--out", "x" * 300),
        "File name too long",
        "choose another --out",
        a_run,
    ),
    Case(
        "a report on a full disk, over another",
        asked("run", "--out", "page.html", "--overwrite"),
        "page.html cannot be written: No space left",
        "free some space",
        both(a_run, holds("page.html", "mine"), patched("pathlib.Path.write_text", FULL)),
    ),
    Case(
        "a report of a run twice",
        asked("a", "b", "./a", "--out", "page.html"),
        "run a is given twice",
        "leave one out",
        AB,
    ),
    Case(
        "a report of a run and its file",
        asked("a", "a/results.nc", "--out", "page.html"),
        "run a/results.nc is given twice",
        "leave one out",
        A,
    ),
    Case(
        "a report of a run and its copy",
        asked("a", "copy", "--out", "page.html"),
        "report: copy holds the same result as a",
        "give it once",
        both(A, copied),
    ),
    Case(
        "a report of several runs without a name",
        asked("a", "b"),
        "2 runs have no folder in common",
        "name the page, --out",
        AB,
    ),
    Case(
        "a report of a run with steps and one without",
        asked("a", "plain", "--out", "page.html"),
        "plain has no steps",
        "give runs of unlearn or of profile --checkpoints",
        both(A, plain),
    ),
    Case(
        "a report of runs on other data",
        asked("a", "b", "--out", "page.html"),
        "report: a was measured on 12 forget and",
        "compare runs on the same data",
        with_b(n_forget=3),
    ),
    Case(
        "a report into a folder of a name that no folder has",
        asked("x" * 300),
        "report /",
        "cannot be written: File name too long",
    ),
    Case(
        "a run of a name that no folder has",
        asked("a", "x" * 300, "--out", "page.html"),
        "File name too long",
        "give a run folder",
        AB,
    ),
    Case("a page of no results", lambda _: gf.write_page({}, "page.html"), "no run", "give one"),
]
