"""Every mistake of the catalogue costs one clear line, the documented exit code and no file."""

from __future__ import annotations

import shutil
import warnings

import pytest
from bad_input import (
    calls,
    compare,
    data,
    evaluate,
    folders,
    formats,
    forward,
    limits,
    live_measures,
    models,
    objectives,
    options,
    report,
    results,
    steps,
    survey,
    sweep,
    tokens,
    unlearn,
    weights,
)
from bad_input.case import Case, largest_file, snapshot

from geffect_fast.cli import main
from geffect_fast.errors import GEffectError

CASES: list[Case] = [
    *data.CASES,
    *formats.CASES,
    *objectives.CASES,
    *models.CASES,
    *limits.CASES,
    *options.CASES,
    *folders.CASES,
    *calls.CASES,
    *compare.CASES,
    *evaluate.CASES,
    *forward.CASES,
    *live_measures.CASES,
    *report.CASES,
    *results.CASES,
    *steps.CASES,
    *survey.CASES,
    *sweep.CASES,
    *tokens.CASES,
    *unlearn.CASES,
    *weights.CASES,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input") / "here"


@pytest.fixture
def here(study, place, monkeypatch):
    """A copy of the study as the working folder, the same path for all cases, without a network."""
    shutil.copytree(study, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield place
    shutil.rmtree(place)


def told(case, here, capfd):
    """The exit code of a case, and the line printed for it."""
    if callable(case.run):
        with pytest.raises(GEffectError) as caught:
            case.run(here)
        return caught.value.exit_code, str(caught.value)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore", DeprecationWarning)
        code = main(case.run)
    assert not warned, [str(each.message) for each in warned]
    lines = capfd.readouterr().err.splitlines(keepends=True)
    # Every halving of the token budget prints a line, until nothing is left to halve.
    printed = "".join(x for x in lines if not x.startswith("warning: out of memory with a batch"))
    assert printed.startswith("error: ") and printed.endswith("\n"), printed
    return code, printed.removeprefix("error: ")[:-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(case, here, capfd, monkeypatch):
    if case.broken is not None:
        case.broken(here, monkeypatch)
    before = snapshot(here)
    with largest_file(case.largest_file):
        code, line = told(case, here, capfd)
    assert line.splitlines() == [line] and len(line) < 500
    assert case.culprit in line and case.remedy in line, line
    assert code == case.code
    assert capfd.readouterr() == ("", "")
    monkeypatch.undo()
    assert snapshot(here) == before


def test_the_catalogue_is_large_and_names_each_mistake_once():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids) >= 100
    assert all(case.culprit and case.remedy for case in CASES)
