"""`gf.check` shows its table, in a notebook and in a terminal."""

from __future__ import annotations

import inspect
from dataclasses import replace

from html_tree import Page, find, text
from models import build, samples

import geffect_fast as gf
from geffect_fast.measure.check import Check
from geffect_fast.measure.check import check as compare_with_autograd
from geffect_fast.report.tables.check import verdict


def rows_of(found):
    (table,) = find(Page(found._repr_html_()).root, "table")
    return [[text(cell) for cell in row[2]] for row in find(table, "tr")]


def test_a_check_is_its_table():
    found = gf.check(build("llama_tied"), None, data=samples([7, 12], prompt=3))
    assert isinstance(found, Check) and found.exact
    assert "captured by" in repr(found) and f"\n{verdict(found)}"[:90] in repr(found)
    head, *rows = rows_of(found)
    assert head[:3] == ["kind", "captured by", "number"]
    assert [row[0] for row in rows] == [kind.kind for kind in found.kinds]
    for row in rows:
        assert all(cell in repr(found) for cell in row)

    (worst, *others) = found.kinds
    off = replace(worst, judged={**worst.judged, "norms": 1.0}, kind="<b>odd</b>")
    wrong = replace(found, kinds=(off, *others))
    assert "Deviation: <b>odd</b>" in repr(wrong) and rows_of(wrong)[1][0] == "<b>odd</b>"
    (lead,) = find(Page(wrong._repr_html_()).root, "p", **{"class": "lead"})
    assert text(lead).startswith("Deviation: <b>odd</b>")


def test_it_is_called_and_told_of_as_it_is_declared():
    assert inspect.signature(gf.check) == inspect.signature(compare_with_autograd)
    assert gf.check.__doc__ == compare_with_autograd.__doc__
