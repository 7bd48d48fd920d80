"""Cells of CSV files are no formulas, and numbers are numbers."""

from __future__ import annotations

import csv
import sys

import pandas as pd
import pytest
from step_results import step_dataset
from synthetic import make_dataset

from geffect_fast.report.summary.objectives import write_summary
from geffect_fast.report.summary.steps import write_step_summary
from geffect_fast.storage.csv_cells import csv_cell, write_csv
from geffect_fast.storage.export import export

FORMULAS = [
    *("=1+1", '=HYPERLINK("http://x")', "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(1)"),
    *("\t=1", "\r=1", "＝1"),
]
OTHERS = ["", "a=1", " -", "'=1", "-0.5", "+1e-3", "-inf", -0.5, None, True]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_an_apostrophe(text):
    assert csv_cell(text) == "'" + text.replace("\r", "\\x0d")


def test_no_cell_holds_an_escape_code():
    assert csv_cell("a\x1b[31m\nb") == "a\\x1b[31m\nb"


@pytest.mark.parametrize("value", OTHERS)
def test_the_rest_is_as_it_was(value):
    assert csv_cell(value) is value


def cells(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def assert_no_formula(rows):
    flat = [cell for row in rows for cell in row]
    for cell in flat:
        try:
            float(cell)
        except ValueError:
            assert not cell.startswith(tuple("=+-@\t\r＝")), cell
    return flat


def test_a_table_is_safe_and_its_numbers_are_read_back_bit_for_bit(tmp_path):
    table = pd.DataFrame(
        {"x": [-0.5, 1e-300, float("nan")], "=y": ["=1", None, "-3"], "n": [1, -2, 3]}
    )
    write_csv(table, tmp_path / "t.csv")
    header, first, second, third = cells(tmp_path / "t.csv")
    assert header == ["x", "'=y", "n"]
    assert (first, second, third) == (["-0.5", "'=1", "1"], ["1e-300", "", "-2"], ["", "-3", "3"])


def test_without_pyarrow_a_table_is_the_same_to_the_byte(tmp_path, monkeypatch):
    texts = [
        *FORMULAS,
        *(each for each in OTHERS if isinstance(each, str)),
        'a "b", c',
        "a\nb",
        "ü",
    ]
    n = len(texts)
    table = pd.DataFrame(
        {
            "text": texts,
            'with "quotes", and commas': pd.array([*texts[1:], pd.NA], "string"),
            "objects": [None, True, 2, 0.25, *texts[4:]],
            "x": [-0.0, 1e-7, 1e16, 1e22, float("nan"), float("inf"), 0.1, *range(n - 7)],
            "n": range(n),
            "nullable": pd.array([pd.NA, *range(n - 1)], "Int64"),
            "bool": [i % 2 == 0 for i in range(n)],
        }
    )

    def written(name):
        write_csv(table, tmp_path / name)
        write_csv(table[:0], tmp_path / name, header=False, mode="a")
        write_csv(table[5:], tmp_path / name, header=False, mode="a")
        return (tmp_path / name).read_bytes()

    found = written("pyarrow.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert found == written("pandas.csv")


def test_export_and_summaries_hold_no_formula(tmp_path):
    hostile = ["=cmd()", "@x", "-a*b"]
    dataset = make_dataset(hostile, n_blocks=1, n_forget=2, n_retain=1, resolve=("sample", "token"))
    texts = dataset["token_text"].astype(object).copy()
    texts[:] = "=1+1"
    dataset = dataset.assign_coords(
        token_text=texts.astype(str),
        question=("sample", FORMULAS[: dataset.sizes["sample"]]),
    )
    flat = assert_no_formula(cells(export(dataset, tmp_path / "table.csv")))
    assert "'=1+1" in flat and "'=cmd()" in flat
    effects = pd.read_csv(tmp_path / "table.csv")["g_effect"]
    assert (effects < 0).any() and effects.dtype == float
    write_summary(make_dataset(hostile), tmp_path / "summary.csv")
    assert "'-a*b" in assert_no_formula(cells(tmp_path / "summary.csv"))
    steps = step_dataset(n_steps=3, n_blocks=2, n_forget=2)
    names = [f"={name}" for name in steps.objective.values]
    write_step_summary(steps.assign_coords(objective=names), tmp_path / "steps.csv")
    rows = cells(tmp_path / "steps.csv")
    assert rows[0][:2] == ["step", "objective"] and f"'{names[0]}" in assert_no_formula(rows)
