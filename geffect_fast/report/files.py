"""A report in parts, each of which may fail alone: the others are written all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from geffect_fast.errors import UnfinishedError, reason_of
from geffect_fast.storage.disk import remove

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Drawings = dict[str, Callable[[], "Figure | None"]]
"""How figures are made, by file stem; None: the result holds nothing for one."""


class ReportPart(NamedTuple):
    """Files of a report that are written together.

    Attributes:
        names: of the files, by path in the run's folder; of those that the result holds nothing
            for none is written.
        write: writes them into a folder.
    """

    names: tuple[str, ...]
    write: Callable[[Path], object]


def write_parts(parts: Iterable[ReportPart], folder: Path) -> None:
    """Write every part that can be written.

    Args:
        parts: in order.
        folder: exists.

    Raises:
        UnfinishedError: some could not be, for whatever reason; the line names the first.
    """
    lost: list[tuple[str, Exception]] = []
    for part in parts:
        try:
            (folder / part.names[0]).parent.mkdir(exist_ok=True)
            part.write(folder)
        except Exception as error:  # of fonts, disks, templates, packages that are not there
            for name in part.names:
                remove(folder / name)
            lost.append((part.names[0], error))
    if lost:
        (name, first), more = lost[0], len(lost) - 1
        others = f", nor {more} more" if more else ""
        raise UnfinishedError(f"{name} could not be made ({reason_of(first)}){others}") from first


def report_parts(dataset: xr.Dataset) -> Iterator[ReportPart]:
    """The parts of the report that `geffect_fast.report.write_report` writes, tables first."""
    from geffect_fast.report.summary.objectives import write_summary
    from geffect_fast.report.summary.steps import has_steps, last_step, write_step_summary
    from geffect_fast.report.summary.sweep import highlights, is_sweep
    from geffect_fast.report.tokens.view import has_tokens
    from geffect_fast.results.dataset import sum_positions
    from geffect_fast.storage.run_folder import PLOTS, REPORT, SUMMARY, TOKENS

    summed = sum_positions(dataset)
    summary = write_step_summary if has_steps(dataset) else write_summary
    yield ReportPart((SUMMARY,), lambda folder: summary(summed, folder / SUMMARY))
    yield ReportPart((REPORT,), partial(_write_page, dataset, summed))
    shown, shown_summed = dataset, summed
    if has_steps(dataset):
        from geffect_fast.report.figures.steps import step_drawings

        yield from drawn_parts(step_drawings(dataset))
        shown = last_step(dataset)
    else:
        if is_sweep(summed):
            yield ReportPart((f"{PLOTS}/sweep.png",), partial(_plot, "sweep", summed))
            yield ReportPart((f"{PLOTS}/pareto.png",), partial(_plot, "pareto", summed))
            shown, shown_summed = highlights(dataset), highlights(summed)
        for name in ("layers", "instances"):
            yield ReportPart((f"{PLOTS}/{name}.png",), partial(_plot, name, shown_summed))
    if has_tokens(shown):
        yield ReportPart((TOKENS,), partial(_write_tokens, shown))


def drawn_parts(drawings: Drawings) -> Iterator[ReportPart]:
    """A part for every figure, as PNG and SVG."""
    from geffect_fast.storage.run_folder import PLOTS

    for name, draw in drawings.items():
        names = (f"{PLOTS}/{name}.png", f"{PLOTS}/{name}.svg")
        yield ReportPart(names, partial(_draw, name, draw))


def _draw(name: str, draw: Callable[[], Figure | None], folder: Path) -> None:
    from geffect_fast.report.figures.style import save_figures
    from geffect_fast.storage.run_folder import PLOTS

    figure = draw()
    if figure is not None:
        save_figures({name: figure}, folder / PLOTS)


def _plot(name: str, dataset: xr.Dataset, folder: Path) -> None:
    from geffect_fast.report.figures import profile as plots
    from geffect_fast.report.figures import sweep as sweep_plots
    from geffect_fast.storage.run_folder import PLOTS

    plot = getattr(plots if name in ("layers", "instances") else sweep_plots, f"plot_{name}")
    plot(dataset, folder / PLOTS / f"{name}.png")


def _write_page(dataset: xr.Dataset, summed: xr.Dataset, folder: Path) -> None:
    from geffect_fast.report.html.page import write_run_page

    write_run_page(dataset, summed, folder)


def _write_tokens(dataset: xr.Dataset, folder: Path) -> None:
    from geffect_fast.report.tokens.html import tokens_html
    from geffect_fast.storage.run_folder import TOKENS

    (folder / TOKENS).write_text(tokens_html(dataset), encoding="utf-8")
