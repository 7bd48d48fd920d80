"""What people look at: tables, findings and plots of a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["write_report"]


def write_report(dataset: xr.Dataset, folder: Path) -> None:
    """Write `summary.csv`, `plots/layers.png`, `plots/instances.png`, `tokens.html` into a folder.

    A plot or page whose axis was summed away is left out.

    Args:
        dataset: result of `geffect_fast.profile`.
        folder: exists.
    """
    from geffect_fast.report.plots import plot_instances, plot_layers
    from geffect_fast.report.summary import write_summary
    from geffect_fast.report.token_html import tokens_html
    from geffect_fast.report.token_view import has_tokens
    from geffect_fast.runs.dataset import sum_positions
    from geffect_fast.runs.store import TOKENS

    if has_tokens(dataset):
        (folder / TOKENS).write_text(tokens_html(dataset), encoding="utf-8")
    dataset = sum_positions(dataset)
    write_summary(dataset, folder / "summary.csv")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    plot_layers(dataset, plots / "layers.png")
    plot_instances(dataset, plots / "instances.png")
