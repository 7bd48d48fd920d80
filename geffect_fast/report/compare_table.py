"""Several runs side by side in numbers: a row a run, for the terminal and as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from geffect_fast.report.steps import Agreement, Outcome, by_column
from geffect_fast.report.summary import UNLEARN
from geffect_fast.report.table import STYLES, new_table, number, symbol

if TYPE_CHECKING:
    import xarray as xr

NOTE = (
    "R: risk at the last step, and its rise since the first. Σe: sum of the effects over these "
    "steps. cost: rise of the worst other risk for a unit rise of the forget risk, from the "
    "first step to the last. r: correlation of the first-order prediction by the actual "
    "update with the measured changes of the forget risk. Learning rates differ between runs as "
    "they were chosen: compare costs, and trade_off.png."
)


def comparison_rows(runs: xr.Dataset) -> list[dict[str, Any]]:
    """What `geffect_fast.compare` found as a row a run, its columns by name.

    `risk_*` at the last step, `rise_*` since the first, `sum_of_effects_*` over the steps,
    `correlation_*` of the first-order prediction by the actual update, `cost`, `verdict`.
    """
    risks = [str(risk) for risk in runs["risk"].values]
    rows = []
    for at, name in enumerate(map(str, runs["run"].values)):
        run = runs.isel(run=at)
        values = run["risk_value"].transpose("step", "risk").values
        outcome = Outcome.of(values, risks)
        effects = run["g_effect"].sum("step", skipna=False)
        row: dict[str, Any] = {"run": name, "objective": str(run["objective"].item())}
        row |= {f"risk_{risk}": values[-1, m] for m, risk in enumerate(risks)}
        row |= {f"rise_{risk}": rise for risk, rise in outcome.change.items()}
        row |= {f"sum_of_effects_{risk}": float(effects.sel(risk=risk)) for risk in risks}
        row |= {f"correlation_{risk}": _correlation(run, risk) for risk in risks}
        rows.append(row | {"cost": outcome.cost, "verdict": outcome.verdict})
    return rows


def _correlation(run: xr.Dataset, risk: str) -> float:
    if "predicted_update" not in run:
        return float("nan")
    one = run.sel(risk=risk)
    steps, measured = one["step"].values, one["measured_change"].values
    return Agreement.of(measured, one["predicted_update"].values, steps).correlation


def render_comparison(runs: xr.Dataset) -> Group:
    """The table of a comparison, for `rich.console.Console.print`."""
    risks = [str(risk) for risk in runs["risk"].values]
    steps = runs["step"].values
    table = new_table(
        f"{runs.sizes['run']} runs at the {len(steps)} steps they share, {steps[0]} to {steps[-1]}"
    )
    table.add_column("run", overflow="fold", min_width=12)
    for risk in risks:
        table.add_column(f"R_{symbol(risk)}", justify="right", no_wrap=True)
        table.add_column("rise", justify="right", no_wrap=True)
    for risk in risks:
        table.add_column(f"Σe_{symbol(risk)}", justify="right", no_wrap=True)
    for head in ("cost", "r"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in comparison_rows(runs):
        cells = []
        for risk in risks:
            cells += [number(row[f"risk_{risk}"], ".3g"), number(row[f"rise_{risk}"], "+.2g")]
        table.add_row(
            row["run"],
            *cells,
            *(number(row[f"sum_of_effects_{risk}"], "+.2g") for risk in risks),
            number(row["cost"], ".2f"),
            number(row[f"correlation_{UNLEARN}"], ".2f"),
            Text(row["verdict"], style=STYLES.get(row["verdict"], "")),
        )
    lines = [Text(f"Left out, as not all runs have it: {line}.") for line in runs.left_out]
    return Group(table, Text(NOTE, style="dim"), *lines)


def write_comparison(runs: xr.Dataset, folder: Path) -> None:
    """Write `summary.csv` (a row a run), `compare.csv` (run and step) and `plots/` into a folder.

    Args:
        runs: of `geffect_fast.compare`.
        folder: exists.
    """
    import pandas as pd

    from geffect_fast.report.compare_plots import comparison_figures
    from geffect_fast.report.curves import save_figures

    pd.DataFrame(comparison_rows(runs)).to_csv(folder / "summary.csv", index=False)
    columns = by_column(runs, "risk")
    if "group" in runs.dims:
        columns = by_column(columns, "group")
    columns.to_dataframe(dim_order=["run", "step"]).to_csv(folder / "compare.csv")
    plots = folder / "plots"
    plots.mkdir()
    save_figures(comparison_figures(runs), plots)
