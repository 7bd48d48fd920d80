"""The tables of measures for the terminal: evaluations, surveys, controls, relearnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from geffect_fast.report.summary.effects import thinned
from geffect_fast.report.summary.measures import (
    NO_NUMBER,
    is_control,
    is_relearning,
    measure_notes,
    measured_metrics,
    measured_sets,
    number_with_bounds,
    place_axis,
    rises,
    share_head,
    share_note,
    share_rows,
)
from geffect_fast.report.summary.predictors import is_against_effects
from geffect_fast.report.summary.survey import (
    is_survey,
    survey_columns,
    survey_notes,
    survey_rows,
)
from geffect_fast.report.tables.against_effects import render_against_effects
from geffect_fast.report.tables.fitted import FittedTable

if TYPE_CHECKING:
    import xarray as xr

_COLUMNS = 6
"""The most steps of a relearning that have a column, the first and the last among them."""


def render_measures(dataset: xr.Dataset) -> RenderableType:
    """The tables of measures of any kind, for `rich.console.Console.print`."""
    if is_survey(dataset):
        return render_survey(dataset)
    if is_control(dataset):
        return render_control(dataset)
    if is_against_effects(dataset):
        return Group(render_evaluation(dataset), render_against_effects(dataset))
    return (render_relearning if is_relearning(dataset) else render_evaluation)(dataset)


def render_evaluation(dataset: xr.Dataset) -> RenderableType:
    """The table of measures of one or several models, for `rich.console.Console.print`."""
    if not measured_metrics(dataset):
        return Text(NO_NUMBER)
    axis, sets = place_axis(dataset), measured_sets(dataset)
    words = [*([] if axis is None else [axis]), "metric", "number"]
    table = FittedTable("measures", [*words, *sets], words)
    places = [None] if axis is None else dataset[axis].values.tolist()
    for metric in measured_metrics(dataset):
        of_metric = dataset.sel(metric=metric)
        for at in places:
            of = of_metric if axis is None else of_metric.sel({axis: at})
            row = [] if axis is None else [str(at)]
            cells = [number_with_bounds(of.sel(set=name)) for name in sets]
            table.add_row(*row, metric, str(of["statistic"].item()), *cells)
    return Group(table, Text(" ".join(measure_notes(dataset)), style="dim"))


def render_survey(dataset: xr.Dataset) -> RenderableType:
    """The survey's assessment as one table, for `rich.console.Console.print`."""
    words = ["aspect", "measure"]
    table = FittedTable("the survey's assessment", [*words, *survey_columns(dataset)], words)
    aspect = ""
    for row in survey_rows(dataset):
        if aspect and row.aspect != aspect:
            table.add_section()
        table.add_row("" if row.aspect == aspect else row.aspect, row.name, *row.cells)
        aspect = row.aspect
    said = " ".join([*survey_notes(dataset), *measure_notes(dataset)])
    return Group(table, Text(said, style="dim"))


def render_control(dataset: xr.Dataset) -> RenderableType:
    """The tables of a control's shares and measures, for `rich.console.Console.print`."""
    table = FittedTable("share kept of each method", share_head(dataset), ["method"])
    for row in share_rows(dataset):
        table.add_row(*row)
    said = [f"{share_note(dataset)} The measures below are at that share.", *rises(dataset)]
    return Group(table, *(Text(line, style="dim") for line in said), render_evaluation(dataset))


def render_relearning(dataset: xr.Dataset) -> RenderableType:
    """The table of a relearning's measures by step, for `rich.console.Console.print`."""
    steps = dataset["step"].values
    places = thinned(np.arange(len(steps)), _COLUMNS).tolist()
    words = ["metric", "set", "model"]
    table = FittedTable("measures by step", [*words, *map(str, steps[places])], words)
    for metric in measured_metrics(dataset):
        for name in measured_sets(dataset):
            for model in dataset["model"].values.tolist():
                of = dataset.sel(metric=metric, set=name, model=model)
                if bool(of["value"].notnull().any()):
                    cells = (number_with_bounds(of.isel(step=at)) for at in places)
                    table.add_row(metric, name, model, *cells)
    return Group(table, Text(_note(dataset, len(steps) - len(places)), style="dim"))


def _note(dataset: xr.Dataset, left_out: int) -> str:
    """The note on the brackets, the sets, the retrained model, and the steps without a column."""
    said = []
    if bool(dataset["value_low"].notnull().any()):
        said.append("In brackets: bounds by the choice of the rows.")
    if "others" in dataset["set"].values:
        said.append("relearned: the rows trained on; others: the forget rows that are not.")
    else:
        said.append("relearned: the rows trained on, which are all of the forget data.")
    if "retrained" in dataset["model"].values:
        said.append("What comes back sooner than in the retrained model was not gone.")
    if left_out:
        said.append(
            f"Not shown: {left_out} of the {dataset.sizes['step']} steps measured; summary.csv and "
            "evaluation.nc have all."
        )
    return " ".join(said)
