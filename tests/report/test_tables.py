"""Tables of the terminal at any width, and the format of their numbers."""

import re

import numpy as np
import pytest
from report_views import text_of

from geffect_fast.report.format import (
    bounds,
    in_metric,
    metric_line,
    number,
    number_with_interval,
    question,
    spoken,
)
from geffect_fast.report.tables.cells import with_interval
from geffect_fast.report.tables.fitted import FittedTable


@pytest.mark.parametrize(
    ("value", "spec", "written"),
    [
        (-0.0, "+.3g", "0"),
        (-0.0, "+.3e", "0"),
        (-0.004, "+.2f", "0.00"),
        (0.4, "+.0f", "0"),
        (-0.04, ".1f", "0.0"),
        (-0.4, "+.0f", "0"),
        (-0.006, "+.2f", "-0.01"),
        (-1e-9, "+.3g", "-1e-09"),
        (-np.inf, "+.3g", "−∞"),
        (np.inf, ".2f", "+∞"),
    ],
)
def test_numbers_are_written_alike_everywhere(value, spec, written):
    assert number(value, spec) == written
    assert bounds((value, value), spec) == f"[{written}, {written}]"


@pytest.mark.parametrize(
    ("value", "interval", "written"),
    [
        (0.5, (0.25, np.inf), "+0.5 [+0.25, +∞]"),
        (0.5, (np.nan, np.nan), "+0.5"),
        (0.5, None, "+0.5"),
        (np.inf, (0.25, np.inf), "+∞"),
        (np.nan, (0.25, 1.0), "–"),
    ],
)
def test_an_interval_follows_its_number_on_pages_and_in_tables(value, interval, written):
    assert number_with_interval(value, interval) == written
    assert with_interval(value, interval).plain == written.replace(" [", "\n[")


def test_titles_and_notes_name_a_metric_alike():
    attrs = {"metric": "diagonal", "metric_state": "a file"}
    assert in_metric(attrs) == ", in the metric of a given diagonal"
    assert " are in the metric of a given diagonal; its state: a file." in metric_line(attrs)
    assert in_metric({}) == metric_line({}) == ""


def test_zero_has_no_sign_where_it_is_read_out():
    assert spoken(-0.0) == "0"


NAMES = ("npo(beta=0.1) + 1.0*kl", "wtnpo(beta=4, alpha=1.5)", "ga")
HEADS = ("objective", *(f"e_{i}" for i in range(6)), "collateral", "verdict")


@pytest.fixture
def table():
    made = FittedTable("effects of three objectives", HEADS, ("objective", "verdict"))
    for n, name in enumerate(NAMES):
        numbers = (f"-{n}.{i}23\n[-{n}.{i}45, -{n}.{i}01]" for i in range(7))
        made.add_row(name, *numbers, "forgets, harm unclear")
    return made


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_table_cuts_nothing_at_any_width(table, width):
    lines = text_of(table, width).splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    words = " ".join(lines).split()
    whole = [word for cells, _ in table.rows for cell in cells for word in str(cell).split()]
    assert not set(whole) - set(words) and set(HEADS) <= set(words)
    heads = [line for line in lines if line.lstrip().startswith("objective")]
    assert len(heads) == (1 if width >= 120 else len(heads)) and len(heads) < 6
    rows = [line for line in lines if re.match(r" ga\b", line)]
    assert len(rows) == len(heads), "each part names its rows"


def test_a_table_with_room_is_as_wide_as_its_lines(table):
    lines = text_of(table, 400).splitlines()
    assert any("[-0.045, -0.001]" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) < 200


def test_a_question_is_cut_between_words(dataset):
    asked = "What did the author number 0 write about the sea?"
    shown = {width: question(dataset["g_effect"], 0, width) for width in range(12, 60)}
    for width, text in shown.items():
        assert len(text) <= width
        assert text == asked if width >= len(asked) else asked.startswith(text[:-1])
        assert text == asked or asked[len(text) - 2] == " "
    without = dataset.assign_coords(question=("sample", ["x" * 99] * dataset.sizes["sample"]))
    assert question(without["g_effect"], 0, 20) == "x" * 18 + " …"
