"""Which numbers of a result are different, and which only rounded differently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


def precision_error(attributes: Mapping[Any, Any]) -> float:
    """By how much of itself an effect may be off, from a result's attributes; 0 if not stated."""
    return float(attributes.get("precision_error", 0.0))


def effect_errors(result: xr.Dataset) -> np.ndarray:
    """By how much the total effects may be off, `(objective, risk)` fp64.

        precision_error * sum_i |e_i|

    Over samples, as their shares may cancel and their errors need not; where samples are summed
    already, over the one total.

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


def collateral_error(e_u: float, collateral: float, errors: tuple[float, float]) -> float:
    """By how much the ratio `e / e_u` may be off where `e` and `e_u` may be by `errors`."""
    off, off_u = errors
    return (off + abs(collateral) * off_u) / abs(e_u) if e_u else math.nan


def told_apart(
    x: np.ndarray | float,
    y: np.ndarray | float,
    x_error: np.ndarray | float,
    y_error: np.ndarray | float,
) -> np.ndarray:
    """Whether numbers differ by more than either may be off; without errors, whether they differ.

    The larger of the two errors, not their sum: both come from the same weights and data.
    """
    return np.abs(np.asarray(x) - y) > np.maximum(x_error, y_error)
