"""Runs of `check` on short rows, and the text that `check` prints."""

from __future__ import annotations

from models import samples
from report_views import words_of

from geffect_fast.measure.check import check
from geffect_fast.report.tables.check import render_check

LENGTHS = [7, 12, 20, 5]


def run(model, **kwargs):
    return check(model, None, **({"data": samples(LENGTHS, prompt=3)} | kwargs))


def printed(found):
    return words_of(render_check(found), 120)


def by_kind(found):
    return {row.kind: row for row in found.kinds}
