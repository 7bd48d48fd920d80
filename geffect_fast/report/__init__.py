"""Presentation of results: tables, findings, figures, token views and pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.report.files import ReportFiles

__all__ = ["write_comparison_plots", "write_report"]


def write_report(dataset: xr.Dataset, folder: Path, held: Path | None = None) -> None:
    """Write `report.html`, `summary.csv`, `plots/` and `tokens.html` into a folder.

    A profile gets `plots/layers.png` and `plots/instances.png`. Measures get `plots/measures.png`
    and `.svg`, and no tokens. Measures of a control also get `plots/retention.png` and `.svg`.
    Measures that are set against effects also get `runs.csv`, `against_effects.csv`,
    `plots/against_effects.png` and `.svg`.

    A plot or page whose axis was summed away is left out. A sweep gets `plots/pareto.png` and
    `plots/sweep.png`, and its other plots show the best objectives only. A step result gets a
    `summary.csv` over steps, the figures of `figures.steps.step_figures` as PNG and SVG, and the
    `tokens.html` of its last step.

    Args:
        dataset: result of `geffect_fast.profile` or `sweep`, a step result, or measures of
            `geffect_fast.evaluate`, `against_effects`, `control` or `relearn`.
        folder: an existing folder.
        held: another folder. Files that are written together are left out where it holds one of
            them already.

    Raises:
        UnfinishedError: a file could not be drawn or written; all others are there.
    """
    from geffect_fast.paths import is_there
    from geffect_fast.report.files import write_each

    def missing(names: tuple[str, ...]) -> bool:
        return held is None or not any(is_there(held / name) for name in names)

    write_each((files for files in _files(dataset) if missing(files.names)), folder)


def write_comparison_plots(runs: xr.Dataset, folder: Path) -> None:
    """Write the figures of a comparison into `plots/` in a folder.

    Raises:
        UnfinishedError: some figures could not be drawn; the others are there.
    """
    from geffect_fast.report.figures.compare import comparison_drawings
    from geffect_fast.report.files import plot_files, write_each

    write_each(plot_files(comparison_drawings(runs)), folder)


def _files(dataset: xr.Dataset) -> Iterator[ReportFiles]:
    """The files of a report, tables first. The code that writes a file is imported with it."""
    from geffect_fast.report.files import ReportFiles, plot_files
    from geffect_fast.report.summary.effects import has_steps, last_step
    from geffect_fast.report.summary.measures import is_evaluation
    from geffect_fast.report.summary.objectives import write_summary
    from geffect_fast.report.summary.steps import write_step_summary
    from geffect_fast.report.summary.sweep import highlights, is_sweep
    from geffect_fast.report.tokens.view import has_tokens
    from geffect_fast.results.by_rows import sum_positions
    from geffect_fast.storage.run_folder import REPORT, SUMMARY, TOKENS

    if is_evaluation(dataset):
        yield from _files_of_measures(dataset)
        return
    summed = sum_positions(dataset)
    shown = highlights(dataset) if is_sweep(dataset) else last_step(dataset)

    def page(folder: Path) -> None:
        from geffect_fast.report.html.page import write_run_page

        write_run_page(dataset, summed, folder)

    def tokens(folder: Path) -> None:
        from geffect_fast.report.tokens.html import tokens_html

        (folder / TOKENS).write_text(tokens_html(shown), encoding="utf-8")

    summary = write_step_summary if has_steps(dataset) else write_summary
    yield ReportFiles((SUMMARY,), lambda folder: summary(summed, folder / SUMMARY))
    yield ReportFiles((REPORT,), page)
    from geffect_fast.report.figures.result import result_drawings

    kinds = ("png", "svg") if has_steps(dataset) else ("png",)
    yield from plot_files(result_drawings(dataset, summed), kinds)
    if has_tokens(shown):
        yield ReportFiles((TOKENS,), tokens)


def _files_of_measures(dataset: xr.Dataset) -> Iterator[ReportFiles]:
    """The files of a report on measures."""
    from geffect_fast.report.figures.measures import measure_drawings
    from geffect_fast.report.files import ReportFiles, plot_files
    from geffect_fast.report.html.page import write_run_page
    from geffect_fast.report.summary.predictors import (
        CORRELATIONS,
        RUNS,
        is_against_effects,
        write_predictors,
    )
    from geffect_fast.storage.csv_cells import write_csv
    from geffect_fast.storage.run_folder import REPORT, SUMMARY
    from geffect_fast.storage.tables import measure_summary

    yield ReportFiles(
        (SUMMARY,), lambda folder: write_csv(measure_summary(dataset), folder / SUMMARY)
    )
    yield ReportFiles((REPORT,), lambda folder: write_run_page(dataset, dataset, folder))
    if is_against_effects(dataset):
        yield ReportFiles((RUNS, CORRELATIONS), lambda folder: write_predictors(dataset, folder))
    yield from plot_files(measure_drawings(dataset))
