"""A plot or page that cannot be made costs nothing else.

The numbers are written, and a line says how to get the plot or page.
"""

from __future__ import annotations

import resource
import sys
from contextlib import contextmanager

import jinja2
import pytest
import xarray as xr
from bad_input.case import profile
from step_results import step_dataset

import geffect_fast.report
from geffect_fast.cli import main
from geffect_fast.storage.manifest import MANIFEST, Manifest, check_sums, files_below
from geffect_fast.storage.results_file import save_result
from geffect_fast.storage.run_folder import open_run

pytestmark = pytest.mark.slow


def raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


@contextmanager
def no_matplotlib(patch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        patch.delitem(sys.modules, name)
    patch.delitem(sys.modules, "geffect_fast.report.figures.canvas", raising=False)
    patch.setitem(sys.modules, "matplotlib", None)
    yield


@contextmanager
def broken_matplotlib(patch):
    patch.setattr("matplotlib.figure.Figure.draw", raising(SystemError("bad build")))
    yield


@contextmanager
def no_font(patch):
    error = RuntimeError("Can not load face (unknown file format; error code 0x2)")
    patch.setattr("matplotlib.text.Text.get_window_extent", raising(error))
    yield


@contextmanager
def broken_template(patch):
    error = jinja2.TemplateSyntaxError("unexpected '}'", 3, "page.html.jinja")
    patch.setattr("jinja2.Environment.get_template", raising(error))
    yield


@contextmanager
def broken_table(patch):
    patch.setattr("csv.writer", raising(ValueError("no columns")))
    yield


@contextmanager
def full_disk(patch):
    """Let files grow to 3,000 bytes at most, once the numbers are written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = geffect_fast.report.write_report

    def write_report(dataset, folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, before[1]))
        try:
            write(dataset, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    patch.setattr("geffect_fast.report.write_report", write_report)
    yield


PICTURES = {
    "profile": ["plots/layers.png", "plots/instances.png", "report.html"],
    "sweep": ["plots/sweep.png", "plots/pareto.png", "plots/instances.png", "report.html"],
    "tokens": ["plots/instances.png", "report.html", "tokens.html"],
    "unlearn": ["plots/effects.png", "plots/effects.svg", "plots/risks.png", "report.html"],
}


def command(kind):
    if kind == "sweep":
        return ["sweep", *profile(objectives="npo(beta=0.1:1:3)")[1:]]
    if kind == "tokens":
        return [*profile(), "--resolve", "sample,token"]
    if kind == "unlearn":
        made_from = "--model model --forget forget.jsonl --retain retain.jsonl --out run -q"
        words = f"unlearn {made_from} --objective ga --steps 2 --probe-every 1"
        few = "--resolve sample --no-norms"  # these settings make fewer pictures
        return f"{words} {few}".split()
    return profile()


@pytest.mark.parametrize(
    ("kind", "fault", "named"),
    [
        ("profile", no_matplotlib, "report.html could not be made (ModuleNotFoundError: "),
        ("profile", broken_matplotlib, "report.html could not be made (SystemError: bad build)"),
        ("profile", broken_template, "report.html could not be made (TemplateSyntaxError"),
        ("profile", broken_table, "summary.csv could not be made (ValueError: no columns)"),
        ("profile", full_disk, "could not be made (File too large)"),
        ("sweep", no_font, "could not be made (RuntimeError: Can not load face"),
        ("tokens", broken_template, "report.html could not be made (TemplateSyntaxError"),
        ("unlearn", broken_matplotlib, "report.html could not be made (SystemError: bad build)"),
    ],
)
def test_numbers_are_there_and_report_makes_what_is_missing(
    here, capfd, monkeypatch, kind, fault, named
):
    with monkeypatch.context() as patch, fault(patch):
        code = main(command(kind))
        out, error = capfd.readouterr()
    error = error.splitlines()[-1]
    assert code == 3 and out == ""
    assert error.startswith("error: the numbers of run folder ") and named in error
    assert f"geffect-fast report {here / 'run'} writes that again" in error
    whole = open_run("run")
    held = {*Manifest.read(here / "run").files}
    assert held >= {"results.nc", "run.yaml"} | ({"summary.csv"} - {named.partition(" ")[0]})
    check_whole(here / "run")
    assert kind != "unlearn" or (here / "run/model/config.json").exists()
    assert not [path for path in (here / "run").iterdir() if path.name.startswith(".")]

    assert main(["report", "run"]) == 0
    assert capfd.readouterr().out == f"{here / 'run/report.html'}\n"
    assert {*Manifest.read(here / "run").files} >= {*PICTURES[kind], *held, "summary.csv"}
    check_whole(here / "run")
    xr.testing.assert_identical(open_run("run"), whole)


def check_whole(folder):
    held = Manifest.read(folder).files
    check_sums(folder, held, "")
    assert {*files_below(folder)} == {*held, MANIFEST}


def test_one_picture_that_fails_leaves_the_others(here, capfd, monkeypatch):
    error = RuntimeError("no\nink\x1b[31m")
    with monkeypatch.context() as patch:
        patch.setattr("geffect_fast.report.figures.profile.layers_figure", raising(error))
        assert main(profile()) == 3
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "\x1b" not in line and "nor " not in line
    assert "plots/layers.png could not be made (RuntimeError: no ink" in line
    held = {*Manifest.read(here / "run").files}
    assert held == {
        *("results.nc", "run.yaml", "summary.csv", "report.html", "plots/instances.png")
    }


def test_a_comparison_keeps_its_tables(here, capfd, monkeypatch):
    for seed, name in enumerate(("a", "b")):
        (here / name).mkdir()
        save_result(step_dataset(n_steps=3, seed=seed, resolve=()), here / name / "results.nc")
    with monkeypatch.context() as patch, broken_matplotlib(patch):
        assert main(["compare", "a", "b", "--out", "both"]) == 3
    error = capfd.readouterr().err
    assert "plots/effects.png could not be made" in error and "with --overwrite writes" in error
    assert {path.name for path in (here / "both").iterdir()} >= {"summary.csv", "compare.csv"}
    check_whole(here / "both")
    assert main(["compare", "a", "b", "--out", "both", "--overwrite", "-q"]) == 0
    assert (here / "both/plots/effects.svg").exists()
    check_whole(here / "both")


def test_token_weights_are_kept(here, capfd, monkeypatch):
    assert main([*profile(), "--resolve", "sample,token"]) == 0
    words = ["weights", "run", "--out", "w.jsonl", "--retain-budget", "0", "--quiet"]
    with monkeypatch.context() as patch, broken_matplotlib(patch):
        assert main(words) == 3
    error = capfd.readouterr().err
    assert "error: w.jsonl is written, but frontier.png could not be made" in error
    assert (here / "w.jsonl").exists() and not (here / "frontier.png").exists()
    assert main([*words, "--overwrite"]) == 0 and (here / "frontier.png").exists()
