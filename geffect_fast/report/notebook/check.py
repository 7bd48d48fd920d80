"""The public function `check`, whose result shows itself as a table."""

from __future__ import annotations

from functools import wraps
from typing import Any

from geffect_fast.measure.check import Check
from geffect_fast.measure.check import check as compare_with_autograd
from geffect_fast.report.html.blocks import Items, Table, Text
from geffect_fast.report.html.templates import render
from geffect_fast.report.tables.check import (
    HEAD,
    caption,
    facts,
    kind_cells,
    note,
    render_check,
    verdict,
)
from geffect_fast.terminal import columns, plain_text


class ShownCheck(Check):
    """A `Check` that shows itself as its table and its verdict."""

    def __repr__(self) -> str:
        return plain_text(render_check(self), columns())

    def _repr_html_(self) -> str:
        rows = [kind_cells(kind) for kind in self.kinds]
        blocks = [
            Text("Check against plain autograd", "label"),
            Text(verdict(self), "lead"),
            Table(caption(self), [*HEAD], rows, frozenset([0, 1])),
            Text(note(self), "note"),
            Items(facts(self)),
        ]
        return render("notebook.html.jinja", blocks=blocks)


@wraps(compare_with_autograd)
def check(*args: Any, **kwargs: Any) -> ShownCheck:
    """Run `geffect_fast.measure.check.check`, with a result that shows itself.

    The docstring of that function replaces this one.
    """
    return ShownCheck(**vars(compare_with_autograd(*args, **kwargs)))
