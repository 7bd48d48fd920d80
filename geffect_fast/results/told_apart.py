"""Tests of whether two numbers differ by more than rounding and the choice of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.results.intervals import Z, stretch
from geffect_fast.results.risks import UNLEARN

if TYPE_CHECKING:
    import xarray as xr


def precision_error(attributes: Mapping[Any, Any]) -> float:
    """The relative rounding error of an effect, from a result's attributes; 0 if not stated."""
    return float(attributes.get("precision_error", 0.0))


def effect_errors(result: xr.Dataset) -> np.ndarray:
    """Bounds of the rounding error of the total effects, `(objective, risk)` fp64.

        precision_error * sum_i |e_i|

    The sum is over samples, since their shares may cancel while their errors need not. A result
    that sums over samples already has one total in place of the shares.

    Args:
        result: of `geffect_fast.profile` or `sweep`, at one step.
    """
    effect, share = result["g_effect"], precision_error(result.attrs)
    if not share:
        return np.zeros((effect.sizes["objective"], effect.sizes["risk"]))
    kept = [d for d in effect.dims if d in ("objective", "risk", "sample")]
    effect = effect.sum([d for d in effect.dims if d not in kept], skipna=False)
    size = abs(effect).sum([d for d in kept if d == "sample"], skipna=False)
    return share * size.transpose("objective", "risk").values


def effect_spreads(result: xr.Dataset) -> np.ndarray:
    """Change of the total effects by each row when rows are drawn, `(objective, risk, rows)`.

    The root of the sum of a number's squares is its standard deviation. For two objectives, which
    have the same rows, the same root of the differences is the standard deviation of their
    difference. The rows are those of the intervals in `geffect_fast.results.intervals`: those of
    the objectives' data, which count twice for the forget risk, and each other risk's own. A result
    without intervals gives 0 rows.

    Args:
        result: of `geffect_fast.profile` or `sweep`, at one step.
    """
    effect = result["g_effect"]
    if not has_intervals(result) or "sample" not in effect.dims:
        return np.zeros((effect.sizes["objective"], effect.sizes["risk"], 0))
    rest = [d for d in effect.dims if d not in ("objective", "risk", "sample")]
    rows = effect.sum(rest, skipna=False).transpose("objective", "risk", "sample").values
    risks = [str(risk) for risk in result["risk"].values]
    unlearn = risks.index(UNLEARN)
    spread = row_spreads(rows, result["set"].values) * times_counted(risks)[:, None]
    of_risks = result["risk_row_spread"].transpose("risk", "risk_row").values
    e_u = rows[:, unlearn].sum(-1)
    # Different risks have different rows, so each gets columns of its own.
    others = [m for m in range(len(of_risks)) if m != unlearn]
    apart = np.zeros((len(of_risks), len(others), of_risks.shape[1]))
    apart[others, range(len(others))] = of_risks[others]
    apart = apart.reshape(len(of_risks), -1)
    return np.concatenate([spread, e_u[:, None, None] * apart], axis=-1)


def row_spreads(rows: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Change of sums over rows by each row when the rows of data sets are drawn, `(..., n)`.

    Args:
        rows: each row's share of the sums, `(..., n)`.
        sets: the name of each row's data set, `(n,)`.
    """
    spread = np.empty_like(rows)
    for name in dict.fromkeys(sets.tolist()):
        own = rows[..., sets == name]
        middle = own.mean(axis=-1, keepdims=True)
        spread[..., sets == name] = (own - middle) * stretch(own.shape[-1])
    return spread


def times_counted(risks: Sequence[str]) -> np.ndarray:
    """How often effects on each risk count the rows that objectives read, `(M,)`.

    The effect on the forget risk counts them twice, as the forget rows make both of its gradients.
    """
    return np.where(np.array(risks) == UNLEARN, 2.0, 1.0)


def half_width(spread: np.ndarray) -> np.ndarray:
    """Half the width of a number's interval, from its change by each row, `(..., rows)`."""
    return Z * np.sqrt(np.square(spread).sum(-1))


def risk_spreads(result: xr.Dataset) -> np.ndarray:
    """Change of the risks by each row when rows are drawn, `(step, risk, rows)`.

    A result without intervals gives 0 rows.

    Args:
        result: the result of one run, with steps.
    """
    if "risk_value_spread" not in result:
        return np.zeros((result.sizes["step"], result.sizes["risk"], 0))
    spread = result["risk_value_spread"].transpose("step", "risk", "risk_sample").values
    n_steps, n_risks, n = spread.shape
    # Different risks have different rows, so each gets columns of its own.
    apart = np.zeros((n_steps, n_risks, n_risks, n))
    for m in range(n_risks):
        apart[:, m, m] = spread[:, m]
    return apart.reshape(n_steps, n_risks, -1)


def interval_of(value: float, spread: np.ndarray) -> tuple[float, float]:
    """The interval of a number, from its change by each row; NaN where there are 0 rows."""
    off = float(half_width(spread)) if spread.size else math.nan
    return value - off, value + off


def has_intervals(result: xr.Dataset) -> bool:
    """Whether a result has intervals for the choice of the rows."""
    return "g_effect_low" in result


def collateral_error(e_u: float, collateral: float, errors: tuple[float, float]) -> float:
    """The error of the ratio `e / e_u`, from the errors of `e` and `e_u`, in this order."""
    off, off_u = errors
    return (off + abs(collateral) * off_u) / abs(e_u) if e_u else math.nan


def ratio_spread(
    e_u: np.ndarray | float, ratio: np.ndarray | float, of_e: np.ndarray, of_e_u: np.ndarray
) -> np.ndarray:
    """Change of `e / e_u` by each row, from the changes of `e` and of `e_u`, `(..., rows)`."""
    e_u, ratio = np.asarray(e_u)[..., None], np.asarray(ratio)[..., None]
    return (of_e - ratio * of_e_u) / e_u


def told_apart(
    x: np.ndarray | float,
    y: np.ndarray | float,
    x_error: np.ndarray | float,
    y_error: np.ndarray | float,
    x_spread: np.ndarray | None = None,
    y_spread: np.ndarray | None = None,
) -> np.ndarray:
    """Whether numbers differ by more than rounding and the choice of the rows can explain.

    The larger of the two rounding errors counts, not their sum, since both numbers come from the
    same weights and data. They also come from the same rows, so the interval of their difference
    decides: it must not hold 0. Without errors and spreads any difference counts.

    Args:
        x, y: numbers.
        x_error, y_error: bounds of their rounding errors.
        x_spread, y_spread: their changes by each row, `(..., rows)`; None where not known.
    """
    off = np.maximum(x_error, y_error)
    if x_spread is not None and y_spread is not None:
        off = off + half_width(x_spread - y_spread)
    return np.abs(np.asarray(x) - y) > off
