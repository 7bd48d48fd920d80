"""The tables of a profile for the terminal: totals, parts of the model, conflicts, instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from geffect_fast.report.format import in_metric, number, question
from geffect_fast.report.summary.conflicts import CAPTION, Conflicts
from geffect_fast.report.summary.effects import by_place, by_sample, labels, shares
from geffect_fast.report.summary.objectives import summarise
from geffect_fast.report.summary.place_conflicts import (
    BY_POSITION,
    BY_TOKEN,
    PLACES_NOTE,
    PlaceConflicts,
)
from geffect_fast.report.tables.cells import (
    covered,
    effect_cells,
    verdict_cell,
)
from geffect_fast.report.tables.fitted import FittedTable
from geffect_fast.results.risks import UNLEARN, effect_name, symbol

if TYPE_CHECKING:
    import xarray as xr

NOTE = (
    "A descent step of size lr changes a risk by -lr·e. collateral: rise of the worst other risk "
    "for a unit rise of the forget risk. Magnitudes of e do not compare between objectives: npo "
    "and dpo are made of sums over whole sequences, most others of means over tokens. Cosines and "
    "collateral do compare."
)


def render_profile(dataset: xr.Dataset, places: PlaceConflicts | None = None) -> RenderableType:
    """All tables of a result, for `rich.console.Console.print`.

    Args:
        dataset: the result without positions or tokens.
        places: conflicts with the retain risk by place; None: not measured.
    """
    groups = (group_table(dataset, risk) for risk in labels(dataset, "risk"))
    by_place = () if places is None else place_conflict_tables(places)
    more = (conflict_table(dataset), *by_place, instance_table(dataset))
    tables = [table for table in (*groups, *more) if table is not None]
    return Group(
        totals_table(dataset), Text(NOTE, style="dim"), Text(), *covered(dataset.attrs), *tables
    )


def totals_table(dataset: xr.Dataset) -> FittedTable:
    """A table with a row an objective: every risk's effect and cosine, collateral, verdict."""
    rows = summarise(dataset)
    table = FittedTable(
        f"G-effect of {len(rows)} objectives on {dataset.attrs['n_forget']} forget rows"
        f"{in_metric(dataset.attrs)}",
        [
            "objective",
            *map(effect_name, rows[0].effects),
            *(f"cos_{symbol(risk)}" for risk in rows[0].cosines),
            "collateral",
            "verdict",
        ],
        ["objective", "verdict"],
    )
    for row in rows:
        *effects, collateral = effect_cells(row.numbers)
        cosines = (number(c, "+.2f") for c in row.cosines.values())
        table.add_row(row.objective, *effects, *cosines, collateral, verdict_cell(row.verdict))
    return table


def group_table(dataset: xr.Dataset, risk: str) -> FittedTable | None:
    """A table of signed shares of the effect on one risk by part; None where parts are summed."""
    placed = by_place(dataset, blocks=False)
    if placed is None:
        return None
    parts, values = placed
    table = FittedTable(
        f"Where {effect_name(risk)} comes from: share of each part, sizes adding to 100 %",
        ["objective", *(part.replace("_", " ") for part in parts)],
        ["objective"],
    )
    of_risk = shares(values[:, labels(dataset, "risk").index(risk)])
    for objective, row in zip(labels(dataset, "objective"), of_risk, strict=True):
        table.add_row(objective, *(number(100 * share, "+.0f") for share in row))
    return table


def conflict_table(dataset: xr.Dataset) -> FittedTable | None:
    """A table of conflicts with the retain risk by part of the model; None if not measured."""
    found = Conflicts.of(dataset)
    if found is None:
        return None
    heads = (part.replace("_", " ") for part in found.parts)
    table = FittedTable(CAPTION, ["objective", *heads], ["objective"])
    for name, shares_of in found.rows().items():
        table.add_row(name, *(number(share, ".0f") for share in shares_of))
    return table


def place_conflict_tables(found: PlaceConflicts) -> list[RenderableType]:
    """Tables of conflicts with the retain risk by position, and of the tokens behind them."""
    table = FittedTable(BY_POSITION, ["objective", *found.spans], ["objective"])
    for name, shares_of in found.opposed.items():
        table.add_row(name, *(number(share, ".0f") for share in shares_of))
    tables: list[RenderableType] = [table]
    if found.rows:
        words = ["objective", "tokens"]
        of_rows = FittedTable(BY_TOKEN, ["objective", "row", "tokens"], words)
        for cells in found.rows:
            of_rows.add_row(*map(Text, cells))
        tables.append(of_rows)
    return [*tables, Text(PLACES_NOTE, style="dim"), Text()]


def instance_table(dataset: xr.Dataset) -> FittedTable | None:
    """A table of the forget row each objective forgets most, and of the one that costs most."""
    effect = by_sample(dataset)
    if effect is None or not effect.sizes["sample"]:
        return None
    objectives = labels(dataset, "objective")
    wanted = {UNLEARN: "forgotten most", "retain": "costs the rest most"}
    present = [risk for risk in wanted if risk in effect["risk"].values]
    heads = ["objective", *(wanted[risk] for risk in present)]
    table = FittedTable("Instances: row, share of the effect, question", heads, heads)
    for objective in objectives:
        of_risks = (effect.sel(objective=objective, risk=risk) for risk in present)
        table.add_row(objective, *map(_extreme, of_risks))
    return table


def _extreme(effect: xr.DataArray) -> str:
    """The cell of the row of most negative effect, among effects `(sample,)`."""
    share = shares(effect.values)
    if not np.isfinite(share).all() or not (share < 0).any():
        return "none"
    i = int(share.argmin())
    row, percent = effect["sample"].values[i], number(100 * share[i], "+.0f")
    return f"{row}  {percent}%  {question(effect, i, 34)}".rstrip()
