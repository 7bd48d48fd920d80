"""What people look at: tables, findings and plots of a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["write_report"]


def write_report(dataset: xr.Dataset, folder: Path, held: Path | None = None) -> None:
    """Write `report.html`, `summary.csv`, `plots/` and `tokens.html` into a folder.

    `plots/layers.png` and `plots/instances.png` are of a profile.

    A plot or page whose axis was summed away is left out. A sweep gets `plots/pareto.png` and
    `plots/sweep.png`, and its other plots show the best objectives only. A step result gets a
    `summary.csv` over steps, the figures of `step_plots.step_figures` as PNG and SVG, and the
    `tokens.html` of its last step.

    Args:
        dataset: result of `geffect_fast.profile` or `sweep`, or a step result.
        folder: exists.
        held: another folder; what it holds already is left out.

    Raises:
        UnfinishedError: something could not be drawn or written; all else is there.
    """
    from geffect_fast.paths import is_there
    from geffect_fast.report.files import report_parts, write_parts

    def missing(names: tuple[str, ...]) -> bool:
        return held is None or not any(is_there(held / name) for name in names)

    write_parts((part for part in report_parts(dataset) if missing(part.names)), folder)
