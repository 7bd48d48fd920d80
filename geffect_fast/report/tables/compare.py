"""Several runs side by side in numbers: a row a run, for the terminal and as CSV."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.text import Text

from geffect_fast.report.summary.objectives import UNKNOWN, UNLEARN, Interval
from geffect_fast.report.summary.steps import Agreement, Outcome, bounds_of, by_column, cost_spread
from geffect_fast.report.tables.profile import (
    STYLES,
    interval_line,
    new_table,
    number,
    symbol,
    with_interval,
)
from geffect_fast.results.told_apart import (
    has_intervals,
    interval_of,
    precision_error,
    risk_spreads,
)
from geffect_fast.storage.csv_cells import write_csv

if TYPE_CHECKING:
    import xarray as xr

NOTE = (
    "R: risk at the last step, and its rise since the first. Σe: sum of the effects over these "
    "steps. cost: rise of the worst other risk for a unit rise of the forget risk, from the first "
    "step to the last. harm at: rise of the worst other risk when the forget risk first had risen "
    "by as much as it does in every run. r: correlation of the first-order prediction by the "
    "actual update with the measured changes of the forget risk. Learning rates differ between "
    "runs as they were chosen: compare harm and cost."
)


def comparison_rows(runs: xr.Dataset) -> list[dict[str, Any]]:
    """What `geffect_fast.compare` found as a row a run, its columns by name.

    `risk_*` at the last step, `rise_*` since the first, `sum_of_effects_*` over the steps,
    `correlation_*` of the first-order prediction by the actual update, `cost`, `verdict`;
    `harm_at_equal_removal`, the rise of the worst other risk when the forget risk first had risen
    by `equal_removal`, the most that it does in every run.
    """
    removal, harms = at_equal_removal(runs)
    risks = [str(risk) for risk in runs["risk"].values]
    rows = []
    for at, name in enumerate(map(str, runs["run"].values)):
        run = runs.isel(run=at)
        values = run["risk_value"].transpose("step", "risk").values
        outcome = Outcome.of(values, risks, risk_spreads(run))
        effects = run["g_effect"].sum("step", skipna=False)
        row: dict[str, Any] = {"run": name, "objective": str(run["objective"].item())}
        row |= {f"risk_{risk}": values[-1, m] for m, risk in enumerate(risks)}
        row |= {f"rise_{risk}": rise for risk, rise in outcome.change.items()}
        row |= {f"sum_of_effects_{risk}": float(effects.sel(risk=risk)) for risk in risks}
        row |= {f"correlation_{risk}": _correlation(run, risk) for risk in risks}
        row |= {"equal_removal": removal, "harm_at_equal_removal": harms[at]}
        rows.append(row | {"cost": outcome.cost, "verdict": outcome.verdict})
    return rows


def comparison_intervals(runs: xr.Dataset) -> list[dict[str, Interval]]:
    """Those of columns of `comparison_rows`, by name, a run each; NaN where they are not known.

    Of `risk_*`, `rise_*`, `sum_of_effects_*`, `cost` and `harm_at_equal_removal`. That of a sum of
    effects adds up the bounds of its steps, as the rows are the same at each: it is no narrower
    than the sum's own.
    """
    risks = [str(risk) for risk in runs["risk"].values]
    spreads = comparison_spreads(runs)
    of_risks, of_effects = (bounds_of(runs, name) for name in ("risk_value", "g_effect"))
    found = []
    for i, row in enumerate(comparison_rows(runs)):
        of: dict[str, Interval] = {}
        for name, bounds in (
            ("risk", None if of_risks is None else of_risks[:, i, -1]),
            ("sum_of_effects", None if of_effects is None else of_effects[:, i].sum(axis=1)),
        ):
            for m, risk in enumerate(risks):
                low, high = UNKNOWN if bounds is None else bounds[:, m].tolist()
                of[f"{name}_{risk}"] = low, high
        of |= {name: interval_of(row[name], spread[i]) for name, spread in spreads.items()}
        found.append(of)
    return found


def comparison_spreads(runs: xr.Dataset) -> dict[str, np.ndarray]:
    """What rows move columns of `comparison_rows` by, `(run, rows)` by name; 0 rows: not known.

    Of `rise_*`, `cost` and `harm_at_equal_removal`.
    """
    risks = [str(risk) for risk in runs["risk"].values]
    unlearn = risks.index(UNLEARN)
    target, _ = at_equal_removal(runs)
    found: dict[str, list[np.ndarray]] = {}
    for at in range(runs.sizes["run"]):
        run = runs.isel(run=at)
        values, spreads = run["risk_value"].transpose("step", "risk").values, risk_spreads(run)
        rises, moved = values - values[:1], spreads - spreads[:1]
        outcome = Outcome.of(values, risks)
        of_harm = np.zeros(moved.shape[-1])
        if math.isfinite(target):
            last, part = _crossing(rises[:, unlearn], target)
            between = moved[last - 1] + part * (moved[last] - moved[last - 1])
            harm = rises[last - 1] + part * (rises[last] - rises[last - 1])
            worst = max((m for m in range(len(risks)) if m != unlearn), key=harm.__getitem__)
            steps = rises[last] - rises[last - 1]
            of_harm = between[worst] - steps[worst] / steps[unlearn] * between[unlearn]
        for name, spread in (
            *((f"rise_{risk}", moved[-1, m]) for m, risk in enumerate(risks)),
            ("cost", cost_spread(outcome.change, outcome.cost, moved[-1])),
            ("harm_at_equal_removal", of_harm),
        ):
            found.setdefault(name, []).append(spread)
    return {name: np.stack(spreads) for name, spreads in found.items()}


def _crossing(removed: np.ndarray, target: float) -> tuple[int, float]:
    """The place where a rise first reaches a target, and the part of the way to it from before."""
    there = np.where(np.isfinite(removed), removed, -np.inf) >= target
    last = int(there.argmax())
    before, after = removed[last - 1], removed[last]
    return last, float((target - before) / (after - before))


def at_equal_removal(runs: xr.Dataset) -> tuple[float, list[float]]:
    """The largest rise of the forget risk that every run reaches, and each one's harm there.

    Harm is the rise of the worst other risk, on a straight line between two steps. All are NaN
    where a run never raises the forget risk, or there is no other risk.
    """
    values = runs["risk_value"].transpose("run", "step", "risk")
    with np.errstate(invalid="ignore"):  # infinity less infinity
        rises = values.values - values.values[:, :1]
    at = [str(risk) for risk in runs["risk"].values].index(UNLEARN)
    removed = np.where(np.isfinite(rises[..., at]), rises[..., at], -np.inf)
    target = float(removed.max(axis=1).min())
    if target <= 0 or rises.shape[-1] < 2:
        return math.nan, [math.nan] * len(rises)
    harms = []
    for rise in rises:
        last, part = _crossing(rise[:, at], target)
        others = np.delete(rise[last - 1] + part * (rise[last] - rise[last - 1]), at)
        harms.append(float(others.max()))
    return target, harms


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
    few = len(risks) == 2  # of more there is no room for all
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
    for head, *_ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("r", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row, of in zip(rows, intervals, strict=True):
        verdict = row["verdict"] if plain else row["verdict"].replace(", ", ",\n")
        table.add_row(
            row["run"],
            *(_stacked(row[name], of[name], spec) for _, name, spec in columns),
            number(row[f"correlation_{UNLEARN}"], ".2f"),
            Text(verdict, style=STYLES.get(row["verdict"], "")),
        )
    lines = [Text(f"Left out, as not all runs have it: {line}.") for line in runs.left_out]
    if share := precision_error(runs.attrs):
        lines.append(Text(f"Precision: effects in 16 bits may be off by {100 * share:.2g} %."))
    if drawn := interval_line(runs.attrs):
        lines.append(Text(drawn))
    return Group(table, Text(NOTE, style="dim"), *lines)


def _stacked(value: float, interval: Interval, spec: str) -> Text:
    """A number with the bounds of its interval below each other, as many stand in a row."""
    text = with_interval(value, interval, spec)
    return Text("\n").join(text.split(" "))


def write_comparison(runs: xr.Dataset, folder: Path) -> None:
    """Write `summary.csv` (a row a run) and `compare.csv` (run and step) into a folder.

    Args:
        runs: of `geffect_fast.compare`.
        folder: exists.
    """
    import pandas as pd

    rows = comparison_rows(runs)
    if has_intervals(runs):
        for row, intervals in zip(rows, comparison_intervals(runs), strict=True):
            for name, bounds in intervals.items():
                row |= zip((f"{name}_low", f"{name}_high"), bounds, strict=True)
    write_csv(pd.DataFrame(rows), folder / "summary.csv")
    columns = by_column(runs.drop_vars("risk_value_spread", errors="ignore"), "risk")
    if "group" in runs.dims:
        columns = by_column(columns, "group")
    table = columns.to_dataframe(dim_order=["run", "step"]).reset_index()
    write_csv(table, folder / "compare.csv")
