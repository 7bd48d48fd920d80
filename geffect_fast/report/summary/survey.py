"""The survey's assessment (arXiv 2402.08787) as rows of one table, and its relearning alone."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geffect_fast.report.format import number, number_with_interval
from geffect_fast.report.summary.effects import read_number
from geffect_fast.report.summary.measures import (
    measured_metrics,
    measured_sets,
    number_with_bounds,
    place_axis,
)

if TYPE_CHECKING:
    import xarray as xr

EFFICACY, UTILITY, ROBUSTNESS = "efficacy", "utility", "robustness"
EFFICIENCY, EFFECTS = "efficiency", "effects"
_NOTE = (
    "Efficacy: of what must go; utility: of the rest; robustness: of paraphrases, and from before "
    "to after learning a few forget rows again ({updates} updates on {rows}; others: the forget "
    "rows that are not trained on); efficiency: of making the model. e_u and e_r are effects of "
    "the objective a model was trained on, at the model before unlearning."
)


@dataclass(frozen=True)
class SurveyRow:
    """A row of the assessment: its aspect, its name, and a cell for each model."""

    aspect: str
    name: str
    cells: list[str]


def is_survey(dataset: xr.Dataset) -> bool:
    """Whether measures are those of `evaluate --suite survey`, relearning and cost among them."""
    return "touched" in dataset


def survey_columns(dataset: xr.Dataset) -> list[str]:
    """Names of the models, and `original` where effects are of a model that is not among them."""
    axis = place_axis(dataset)
    assert axis is not None
    names = [str(name) for name in dataset[axis].values]
    return [*names, "original"] if _has_own_column(dataset) else names


def survey_rows(dataset: xr.Dataset) -> list[SurveyRow]:
    """The rows of the assessment; rows without any number are left out."""
    rows = [*_measured(dataset), *_relearned(dataset), *_cost(dataset), *_effects(dataset)]
    extra = [""] if _has_own_column(dataset) else []
    width = len(survey_columns(dataset))
    filled = [
        r if len(r.cells) == width else SurveyRow(r.aspect, r.name, r.cells + extra) for r in rows
    ]
    return [row for row in filled if any(row.cells)]


def survey_notes(dataset: xr.Dataset) -> list[str]:
    """Notes on what the rows are, and on why cells are empty."""
    asked = json.loads(dataset.attrs["relearning"])
    rows = "all rows" if asked["n_rows"] == "all" else f"{asked['n_rows']} rows"
    note = _NOTE.format(updates=asked["steps"], rows=rows)
    return [note, *json.loads(dataset.attrs["survey_notes"])]


def relearning_of(dataset: xr.Dataset) -> xr.Dataset:
    """The relearning of an assessment, in the form of `geffect_fast.relearn` but without rows."""
    axis = place_axis(dataset)
    names = {f"relearned{end}": f"value{end}" for end in ("", "_low", "_high")}
    found = dataset[[*names]].drop_vars("trained_on", errors="ignore")
    if axis == "step":
        found = found.rename(step="model")
    axes = {f"relearned_{name}": name for name in ("step", "metric", "set")}
    found = found.rename(names | axes)
    return found.assign_coords(
        model=[str(name) for name in found["model"].values],
        statistic=("metric", ["mean"] * found.sizes["metric"]),
    )


def _measured(dataset: xr.Dataset) -> list[SurveyRow]:
    axis = place_axis(dataset)
    found: dict[str, list[SurveyRow]] = {EFFICACY: [], UTILITY: [], ROBUSTNESS: []}
    for metric in measured_metrics(dataset):
        for name in measured_sets(dataset):
            paraphrased = metric.startswith("paraphrased_")
            if name == "holdout" or (paraphrased and name != "forget"):
                continue
            aspect = ROBUSTNESS if paraphrased else EFFICACY if name == "forget" else UTILITY
            of = dataset.sel(metric=metric, set=name)
            cells = [number_with_bounds(of.isel({axis: at})) for at in range(of.sizes[str(axis)])]
            found[aspect].append(SurveyRow(aspect, f"{metric}, {name}", cells))
    return [row for rows in found.values() for row in rows]


def _relearned(dataset: xr.Dataset) -> list[SurveyRow]:
    relearned = relearning_of(dataset)
    rows = []
    for metric in relearned["metric"].values.tolist():
        for name in relearned["set"].values.tolist():
            of = relearned.sel(metric=metric, set=name)
            cells = []
            for at in range(of.sizes["model"]):
                first, last = (of.isel(model=at, step=step) for step in (0, -1))
                before, after = float(first["value"]), number_with_bounds(last)
                known = not math.isnan(before)
                cells.append(f"{number(before, '.3g')} to {after}" if known else "")
            rows.append(SurveyRow(ROBUSTNESS, f"relearning: {metric}, {name}", cells))
    return rows


def _cost(dataset: xr.Dataset) -> list[SurveyRow]:
    written: dict[str, tuple[str, Any]] = {
        "seconds": ("time of the updates, s", lambda value: f"{value:.3g}"),
        "peak_memory": ("peak memory, MiB", lambda value: f"{value / 2**20:,.0f}"),
        "touched": ("parameters touched", lambda value: f"{value:.3%}"),
    }
    return [
        SurveyRow(
            EFFICIENCY,
            name,
            ["" if math.isnan(value) else write(value) for value in dataset[variable].values],
        )
        for variable, (name, write) in written.items()
    ]


def _effects(dataset: xr.Dataset) -> list[SurveyRow]:
    """Rows of effects: of each model's objective, then of objectives no model was trained on."""
    if "effect" not in dataset:
        return []
    trained = [str(name) for name in dataset["trained_on"].values]
    columns = survey_columns(dataset)
    rows = [SurveyRow(EFFECTS, "trained on", trained)]
    for risk in ("e_u", "e_r"):
        rows.append(SurveyRow(EFFECTS, risk, [_effect(dataset, name, risk) for name in trained]))
    for name in map(str, dataset["objective"].values):
        if name in trained:
            continue
        for risk in ("e_u", "e_r"):
            cells = [""] * len(columns)
            cells[_original_column(dataset)] = _effect(dataset, name, risk)
            rows.append(SurveyRow(EFFECTS, f"{risk} of {name}", cells))
    return rows


def _effect(dataset: xr.Dataset, objective: str, risk: str) -> str:
    if not objective:
        return ""
    of = dataset.sel(objective=objective, risk=risk)
    return number_with_interval(*read_number(of, "effect"))


def _has_own_column(dataset: xr.Dataset) -> bool:
    """Whether an objective was measured that no model was trained on, at a model not evaluated."""
    if "effect" not in dataset or dataset.attrs["original_place"]:
        return False
    return not {*map(str, dataset["objective"].values)} <= {*map(str, dataset["trained_on"].values)}


def _original_column(dataset: xr.Dataset) -> int:
    place = dataset.attrs["original_place"]
    return survey_columns(dataset).index(place or "original")
