"""The table of several runs for the terminal: a row a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from geffect_fast.report.format import interval_line, number
from geffect_fast.report.summary.effects import labels
from geffect_fast.report.summary.runs import comparison_intervals, comparison_rows
from geffect_fast.report.tables.cells import verdict_cell, with_interval
from geffect_fast.report.tables.fitted import FittedTable
from geffect_fast.results.risks import UNLEARN, symbol
from geffect_fast.results.told_apart import has_intervals, precision_error

if TYPE_CHECKING:
    import xarray as xr

NOTE = (
    "R: risk at the last step, and its rise since the first. Σe: sum of the effects over these "
    "steps. cost: rise of the worst other risk for a unit rise of the forget risk, from the first "
    "step to the last. harm at: rise of the worst other risk when the forget risk first had risen "
    "by as much as it does in every run. r: correlation of the first-order prediction by the "
    "actual update with the measured changes of the forget risk. Runs may have learning rates of "
    "their own: compare harm and cost."
)


def render_comparison(runs: xr.Dataset) -> Group:
    """The table of a comparison, for `rich.console.Console.print`."""
    risks, steps = labels(runs, "risk"), runs["step"].values
    few = len(risks) == 2  # with more risks there is no room for all rises
    rows, intervals = comparison_rows(runs), comparison_intervals(runs)
    plain = not has_intervals(runs)
    removal, gap = rows[0]["equal_removal"], " " if plain else "\n"
    columns = []
    for risk in risks:
        columns.append((f"R_{symbol(risk)}", f"risk_{risk}", ".3g"))
        columns += [("rise", f"rise_{risk}", "+.2g")] * few
    columns += [(f"Σe_{symbol(risk)}", f"sum_of_effects_{risk}", "+.2g") for risk in risks[:2]]
    columns += [
        ("cost", "cost", ".2f"),
        (f"harm at{gap}{number(removal, '+.2g')}", "harm_at_equal_removal", "+.2g"),
    ]
    table = FittedTable(
        f"{runs.sizes['run']} runs at the {len(steps)} steps they share, {steps[0]} to {steps[-1]}",
        ["run", *(head for head, *_ in columns), "r", "verdict"],
        ["run", "verdict"],
    )
    for row, of in zip(rows, intervals, strict=True):
        name = Text(row["run"])
        if row["objective"] not in row["run"]:
            name.append(f"\n{row['objective']}", style="dim")
        table.add_row(
            name,
            *(with_interval(row[name], of[name], spec) for _, name, spec in columns),
            number(row[f"correlation_{UNLEARN}"], ".2f"),
            verdict_cell(row["verdict"]),
        )
    lines = [Text(f"Left out, as not all runs have it: {line}.") for line in runs.left_out]
    if share := precision_error(runs.attrs):
        lines.append(Text(f"Precision: effects in 16 bits may be off by {100 * share:.2g} %."))
    if drawn := interval_line(runs.attrs):
        lines.append(Text(drawn))
    return Group(table, Text(NOTE, style="dim"), *lines)
