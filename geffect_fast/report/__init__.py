"""What people look at: tables, findings and plots of a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["write_report"]


def write_report(dataset: xr.Dataset, folder: Path) -> None:
    """Write `report.html`, `summary.csv`, `plots/` and `tokens.html` into a folder.

    `plots/layers.png` and `plots/instances.png` are of a profile.

    A plot or page whose axis was summed away is left out. A sweep gets `plots/pareto.png` and
    `plots/sweep.png`, and its other plots show the best objectives only. A step result gets a
    `summary.csv` over steps, the figures of `step_plots.step_figures` as PNG and SVG, and the
    `tokens.html` of its last step.

    Args:
        dataset: result of `geffect_fast.profile` or `sweep`, or a step result.
        folder: exists.
    """
    from geffect_fast.report.curves import save_figures
    from geffect_fast.report.families import highlights, is_sweep
    from geffect_fast.report.page import write_run_page
    from geffect_fast.report.plots import plot_instances, plot_layers
    from geffect_fast.report.step_plots import step_figures
    from geffect_fast.report.steps import has_steps, last_step, write_step_summary
    from geffect_fast.report.summary import write_summary
    from geffect_fast.report.sweep_plots import plot_pareto, plot_sweep
    from geffect_fast.report.token_html import tokens_html
    from geffect_fast.report.token_view import has_tokens
    from geffect_fast.results.dataset import sum_positions
    from geffect_fast.storage.run_folder import TOKENS

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    summed = sum_positions(dataset)
    write_run_page(dataset, summed, folder)
    if has_steps(dataset):
        write_step_summary(summed, folder / "summary.csv")
        save_figures(step_figures(dataset), plots)
        dataset = last_step(dataset)
    else:
        write_summary(summed, folder / "summary.csv")
        if is_sweep(summed):
            plot_sweep(summed, plots / "sweep.png")
            plot_pareto(summed, plots / "pareto.png")
            dataset, summed = highlights(dataset), highlights(summed)
        plot_layers(summed, plots / "layers.png")
        plot_instances(summed, plots / "instances.png")
    if has_tokens(dataset):
        (folder / TOKENS).write_text(tokens_html(dataset), encoding="utf-8")
