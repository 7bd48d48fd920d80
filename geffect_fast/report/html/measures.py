"""Page sections on measures: the answer, shares kept, curves, every number, and the rows."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures.measures import measure_figures
from geffect_fast.report.figures.predictors import FIGURE
from geffect_fast.report.format import number, question
from geffect_fast.report.html.blocks import (
    MOST_ROWS,
    Block,
    Items,
    Table,
    Text,
    drawn_blocks,
    left_out,
    notes_of,
)
from geffect_fast.report.html.predictors import predictor_blocks
from geffect_fast.report.summary.effects import thinned
from geffect_fast.report.summary.measures import (
    NO_NUMBER,
    is_control,
    is_relearning,
    meanings,
    measure_findings,
    measure_notes,
    measured_metrics,
    measured_sets,
    number_with_bounds,
    place_axis,
    share_head,
    share_note,
    share_rows,
)
from geffect_fast.report.summary.predictors import is_against_effects, prediction_sentence
from geffect_fast.report.summary.survey import (
    is_survey,
    survey_columns,
    survey_notes,
    survey_rows,
)

if TYPE_CHECKING:
    import xarray as xr

_ROWS = 20
"""The most rows of the data that the table of rows lists."""
_WIDTH = 90
"""The most characters of a row's question that the table of rows shows."""


def sections(dataset: xr.Dataset) -> dict[str, list[Block]]:
    """The sections of a page on one run of `evaluate`, `control` or `relearn`, by id."""
    figures = measure_figures(dataset)
    against = is_against_effects(dataset)
    return {
        "answer": answer(dataset),
        "shares": (shares(dataset) if is_control(dataset) else [])
        + drawn_blocks(figures, ["retention"]),
        "effects": (predictor_blocks(dataset) if against else []) + drawn_blocks(figures, [FIGURE]),
        "survey": survey(dataset) if is_survey(dataset) else [],
        "curves": drawn_blocks(figures, ["measures", "relearned"]),
        "measures": [*tables(dataset), *notes_of(measure_notes(dataset))],
        "instances": rows(dataset),
        "signs": [Items(meanings(dataset))] if meanings(dataset) else [],
    }


def answer(dataset: xr.Dataset) -> list[Block]:
    """The findings on measures, in sentences."""
    found = measure_findings(dataset) or [NO_NUMBER]
    if is_against_effects(dataset):
        found = [prediction_sentence(dataset), *found]
    lead, *more = found
    return [Text(lead, "lead"), *([Items(more)] if more else [])]


def shares(dataset: xr.Dataset) -> list[Block]:
    """A table of the largest share of each method that keeps enough, and how much it keeps."""
    table = Table("Share kept of each method", share_head(dataset), share_rows(dataset))
    return [table, *notes_of([share_note(dataset)])]


def survey(dataset: xr.Dataset) -> list[Block]:
    """The survey's assessment as one table, with the rows of each aspect below its name."""
    columns = survey_columns(dataset)
    listed: list[list[str]] = []
    for aspect, rows in groupby(survey_rows(dataset), lambda row: row.aspect):
        listed.append([aspect.capitalize(), *[""] * len(columns)])
        listed += [[row.name, *row.cells] for row in rows]
    table = Table("Every aspect of every model", ["measure", *columns], listed)
    return [table, *notes_of(survey_notes(dataset))]


def tables(dataset: xr.Dataset, held: str = "evaluation.nc holds") -> list[Block]:
    """Tables of every number with its bounds.

    One model has one table. Several models, or several steps, have a table a metric. A relearning
    has a table a metric and set.

    Args:
        dataset: measures, or the live measures of a step result.
        held: the files that hold all numbers, for the note on what the tables leave out.
    """
    if is_relearning(dataset):
        return _by_step_and_model(dataset)
    axis, metrics = place_axis(dataset), measured_metrics(dataset)
    if axis is None:
        sets = measured_sets(dataset)
        of_one = [
            [
                metric,
                str(dataset["statistic"].sel(metric=metric).item()),
                *(number_with_bounds(dataset.sel(metric=metric, set=name)) for name in sets),
            ]
            for metric in metrics
        ]
        return [Table("Measures", ["metric", "number", *sets], of_one, frozenset([0, 1]))]
    blocks: list[Block] = []
    places = thinned(np.arange(dataset.sizes[axis]), MOST_ROWS).tolist()
    for metric in metrics:
        of = dataset.sel(metric=[metric])
        sets = measured_sets(of)
        of = of.isel(metric=0)
        listed = _originals(of, sets) if is_control(dataset) else []
        for at in places:
            here = of.isel({axis: at})
            name = str(here[axis].item())
            share = f", {float(here['alpha_chosen']):.3g} of it" if is_control(dataset) else ""
            numbers = (number_with_bounds(here.sel(set=each)) for each in sets)
            listed.append([f"{name}{share}", *numbers])
        caption = f"{metric} ({of['statistic'].item()})"
        blocks.append(Table(caption, ["" if is_control(dataset) else axis, *sets], listed))
    return [*blocks, *left_out(dataset.sizes[axis], f"{axis}s", len(places), held)]


def _originals(of: xr.Dataset, sets: list[str]) -> list[list[str]]:
    """Rows with the numbers of the original and of the unlearned models without mixing."""
    rows = {"original": of["original_value"]}
    for method in of["model"].values.tolist():
        rows[f"{method}, without mixing"] = of["unlearned_value"].sel(model=method)
    return [
        [name, *(number(float(values.sel(set=each)), ".3g") for each in sets)]
        for name, values in rows.items()
    ]


def _by_step_and_model(dataset: xr.Dataset) -> list[Block]:
    """A table for each metric and set: a row a step, a column a model."""
    models, steps = dataset["model"].values.tolist(), dataset["step"].values
    places = thinned(np.arange(len(steps)), MOST_ROWS).tolist()
    blocks: list[Block] = []
    for metric in measured_metrics(dataset):
        for name in measured_sets(dataset):
            of = dataset.sel(metric=metric, set=name)
            if bool(of["value"].isnull().all()):
                continue
            listed = [
                [
                    str(steps[at]),
                    *(number_with_bounds(of.isel(step=at).sel(model=model)) for model in models),
                ]
                for at in places
            ]
            blocks.append(Table(f"{metric}: {name}", ["update", *models], listed))
    return [*blocks, *left_out(len(steps), "steps", len(places), "evaluation.nc holds")]


def rows(dataset: xr.Dataset) -> list[Block]:
    """A table of the forget rows that score highest by the first metric that scores rows."""
    forget = dataset["sample_set"].isin(["forget", "relearned", "others"]).values
    scored = dataset["sample_value"].isel(sample=forget)
    known = scored.notnull().any([dim for dim in scored.dims if dim != "metric"])
    metrics = dataset["metric"].values[known.values].tolist()
    if not metrics or not scored.sizes["sample"]:
        return []
    of = scored.sel(metric=metrics[0])
    if "step" in of.dims:
        of = of.isel(step=sorted({0, of.sizes["step"] - 1}))
    columns = [dim for dim in of.dims if dim != "sample"]
    of = of.stack(column=columns) if columns else of.expand_dims("column", axis=1)
    values = of.transpose("sample", "column").values
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values).max(axis=1), kind="stable")
    names = [_column(columns, at) for at in of["column"].values] if columns else [metrics[0]]
    listed = [
        [_row_name(of, int(at)), *(number(float(value), ".3g") for value in values[at])]
        for at in order[:_ROWS]
    ]
    caption = f"By {metrics[0]}, the highest first"
    table = Table(caption, ["row", *names], listed)
    return [table, *left_out(len(order), "rows", len(listed), "evaluation.nc holds")]


def _column(axes: list[str], at: object) -> str:
    """The head of a column of scores: its model, its step, or both."""
    parts = at if isinstance(at, tuple) else (at,)
    return ", ".join(
        f"step {part}" if axis == "step" else str(part)
        for axis, part in zip(axes, parts, strict=True)
    )


def _row_name(of: xr.DataArray, at: int) -> str:
    """A row's number and its question, which is shortened to `_WIDTH`."""
    row, asked = str(of["sample"].values[at]), question(of, at, _WIDTH)
    return f"{row}: {asked}" if asked else row
