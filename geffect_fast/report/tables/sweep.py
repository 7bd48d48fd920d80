"""The tables of a sweep for the terminal: the best of each family, and the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from geffect_fast.report.summary.effects import thinned
from geffect_fast.report.summary.sweep import NUMBERS, Swept
from geffect_fast.report.tables.cells import covered, effect_cells
from geffect_fast.report.tables.fitted import FittedTable

if TYPE_CHECKING:
    import xarray as xr

FRONT_SHOWN = 12
"""The most objectives of a front that the table lists."""

NOTE = (
    "e_u is the effect on the forget risk (below 0: it rises, as wanted), e_r on the retain risk "
    "(below 0: the rest is harmed). collateral: rise of the worst other risk for a unit rise of "
    "the forget risk, below 0 a gain; the least is that of values that remove at least a tenth of "
    "the family's most. The front compares steps of one size and so favours objectives of a large "
    "scale: npo and dpo sum over whole answers, most others are means over tokens. Collateral does "
    "not depend on scale."
)


def render_sweep(dataset: xr.Dataset) -> RenderableType:
    """All tables of a sweep, for `rich.console.Console.print`."""
    swept = Swept.of(dataset)
    parts: list[RenderableType] = [
        families_table(swept, int(dataset.attrs["n_forget"])),
        front_table(swept),
    ]
    hidden = int(swept.front.sum()) - len(_shown(swept))
    if hidden > 0:
        parts += [Text(f"and {hidden} more, marked in summary.csv"), Text()]
    parts += [Text(NOTE, style="dim"), Text(), *covered(dataset.attrs)]
    return Group(*parts)


def families_table(swept: Swept, n_forget: int) -> FittedTable:
    """A table of each family's values of strongest removal, least harm and least collateral."""
    n = len(swept.objectives)
    table = FittedTable(
        f"{n} objectives on {n_forget} forget rows: the best of each family",
        ["family", "at", *NUMBERS],
        ["family", "at"],
    )
    for family in swept.families:
        picks = swept.picks(family)
        if not family.axes:
            table.add_row(family.text, "", *effect_cells(swept.numbers(family.at[0])))
            continue
        table.add_row(family.text, "" if picks else "undefined (NaN)")
        for i, names in picks.items():
            what = Text("  " + ",\n  ".join(names), style="dim")
            table.add_row(what, family.point(i), *effect_cells(swept.numbers(family.at[i])))
    return table


def front_table(swept: Swept) -> FittedTable:
    """A table of the Pareto front, strongest removal first."""
    n = int(swept.front.sum())
    table = FittedTable(
        f"Pareto front: {n} not beaten in both removal and harm",
        ["objective", *NUMBERS],
        ["objective"],
    )
    for i in _shown(swept):
        table.add_row(swept.label(i), *effect_cells(swept.numbers(i)))
    return table


def _shown(swept: Swept) -> np.ndarray:
    """Indices of the front's objectives to list: of many, some of those that remove anything."""
    front = swept.ranked_front()
    if len(front) > FRONT_SHOWN:
        removing = front[swept.e_u[front] < 0]
        front = removing if len(removing) else front
    return thinned(front, FRONT_SHOWN)
