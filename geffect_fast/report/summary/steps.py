"""Numbers of a step result: totals in arrays, the run's outcome, predictions against changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.format import UNKNOWN, Interval
from geffect_fast.report.summary.effects import bounds_of, labels, total
from geffect_fast.report.summary.objectives import collateral_noise, collateral_of, verdict_of
from geffect_fast.results.intervals import NEGLIGIBLE, Z
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import interval_of
from geffect_fast.storage.csv_cells import write_csv

if TYPE_CHECKING:
    import xarray as xr

PREDICTIONS = {
    "predicted_update": "by the actual update",
    "predicted_step": "by the optimizer's step, −lr·e_P",
    "predicted_second": "by the optimizer's step, to second order",
    "predicted_sgd": "by SGD, −lr·e",
}
"""The predictions of a step result, and their names in tables and sentences."""

CLOSE = 0.95
"""The least correlation of a prediction that holds in size."""
FACTOR, WORST_FACTOR = 1.5, 3.0
"""A prediction holds in size where most predicted changes and their sum are within the first factor
of the measured ones, and none is beyond the second. Changes of next to nothing do not count."""
SMALL = 0.05
"""A measured change and its prediction are next to nothing where both are below this share of the
largest change or prediction."""
HALF, MOST = 0.5, 0.9
"""The largest relative error of a good prediction, and the least share of predictions that count as
most."""
FEW = 3
"""The fewest changes that tell something about a correlation."""


def lead_objective(dataset: xr.Dataset) -> str:
    """The objective that the model was trained on, or else the first."""
    objectives = labels(dataset, "objective")
    trained = str(dataset.attrs.get("trained_objective", ""))
    return trained if trained in objectives else objectives[0]


@dataclass(frozen=True)
class Steps:
    """A step result in arrays.

    Attributes:
        steps: `(S,)` optimizer updates done.
        objectives: strings of K objectives, the trained one (or else the first) in front.
        risks: names of M risks.
        effects: G-effects of the whole forget data `(S, K, M)`.
        values: values of the risks `(S, M)`.
        effect_bounds: low and high bounds of the effects' intervals, `(2, S, K, M)`; None: not
            known.
        value_bounds: bounds of the risks' values, `(2, S, M)`, likewise.
        collateral_bounds: bounds of collateral, `(2, S, K)`, likewise.
    """

    steps: np.ndarray
    objectives: list[str]
    risks: list[str]
    effects: np.ndarray
    values: np.ndarray
    effect_bounds: np.ndarray | None = None
    value_bounds: np.ndarray | None = None
    collateral_bounds: np.ndarray | None = None

    @staticmethod
    def of(dataset: xr.Dataset) -> Steps:
        """Read a step result."""
        lead = lead_objective(dataset)
        given = labels(dataset, "objective")
        order = sorted(range(len(given)), key=lambda k: given[k] != lead)
        of_effects, of_collateral = (bounds_of(dataset, n) for n in ("g_effect", "collateral"))
        return Steps(
            dataset["step"].values,
            [given[k] for k in order],
            labels(dataset, "risk"),
            total(dataset)[:, order],
            dataset["risk_value"].transpose("step", "risk").values,
            None if of_effects is None else of_effects[:, :, order],
            bounds_of(dataset, "risk_value"),
            None if of_collateral is None else of_collateral[:, :, order],
        )


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: changes of the risks from the first step to the last.

    Attributes:
        start: risks at the first step, by name.
        change: rise of each risk, by name.
        cost: rise of the worst other risk for a unit rise of the forget risk; NaN where the forget
            risk did not rise.
        verdict: a verdict of the words that summaries of objectives use.
        cost_interval: interval of `cost`, by the choice of rows; NaN where it is not known.
    """

    start: dict[str, float]
    change: dict[str, float]
    cost: float
    verdict: str
    cost_interval: Interval = UNKNOWN

    @staticmethod
    def of(values: np.ndarray, risks: list[str], spreads: np.ndarray | None = None) -> Outcome:
        """Make the outcome of the values of M risks over S steps.

        Args:
            values: the risks' values, `(S, M)`.
            risks: names of the risks.
            spreads: how far each row moves the values, `(S, M, rows)`, as
                `told_apart.risk_spreads` gives it.
        """
        start = dict(zip(risks, map(float, values[0]), strict=True))
        with np.errstate(invalid="ignore"):  # infinity less infinity
            change = dict(zip(risks, map(float, values[-1] - values[0]), strict=True))
        effects = {risk: -rise for risk, rise in change.items()}
        finite = values[np.isfinite(values)]
        negligible = NEGLIGIBLE * float(np.abs(finite).max(initial=0.0))
        cost = collateral_of(effects, negligible)
        moved = np.zeros((len(risks), 0)) if spreads is None else spreads[-1] - spreads[0]
        low, high = interval_of(change[UNLEARN], moved[risks.index(UNLEARN)])
        of_cost = cost_spread(change, cost, moved)
        harm = interval_of(cost, of_cost)
        verdict = verdict_of(effects, {}, cost, negligible, (-high, -low), harm)
        return Outcome(start, change, cost, verdict, harm)


def cost_spread(change: dict[str, float], cost: float, moved: np.ndarray) -> np.ndarray:
    """The amounts by which each row moves an outcome's cost, `(rows,)`.

    Args:
        change: rise of each of M risks.
        cost: cost of these rises.
        moved: how far each row moves the rises, `(M, rows)`.
    """
    effects = {risk: -rise for risk, rise in change.items()}
    return collateral_noise(effects, cost, np.zeros(len(effects)), -moved)[1]


@dataclass(frozen=True)
class Agreement:
    """A first-order prediction of a risk's changes beside the changes measured.

    Attributes:
        n: steps where both are finite.
        correlation: Pearson's, over these steps; NaN with fewer than three steps or without
            variation.
        same_sign: share of these steps where both have the same sign.
        error: median of |measured - predicted| / |measured|.
        sure_sign: lower bound of the 95 % interval of `same_sign` (Wilson).
        in_size: whether predictions are within the stated factors of what was measured.
        until: the last step up to which nine tenths of the predictions are off by at most a half;
            None where there is no such step, or where it is the last of all.
    """

    n: int
    correlation: float
    same_sign: float
    error: float
    until: int | None
    sure_sign: float = math.nan
    in_size: bool = False

    @staticmethod
    def of(measured: np.ndarray, predicted: np.ndarray, steps: np.ndarray) -> Agreement:
        """Compare changes with their predictions.

        Args:
            measured: measured change of the risk that led to each step, `(S,)`; NaN: none.
            predicted: predicted change, `(S,)`; NaN: none.
            steps: the steps, `(S,)`.
        """
        both = np.isfinite(measured) & np.isfinite(predicted)
        x, y = predicted[both], measured[both]
        n = int(both.sum())
        if n == 0:
            return Agreement(0, math.nan, math.nan, math.nan, None)
        correlation = math.nan
        if n >= FEW:
            # scaled by the largest size of each, so that squares neither overflow nor vanish
            x0, y0 = (v / (np.abs(v).max() or 1.0) for v in (x, y))
            x0, y0 = x0 - x0.mean(), y0 - y0.mean()
            scale = math.sqrt(float(x0 @ x0) * float(y0 @ y0))
            correlation = float(x0 @ y0) / scale if scale > 1e-12 else math.nan
        moved = y != 0
        error = math.nan
        if moved.any():
            error = float(np.median(np.abs(1 - x[moved] / y[moved])))
        same_sign = float((np.sign(x) == np.sign(y)).mean())
        good = np.cumsum(np.abs(y - x) <= HALF * np.abs(y)) / np.arange(1, n + 1) >= MOST
        last = int(np.flatnonzero(good)[-1]) if good.any() else -1
        until = None if last in (-1, n - 1) else int(steps[both][last])
        sure_sign = _wilson_low(same_sign, n)
        return Agreement(n, correlation, same_sign, error, until, sure_sign, _in_size(x, y))

    @property
    def words(self) -> str:
        """Words on how far to trust the prediction."""
        if self.n < FEW or math.isnan(self.correlation):
            return "too few or too equal changes to tell"
        signs = self.same_sign >= MOST and self.sure_sign > 0.5
        if signs and self.correlation >= CLOSE and self.in_size:
            return f"trust it in sign and size: within a factor of {FACTOR:g}"
        up_to = "" if self.until is None else f"; within 50 % up to step {self.until}"
        if signs:
            return f"trust its sign, not its size{up_to}"
        return f"do not trust it: steps too large or too noisy for first order{up_to}"


def _wilson_low(share: float, n: int) -> float:
    """Lower bound of the Wilson interval of a share that was found in `n` cases."""
    middle, width = share + Z**2 / (2 * n), share * (1 - share) / n + Z**2 / (4 * n**2)
    return (middle - Z * math.sqrt(width)) / (1 + Z**2 / n)


def _in_size(predicted: np.ndarray, measured: np.ndarray) -> bool:
    """Whether predictions have the sign of the changes, and sizes within the stated factors."""

    def within(x: np.ndarray, y: np.ndarray, factor: float) -> np.ndarray:
        size_x, size_y = np.abs(x), np.abs(y)
        same = np.sign(x) == np.sign(y)
        return same & (size_x <= factor * size_y) & (size_y <= factor * size_x)

    size = np.maximum(np.abs(predicted), np.abs(measured))
    counts = size >= SMALL * size.max()
    x, y = predicted[counts], measured[counts]
    return bool(
        within(x, y, FACTOR).mean() >= MOST
        and within(x, y, WORST_FACTOR).all()
        and within(x.sum(), y.sum(), FACTOR)
    )


def agreements(dataset: xr.Dataset) -> dict[str, dict[str, Agreement]]:
    """An `Agreement` for every prediction that a step result holds, and every risk."""
    there = (name for name in PREDICTIONS if name in dataset)
    return {
        name: {
            risk: Agreement.of(
                dataset["measured_change"].sel(risk=risk).values,
                dataset[name].sel(risk=risk).values,
                dataset["step"].values,
            )
            for risk in labels(dataset, "risk")
        }
        for name in there
        if np.isfinite(dataset[name].values).any()
    }


def write_step_summary(dataset: xr.Dataset, file: Path) -> None:
    """Write a CSV with a row a step and objective.

    Its columns are effects, risks, changes, predictions, norms and cosines, and the numbers of
    metrics on each data set, where they were measured. Numbers that belong to a step alone are
    repeated for each of its objectives.
    """
    axes = ("step", "objective", "risk")
    kept = [str(name) for name in dataset if set(dataset[name].dims) <= set(axes)]
    columns = dataset[kept].assign(g_effect=(axes, total(dataset)))
    columns = by_column(columns.drop_vars(set(columns.coords) - set(axes)), "risk")
    for metric, name in [] if "measure" not in dataset else _measured(dataset):
        number = dataset["measure"].sel(metric=metric, measured_set=name, drop=True)
        columns[f"{metric}_{name}"] = number
    write_csv(columns.to_dataframe(dim_order=["step", "objective"]).reset_index(), file)


def _measured(dataset: xr.Dataset) -> list[tuple[str, str]]:
    """Pairs of a metric and a set with a number at some step."""
    known = dataset["measure"].notnull().any("step")
    return [
        (str(metric), str(name))
        for metric in dataset["metric"].values
        for name in dataset["measured_set"].values
        if bool(known.sel(metric=metric, measured_set=name))
    ]


def by_column(dataset: xr.Dataset, axis: str) -> xr.Dataset:
    """The dataset with a variable `name_label` for each label of an axis, for tables."""
    columns = {}
    for name, values in dataset.items():
        if axis not in values.dims:
            columns[str(name)] = values
            continue
        for label in dataset[axis].values:
            columns[f"{name}_{label}"] = values.sel({axis: label}, drop=True)
    return dataset.drop_dims(axis).assign(columns)
