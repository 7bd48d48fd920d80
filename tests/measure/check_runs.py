"""Runs of `check` on short rows, and the text that `check` prints."""

from __future__ import annotations

import io

from models import samples

from geffect_fast.measure.check import check
from geffect_fast.report.tables.check import render_check

LENGTHS = [7, 12, 20, 5]


def run(model, **kwargs):
    return check(model, None, **({"data": samples(LENGTHS, prompt=3)} | kwargs))


def printed(found):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_check(found))
    return " ".join(console.export_text().split())


def by_kind(found):
    return {row.kind: row for row in found.kinds}
