"""Sums of effects that need not fit in memory: a few rows are read from the file at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

CELLS = 2**17
"""Effects that are in memory at once. HDF5 takes 6 KiB besides for every row, objective and risk
that are read together."""


def row_slices(effect: xr.DataArray) -> Iterator[slice]:
    """Slices of the axis `sample`, front to back, of at most `CELLS` effects but at least one row.

    Args:
        effect: effects with an axis `sample`, in memory or read from a file on access.
    """
    n = effect.sizes["sample"]
    at_once = max(1, CELLS * n // max(1, effect.size))
    for start in range(0, n, at_once):
        yield slice(start, start + at_once)


def sum_within_rows(effect: xr.DataArray, axes: list[str]) -> xr.DataArray:
    """Effects summed over axes other than `sample`, with a few rows at a time in memory.

    Args:
        effect: as in `row_slices`.
        axes: names of the axes to sum over.
    """
    import xarray as xr

    parts = [effect.isel(sample=rows).sum(axes, skipna=False) for rows in row_slices(effect)]
    dims = (dim for dim in effect.dims if dim not in axes)
    return xr.concat(parts, "sample").transpose(*dims)


def sum_positions(dataset: xr.Dataset) -> xr.Dataset:
    """The result with its effects summed over `position` or `token`, and without this axis.

    Args:
        dataset: a result, in memory or read from its file on access.
    """
    effect = dataset["g_effect"]
    axis = next((axis for axis in ("position", "token") if axis in effect.dims), None)
    if axis is None:
        return dataset
    if "sample" in effect.dims:
        summed = sum_within_rows(effect, [axis])
    else:
        summed = effect.sum(axis, skipna=False)
    return dataset.drop_dims(axis).assign(g_effect=summed)
