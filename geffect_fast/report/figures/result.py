"""The figures of a result of any kind, by their names in a run's `plots/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geffect_fast.report.figures.compare import comparison_drawings
from geffect_fast.report.figures.measures import measure_drawings
from geffect_fast.report.figures.profile import profile_drawings
from geffect_fast.report.figures.steps import step_drawings
from geffect_fast.report.figures.sweep import sweep_drawings
from geffect_fast.report.summary.effects import has_steps, is_comparison
from geffect_fast.report.summary.measures import is_evaluation
from geffect_fast.report.summary.sweep import highlights, is_sweep

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.report.figures.style import Drawings


def result_drawings(dataset: xr.Dataset, summed: xr.Dataset) -> Drawings:
    """Functions that draw the figures of a result, one each, by the figure's name in `plots/`.

    Args:
        dataset: a result of any kind.
        summed: the result without positions or tokens.
    """
    if is_evaluation(dataset):
        return measure_drawings(dataset)
    if is_comparison(dataset):
        return comparison_drawings(dataset)
    if has_steps(dataset):
        return step_drawings(dataset)
    if is_sweep(dataset):
        return sweep_drawings(summed) | profile_drawings(highlights(summed))
    return profile_drawings(summed)
