"""`geffect-fast objectives`: every objective there is, as it may be written."""

from __future__ import annotations

import pytest

from geffect_fast.cli import main
from geffect_fast.objectives import available, parse
from geffect_fast.objectives.registry import REQUIRED, described_objectives


def test_every_objective_is_there_as_it_parses():
    described = described_objectives()
    parsed = [parse(each.text.replace(REQUIRED, "1")) for each in described]
    assert [objective.name for objective in parsed] == list(available())
    for objective, each in zip(parsed, described, strict=True):
        assert each.about.endswith(".")
        if REQUIRED not in each.text:
            assert objective == type(objective)(), "its defaults"


@pytest.mark.parametrize(
    ("name", "sets", "needs"),
    [
        ("ga", ["forget"], []),
        ("kl", ["retain"], ["a reference"]),
        ("dpo", ["forget"], ["a reference", "refusals"]),
        ("po", ["forget"], ["refusals"]),
        ("gd", ["forget", "retain"], []),
        ("token_weights", ["forget"], ["weights"]),
        ("undial", ["forget"], ["a reference"]),
        ("pdu", ["forget", "retain"], []),
    ],
)
def test_what_it_reads_and_needs(name, sets, needs):
    (found,) = [each for each in described_objectives() if each.text.split("(")[0] == name]
    assert (found.sets, found.needs) == (sets, needs)


def test_the_command_prints_them(capsys):
    assert main(["objectives"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {name}" in printed for name in available())
    assert "--reference, --refusals" in printed and "weights in the rows" in printed
