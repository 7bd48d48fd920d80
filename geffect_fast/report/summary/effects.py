"""Effects of a result as reports show them: in total, by sample, by part of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.format import UNKNOWN, Interval, Number
from geffect_fast.results.groups import GROUPS, OUTSIDE
from geffect_fast.results.told_apart import half_width, has_intervals, row_spreads, times_counted

if TYPE_CHECKING:
    import xarray as xr

LEAD = ("step", "objective", "risk")
"""The axes that totals of a result keep; `step` is among them where the result has steps."""


def labels(dataset: xr.Dataset | xr.DataArray, axis: str) -> list[str]:
    """The names along an axis, such as objectives or risks."""
    return [str(label) for label in dataset[axis].values]


def has_steps(dataset: xr.Dataset) -> bool:
    """Whether a result has a step axis."""
    return "step" in dataset["g_effect"].dims


def is_comparison(dataset: xr.Dataset) -> bool:
    """Whether a result is one of `geffect_fast.compare`."""
    return "run" in dataset["g_effect"].dims


def last_step(dataset: xr.Dataset) -> xr.Dataset:
    """A step result at its last step; any other result as it is."""
    return dataset.isel(step=-1) if has_steps(dataset) else dataset


def thinned(places: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the places, evenly spaced, the first and the last among them."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).round().astype(int)]


def bounds_of(dataset: xr.Dataset, name: str) -> np.ndarray | None:
    """Low and high bounds of intervals, `(2, ...)`, axes in the order of `LEAD`; None: unknown.

    Args:
        dataset: a result, or a comparison of runs.
        name: a variable of the result, such as `g_effect`, `risk_value` or `collateral`.
    """
    if f"{name}_low" not in dataset:
        return None
    sides = [dataset[f"{name}_{side}"] for side in ("low", "high")]
    dims = [d for d in ("run", *LEAD) if d in sides[0].dims]
    return np.stack([side.transpose(*dims, ...).values for side in sides])


def interval_at(bounds: np.ndarray | None, *place: int) -> Interval:
    """One interval of the bounds that `bounds_of` gives; NaN where they are not known."""
    if bounds is None:
        return UNKNOWN
    low, high = (float(side[place]) for side in bounds)
    return low, high


def read_number(dataset: xr.Dataset, name: str) -> Number:
    """A variable without axes and its interval, which `NAME_low` and `NAME_high` bound."""
    value, low, high = (float(dataset[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return value, (low, high)


def total(dataset: xr.Dataset) -> np.ndarray:
    """G-effects of the whole forget data, `(objective, risk)` fp64; NaN stays NaN.

    For a step result the shape is `(step, objective, risk)`.
    """
    effect = dataset["g_effect"]
    lead = [d for d in LEAD if d in effect.dims]
    rest = [d for d in effect.dims if d not in lead]
    return effect.sum(rest, skipna=False).transpose(*lead).values


def by_sample(dataset: xr.Dataset) -> xr.DataArray | None:
    """G-effects of the forget rows, `(objective, risk, sample)`; None where samples are summed.

    For a step result the shape is `(step, objective, risk, sample)`.
    """
    effect = dataset["g_effect"]
    if "sample" not in effect.dims:
        return None
    lead = [d for d in LEAD if d in effect.dims]
    effect = effect.sum([d for d in effect.dims if d not in (*lead, "sample")], skipna=False)
    return effect.transpose(*lead, "sample")[..., (effect["set"] == "forget").values]


def named_once(effects: Mapping[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """Effects by name, with equal effects once, under all of their names.

    The effects of `ga` and `gd` on forget rows are equal, for example, as both have the same terms
    there. Effects count as equal within 1e-6 of the largest.
    """
    found: list[tuple[list[str], xr.DataArray]] = []
    for name, effect in effects.items():
        values = effect.values
        off = 1e-6 * np.abs(values[np.isfinite(values)]).max(initial=0.0)
        twins = next(
            (
                names
                for names, of in found
                if of.shape == effect.shape
                and np.allclose(of.values, values, rtol=0, atol=off, equal_nan=True)
            ),
            None,
        )
        if twins is None:
            found.append(([name], effect))
        else:
            twins.append(name)
    return {" and ".join(names): effect for names, effect in found}


def by_place(
    dataset: xr.Dataset, blocks: bool, *, rows: bool = False
) -> tuple[list[str], np.ndarray] | None:
    """G-effects of parts of the model, front to back.

    Args:
        dataset: a result.
        blocks: True for every block by itself, where the result tells blocks apart; False for
            groups of blocks.
        rows: keep samples apart, in a last axis.

    Returns:
        Names of n parts, and values `(objective, risk, n)`, for a step result `(step, objective,
        risk, n)`; None where the whole model is summed.
    """
    effect = dataset["g_effect"]
    axis = next((d for d in ("parameter", "group") if d in effect.dims), None)
    if axis is None:
        return None
    lead = [d for d in LEAD if d in effect.dims]
    kept_dims = [*lead, axis, *(["sample"] if rows else [])]
    effect = effect.sum([d for d in effect.dims if d not in kept_dims], skipna=False)
    effect = effect.transpose(*kept_dims)
    groups = [str(group) for group in effect["group"].values]
    numbers = effect["block"].values if "block" in effect.coords else [OUTSIDE] * len(groups)
    names: list[str] = []
    where: dict[str, tuple[int, int]] = {}
    for group, block in zip(groups, numbers, strict=True):
        place = GROUPS.index(group) if group in GROUPS else len(GROUPS)
        label = str(block) if blocks and block != OUTSIDE else group
        where[label] = (place, int(block) if blocks else 0)
        names.append(label)
    kept, at = sorted(where, key=where.__getitem__), len(lead)
    parts = [
        np.compress([name == label for name in names], effect.values, axis=at).sum(axis=at)
        for label in kept
    ]
    return kept, np.stack(parts, axis=at)


def place_half_widths(dataset: xr.Dataset, blocks: bool) -> np.ndarray | None:
    """Half widths of the intervals of `by_place`'s values; None where they are not known.

    The intervals are by the choice of the rows that objectives read. The effect on the forget risk
    counts twice, as the forget rows make both of its gradients. The rows of other risks also widen
    the intervals, but that is not told apart by part of the model and is left out.
    """
    if not has_intervals(dataset) or "sample" not in dataset["g_effect"].dims:
        return None
    placed = by_place(dataset, blocks, rows=True)
    if placed is None:
        return None
    half_widths = half_width(row_spreads(placed[1], dataset["set"].values))
    return half_widths * times_counted(labels(dataset, "risk"))[:, None]


def shares(values: np.ndarray) -> np.ndarray:
    """Values divided by the sum of their sizes along the last axis, with their signs.

    Values that are all zero stay zero. Where one value is not finite, all shares are NaN.
    """
    size = np.abs(values).sum(axis=-1, keepdims=True)
    defined = np.divide(values, size, out=np.zeros_like(values), where=(size > 0) & (size < np.inf))
    return np.where(np.isfinite(size), defined, np.nan)
