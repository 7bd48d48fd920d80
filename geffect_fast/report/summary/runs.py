"""Numbers of several runs side by side: a row a run, with intervals, and as CSV."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.format import Interval
from geffect_fast.report.summary.effects import bounds_of, interval_at, labels
from geffect_fast.report.summary.steps import Agreement, Outcome, by_column, cost_spread
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import has_intervals, interval_of, risk_spreads
from geffect_fast.storage.csv_cells import write_csv
from geffect_fast.storage.run_folder import COMPARISON

if TYPE_CHECKING:
    import xarray as xr


def comparison_rows(runs: xr.Dataset) -> list[dict[str, Any]]:
    """A row for each run of a comparison, its columns by name.

    The columns are `risk_*` at the last step, `rise_*` since the first step, `sum_of_effects_*`
    over the steps, `correlation_*` of the first-order prediction by the actual update with the
    measured changes, `cost`, `verdict`, `equal_removal` and `harm_at_equal_removal`.
    `equal_removal` is the largest rise of the forget risk that every run reaches.
    `harm_at_equal_removal` is the rise of the worst other risk when the forget risk first had
    risen by `equal_removal`.
    """
    removal, harms = at_equal_removal(runs)
    risks, rows = labels(runs, "risk"), []
    for at, name in enumerate(labels(runs, "run")):
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
    """Intervals of the columns of `comparison_rows`, by name for each run; NaN: not known.

    `risk_*`, `rise_*`, `sum_of_effects_*`, `cost` and `harm_at_equal_removal` have intervals. The
    interval of a sum of effects adds up the bounds of the steps, as the rows are the same at each
    step. It is at least as wide as the sum's own interval.
    """
    of_last, of_sum = bounds_of(runs, "risk_value"), bounds_of(runs, "g_effect")
    of_last = None if of_last is None else of_last[:, :, -1]
    of_sum = None if of_sum is None else of_sum.sum(axis=2)
    spreads, found = comparison_spreads(runs), []
    for i, row in enumerate(comparison_rows(runs)):
        of = {
            f"{name}_{risk}": interval_at(bounds, i, m)
            for name, bounds in (("risk", of_last), ("sum_of_effects", of_sum))
            for m, risk in enumerate(labels(runs, "risk"))
        }
        of |= {name: interval_of(row[name], spread[i]) for name, spread in spreads.items()}
        found.append(of)
    return found


def comparison_spreads(runs: xr.Dataset) -> dict[str, np.ndarray]:
    """Amounts by which rows of data move columns of `comparison_rows`, `(run, rows)` by name.

    The columns are `rise_*`, `cost` and `harm_at_equal_removal`. There are 0 rows where the
    intervals are not known.
    """
    risks = labels(runs, "risk")
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
            last, way = _crossing(rises[:, unlearn], target)
            harm, between = (_between(of, last, way) for of in (rises, moved))
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


def at_equal_removal(runs: xr.Dataset) -> tuple[float, list[float]]:
    """The largest rise of the forget risk that every run reaches, and each run's harm there.

    Harm is the rise of the worst other risk, on a straight line between two steps. All numbers are
    NaN where a run never raises the forget risk, or there is no other risk.
    """
    values = runs["risk_value"].transpose("run", "step", "risk").values
    with np.errstate(invalid="ignore"):  # infinity less infinity
        rises = values - values[:, :1]
    at = labels(runs, "risk").index(UNLEARN)
    removed = np.where(np.isfinite(rises[..., at]), rises[..., at], -np.inf)
    target = float(removed.max(axis=1).min())
    if target <= 0 or rises.shape[-1] < 2:
        return math.nan, [math.nan] * len(rises)
    there = (_between(rise, *_crossing(rise[:, at], target)) for rise in rises)
    return target, [float(np.delete(rise, at).max()) for rise in there]


def _crossing(removed: np.ndarray, target: float) -> tuple[int, float]:
    """The step at which a rise first reaches a target, by index, and the way to it from 0 to 1.

    The way is the part of the distance from the step before at which the target lies.
    """
    last = int((np.where(np.isfinite(removed), removed, -np.inf) >= target).argmax())
    before, after = removed[last - 1], removed[last]
    return last, float((target - before) / (after - before))


def _between(values: np.ndarray, last: int, way: float) -> np.ndarray:
    """Values at `way`, from 0 to 1, on a straight line from the step before `last` to `last`."""
    between: np.ndarray = values[last - 1] + way * (values[last] - values[last - 1])
    return between


def _correlation(run: xr.Dataset, risk: str) -> float:
    if "predicted_update" not in run:
        return math.nan
    one = run.sel(risk=risk)
    steps, measured = one["step"].values, one["measured_change"].values
    return Agreement.of(measured, one["predicted_update"].values, steps).correlation


def write_comparison(runs: xr.Dataset, folder: Path) -> None:
    """Write `summary.csv` (a row a run) and `compare.csv` (run and step) into a folder.

    Args:
        runs: result of `geffect_fast.compare`.
        folder: an existing folder.
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
    write_csv(table, folder / COMPARISON)
