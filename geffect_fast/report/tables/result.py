"""Tables and sentences for the terminal, for a result of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from geffect_fast.report.summary.effects import has_steps, is_comparison
from geffect_fast.report.summary.findings import findings, signs
from geffect_fast.report.summary.measures import is_evaluation
from geffect_fast.report.summary.place_conflicts import PlaceConflicts
from geffect_fast.report.summary.step_findings import outcome_sentence
from geffect_fast.report.summary.sweep import is_sweep
from geffect_fast.report.tables.compare import render_comparison
from geffect_fast.report.tables.measures import render_measures
from geffect_fast.report.tables.profile import render_profile
from geffect_fast.report.tables.steps import render_steps
from geffect_fast.report.tables.sweep import render_sweep
from geffect_fast.results.by_rows import sum_positions

if TYPE_CHECKING:
    import xarray as xr


def tables_and_sentences(dataset: xr.Dataset) -> tuple[RenderableType, tuple[str, ...]]:
    """The tables and the sentences that a command prints of a result of any kind.

    Measures and comparisons have no sentences.
    """
    if is_evaluation(dataset):
        return render_measures(dataset), ()
    if is_comparison(dataset):
        return render_comparison(dataset), ()
    summed = sum_positions(dataset)
    sentences: tuple[str, ...]
    if has_steps(summed):
        tables, sentences = render_steps(summed), (outcome_sentence(summed),)
    elif is_sweep(summed):
        tables, sentences = render_sweep(summed), findings(summed)
    else:
        tables, sentences = render_profile(summed, PlaceConflicts.of(dataset)), findings(summed)
    return Group(Text(signs()), Text(), tables), sentences
