"""Runs that cannot be compared, and folders that a comparison must not be written to."""

from __future__ import annotations

from pathlib import Path

from bad_input.case import Break, Case, both, cut, holds
from step_results import step_dataset
from synthetic import make_dataset

import geffect_fast as gf
from geffect_fast.report.tokens.view import token_view


def run(name: str, objective: str, change: object = None, **kwargs: object) -> Break:
    """A folder with a step result that a function has changed."""

    def apply(here: Path, _patch: object) -> None:
        dataset = step_dataset(
            (objective,), weights=False, **{"resolve": (), "n_steps": 4} | kwargs
        )
        (here / name).mkdir()
        dataset = change(dataset) if callable(change) else dataset
        dataset.to_netcdf(here / name / "results.nc", engine="h5netcdf")

    return apply


def plain(here: Path, _patch: object) -> None:
    """A run without steps."""
    (here / "plain").mkdir()
    make_dataset(("ga",), resolve=()).to_netcdf(here / "plain/results.nc", engine="h5netcdf")


def copied(here: Path, _patch: object) -> None:
    (here / "copy").mkdir()
    (here / "copy/results.nc").write_bytes((here / "a/results.nc").read_bytes())


def stepped():
    """A step result by token."""
    return step_dataset(n_steps=2, weights=False, resolve=("sample", "token"))


A, B = run("a", "ga"), run("b", "gd", seed=1)
AB = both(A, B)
WORKS = ["compare", "a", "b", "--out", "c", "--quiet"]


def with_b(change: object = None, **kwargs: object) -> Break:
    return both(A, run("b", "gd", change, seed=1, **kwargs))


CASES = [
    Case("nothing to compare", ["compare"], "Missing argument 'runs'", "compare --help"),
    Case("one run to compare", ["compare", "a"], "got 1 run", "give two or more", A),
    Case("a run twice", ["compare", "a", "b", "./a"], "a and a are", "give it once", AB),
    Case(
        "a run and its file", ["compare", "a", "a/results.nc"], "a/results.nc", "give it once", A
    ),
    Case(
        "a copied run", ["compare", "a", "b", "copy"], "copy holds the same result as a",
        "give it once", both(AB, copied),
    ),
    Case(
        "a run without steps", ["compare", "a", "plain"], "plain has no steps",
        "runs of unlearn or of profile --checkpoints", both(A, plain),
    ),
    Case(
        "no such run to compare", ["compare", "a", "b"], "b does not exist", "give a run folder", A
    ),
    Case(
        "half a run to compare", ["compare", "a", "b"], "holds no results.nc", "repeat the run",
        both(A, holds("b/run.yaml", "")),
    ),
    Case(
        "a torn run to compare", WORKS, "b/results.nc is torn", "repeat the run",
        both(AB, cut("b/results.nc", 3000)),
    ),
    Case(
        "other risks", WORKS, "has risk 'nll', b 'ga'", "the same risk and",
        with_b(lambda d: d.assign_attrs(risk="ga")),
    ),
    Case("other data", WORKS, "on 12 forget", "the same --probe-rows", with_b(n_forget=9)),
    Case(
        "other retain rows", WORKS, "compare: the retain rows of a are not those of b",
        "the same data",
        both(
            run("a", "ga", lambda d: d.assign_attrs(digests='{"retain": "1"}')),
            run("b", "gd", lambda d: d.assign_attrs(digests='{"retain": "2"}')),
        ),
    ),
    Case(
        "other questions", WORKS, "forget row 0 of a is not that of b", "the same data",
        both(
            run("a", "ga", resolve=("sample",)),
            run(
                "b", "gd", lambda d: d.assign_coords(question=("sample", list("abcdefghijklmno"))),
                resolve=("sample",),
            ),
        ),
    ),
    Case(
        "no steps in common", WORKS, "share 0 steps (a 0 to 3, b 10 to 13)", "at the same steps",
        with_b(lambda d: d.assign_coords(step=d["step"] + 10)),
    ),
    Case(
        "a step in common", WORKS, "share 1 steps (a 0 to 3, b 0 to 30)", "at the same steps",
        with_b(every=10),
    ),
    Case(
        "a comparison into a run", ["compare", "a", "b", "--out", "a", "--overwrite"],
        "--out a is the folder of a run", "choose another", AB,
    ),
    Case(
        "a comparison over a summary of somebody", WORKS,
        "c holds summary.csv, which no run made", "choose another --out",
        both(AB, holds("c/summary.csv", "mine")),
    ),
    Case(
        "a comparison into a file", WORKS, "c is a file", "choose another --out",
        both(AB, holds("c", "")),
    ),
    Case(
        "a full disk for a comparison", WORKS, "run folder c cannot be written",
        "free some space", AB, largest_file=400,
    ),
    Case(
        "one run from Python", lambda _: gf.compare("a"), "compare: got one run", "a list of two", A
    ),
    Case("numbers for runs", lambda _: gf.compare([1, 2]), "1 is no run", "give folders"),
    Case(
        "tokens of several steps", lambda _: token_view(stepped()), "several steps", "isel(step=-1)"
    ),
    Case(
        "weights of several steps", lambda _: gf.optimal_weights(stepped(), removal=-1),
        "several steps", "isel(step=-1)",
    ),
    Case("no runs from Python", lambda _: gf.compare({}), "got 0 run", "give two or more"),
]  # fmt: skip
