"""The printed output that commands share: results, evaluations, names of files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.terminal import Console, columns
from geffect_fast.visible import one_line

if TYPE_CHECKING:
    import xarray as xr


def console() -> Console:
    """A console of the terminal's width, or of 120 columns in a file or a pipe."""
    return Console(width=columns())


def print_result(dataset: xr.Dataset, folder: Path) -> None:
    """Print a result's tables, the tokens of one answer, names of files, and a few sentences.

    The tokens of a result with steps are those of its last step.
    """
    from geffect_fast.report.summary.effects import last_step
    from geffect_fast.report.tables.result import tables_and_sentences
    from geffect_fast.report.tokens.terminal import TerminalView
    from geffect_fast.report.tokens.view import has_tokens, token_view

    printer = console()
    tables, sentences = tables_and_sentences(dataset)
    printer.print(tables)
    if has_tokens(dataset):
        last = last_step(dataset)
        printer.print(TerminalView(token_view(last, samples=1, by="removal")), "")
    _print_files(folder)
    print()
    for sentence in sentences:
        printer.print(sentence)


def print_evaluation(dataset: xr.Dataset, folder: Path) -> None:
    """Print the tables of an evaluation, a control or a relearning, and the names of its files."""
    from geffect_fast.report.tables.measures import render_measures

    console().print(render_measures(dataset))
    _print_files(folder)


def _print_files(folder: Path) -> None:
    """Print the paths of a run's folder, pictures and pages."""
    from geffect_fast.storage.run_folder import PLOTS, REPORT, TOKENS

    pictures = sorted((folder / PLOTS).glob("*.png")) if folder.is_dir() else []
    for path in [folder, *pictures, *folder.glob(TOKENS), *folder.glob(REPORT)]:
        print(one_line(str(path)))
