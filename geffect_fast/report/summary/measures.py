"""Measures of `evaluate`, `control` and `relearn`: numbers, findings and notes in words."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.format import Interval, bounds, number
from geffect_fast.report.summary.effects import read_number

if TYPE_CHECKING:
    import xarray as xr

NO_NUMBER = "No metric gave a number on any set."
_BOUNDS = "In brackets: bounds by the choice of the rows."
_NO_BOUNDS = (
    "No brackets: rows that all score alike, one row alone, or a p-value, of which drawing rows "
    "says nothing."
)
_OF_STATISTIC = {
    "AUC": "AUC: the probability that a forget row looks more trained on than a hold-out row.",
    "p-value": "p-value: 1 where no test tells the model from one without the forget rows.",
    "task score": "task score: of lm-evaluation-harness on its own data (lm_eval), in brackets "
    "1.96 of its standard errors either way.",
    "harmonic mean": "harmonic mean: 0 where one of its parts is.",
}
_OF_METRIC = {
    "privleak": "privleak: change of 1 - AUC against a model without the forget rows (0.5 without "
    "such a model); below 0 forget rows still look trained on.",
}

# ---- kinds of measures ----


def is_evaluation(dataset: xr.Dataset) -> bool:
    """Whether a result holds measures instead of G-effects."""
    return "sample_value" in dataset


def is_control(dataset: xr.Dataset) -> bool:
    """Whether measures are those of `geffect_fast.control`."""
    return "alpha_chosen" in dataset


def is_relearning(dataset: xr.Dataset) -> bool:
    """Whether measures are those of `geffect_fast.relearn`."""
    return {"model", "step"} <= set(dataset["value"].dims)


def place_axis(dataset: xr.Dataset) -> str | None:
    """The axis of an evaluation's models or steps; None where it is of one model."""
    return next((str(dim) for dim in dataset["value"].dims if dim in ("model", "step")), None)


def measured_sets(dataset: xr.Dataset) -> list[str]:
    """The sets on which some metric has a number."""
    return _known(dataset, "set")


def measured_metrics(dataset: xr.Dataset) -> list[str]:
    """The metrics that have a number on some set."""
    return _known(dataset, "metric")


def _known(dataset: xr.Dataset, axis: str) -> list[str]:
    known = dataset["value"].notnull()
    there = known.any([dim for dim in known.dims if dim != axis])
    return [str(name) for name in dataset[axis].values[there.values]]


_LIVE = {
    "measure": "value",
    "measure_low": "value_low",
    "measure_high": "value_high",
    "measured_set": "set",
}


def live_measures(dataset: xr.Dataset) -> xr.Dataset | None:
    """Metrics measured during a training, as an evaluation along `step`; None where there are none.

    Args:
        dataset: a step result.
    """
    if "measure" not in dataset:
        return None
    found = dataset[["measure", "measure_low", "measure_high"]].rename(_LIVE)
    there = found["value"].notnull().any(["metric", "set"])
    return found.isel(step=there.values)


# ---- numbers ----


def number_with_bounds(of: xr.Dataset) -> str:
    """A number with its bounds; empty where there is no number."""
    return "" if math.isnan(float(of["value"])) else _with_bounds(*read_number(of, "value"))


def _with_bounds(value: float, interval: Interval) -> str:
    known = "" if math.isnan(interval[0]) else f" {bounds(interval, '.2g')}"
    return f"{number(value, '.3g')}{known}"


def measure_notes(dataset: xr.Dataset) -> list[str]:
    """Sentences that explain bounds, statistics and metrics, as far as the measures hold them."""
    known = dataset["value"].notnull()
    bounded = dataset["value_low"].notnull()
    metrics = measured_metrics(dataset)
    statistics = dataset["statistic"].sel(metric=metrics).values.tolist()
    return [
        *([_BOUNDS] if bool(bounded.any()) else []),
        *([_NO_BOUNDS] if bool((known & ~bounded).any()) else []),
        *(said for statistic, said in _OF_STATISTIC.items() if statistic in statistics),
        *(said for name, said in _OF_METRIC.items() if any(m.startswith(name) for m in metrics)),
    ]


def meanings(dataset: xr.Dataset) -> list[str]:
    """A sentence on what each metric is; none for results of earlier versions."""
    listed: list[dict[str, Any]] = json.loads(dataset.attrs.get("metrics", "[]"))
    names = [str(name) for name in dataset["metric"].values]
    return [
        f"{name}: {each['about']}"
        for name, each in zip(names, listed, strict=False)
        if each.get("about")
    ]


# ---- shares of a control ----


def share_head(dataset: xr.Dataset) -> list[str]:
    """Names of the columns of `share_rows`."""
    asked = json.loads(dataset.attrs["control"])
    kept_on = f"{asked['metric']}, {asked.get('set', 'retain')}"
    return ["method", "share kept", "fails at", kept_on, "of the original's", "without mixing"]


def share_rows(dataset: xr.Dataset) -> list[list[str]]:
    """Cells with each method's largest share that keeps enough, and how much it keeps."""
    kept, rows = _original_keeps(dataset), []
    for method in dataset["model"].values.tolist():
        of = dataset.sel(model=method)
        share, lost = float(of["alpha_chosen"]), float(of["alpha_lost"])
        there, whole = (of.sel(alpha=alpha) for alpha in (share, 1.0))
        value, interval = read_number(there, "retention")
        rows.append(
            [
                str(method),
                f"{share:.3g}",
                "" if math.isnan(lost) else f"{lost:.3g}",
                _with_bounds(value, interval),
                f"{number(100 * value / kept, '.1f')}%",
                f"{number(100 * float(whole['retention']) / kept, '.1f')}%",
            ]
        )
    return rows


def share_note(dataset: xr.Dataset) -> str:
    """The sentence that says what a share is."""
    asked = json.loads(dataset.attrs["control"])
    return (
        f"The original has {number(_original_keeps(dataset), '.3g')}. A share is the largest found "
        f"that keeps {asked['tau']:.0%} of that, to within {asked['tolerance']:g}."
    )


def _original_keeps(dataset: xr.Dataset) -> float:
    return float(dataset["retention"].sel(alpha=0.0).isel(model=0))


# ---- sentences ----


def measure_findings(dataset: xr.Dataset) -> list[str]:
    """Sentences on what was measured, the most important first."""
    if is_control(dataset):
        return [*_controlled(dataset), *rises(dataset)]
    if is_relearning(dataset):
        return _relearned(dataset)
    axis = place_axis(dataset)
    if axis is None:
        return _of_one(dataset)
    return _of_steps(dataset) if axis == "step" else _of_several(dataset)


def _of_one(dataset: xr.Dataset) -> list[str]:
    said = []
    for name in measured_sets(dataset):
        of = dataset.sel(set=name)
        where = "Over all sets" if name == "all" else f"On {name}"
        numbers = [
            f"{metric} {found}"
            for metric in measured_metrics(dataset)
            if (found := number_with_bounds(of.sel(metric=metric)))
        ]
        said.append(f"{where}: {', '.join(numbers)}.")
    return said


def _of_several(dataset: xr.Dataset) -> list[str]:
    """Sentences that name the models with the least and the most by each metric and set."""
    said = []
    for metric in measured_metrics(dataset):
        for name in measured_sets(dataset):
            of = dataset.sel(metric=metric, set=name)
            values = of["value"].values
            if np.isnan(values).all():
                continue
            ends = [of.isel(model=int(at)) for at in (np.nanargmin(values), np.nanargmax(values))]
            least, most = (f"{number_with_bounds(end)} ({end['model'].item()})" for end in ends)
            where = f"{metric}, {name}"
            if float(ends[0]["value"]) == float(ends[1]["value"]):
                said.append(f"{where}: {number_with_bounds(ends[0])} in all models.")
                continue
            overlap = float(ends[0]["value_high"]) >= float(ends[1]["value_low"])
            within = "; their intervals overlap" if overlap else ""
            said.append(f"{where}: from {least} to {most}{within}.")
    return said


def _of_steps(dataset: xr.Dataset) -> list[str]:
    steps = dataset["step"].values
    said = []
    for metric in measured_metrics(dataset):
        moved = [
            f"{_on(name)} {from_to}"
            for name in measured_sets(dataset)
            if (from_to := _from_to(dataset.sel(metric=metric, set=name)))
        ]
        if moved:
            said.append(f"{metric} at steps {steps[0]} and {steps[-1]}: {', '.join(moved)}.")
    return said


def _relearned(dataset: xr.Dataset) -> list[str]:
    rows = json.loads(dataset.attrs["n_rows"])
    trained, every = rows["relearned"], sum(rows.get(name, 0) for name in ("relearned", "others"))
    updates = int(dataset["step"].values[-1])
    said = [f"{updates} updates on {trained} of {every} forget rows."]
    for metric in measured_metrics(dataset):
        for name in measured_sets(dataset):
            of = dataset.sel(metric=metric, set=name)
            moved = [
                f"{model} {from_to}"
                for model in of["model"].values.tolist()
                if (from_to := _from_to(of.sel(model=model)))
            ]
            if moved:
                said.append(f"{metric}, {name}: {', '.join(moved)}.")
    return said


def _controlled(dataset: xr.Dataset) -> list[str]:
    asked = json.loads(dataset.attrs["control"])
    methods = dataset["model"].values.tolist()
    shares = ", ".join(f"{float(dataset['alpha_chosen'].sel(model=m)):.3g} of {m}" for m in methods)
    kept_on = asked.get("set", "retain")
    said = [
        f"What keeps {asked['tau']:.0%} of the original's {asked['metric']} ({kept_on}): {shares}."
    ]
    for metric in measured_metrics(dataset):
        for name in measured_sets(dataset):
            of = dataset.sel(metric=metric, set=name)
            numbers = [f"{m} {n}" for m in methods if (n := number_with_bounds(of.sel(model=m)))]
            if numbers:
                original = number(float(of["original_value"]), ".3g")
                said.append(f"{metric}, {name}, there: {', '.join(numbers)}; original {original}.")
    return said


def rises(dataset: xr.Dataset) -> list[str]:
    """A sentence for each method of a control whose retention rises along the grid."""
    found = []
    for method in dataset["model"].values.tolist():
        of = dataset.sel(model=method)
        if bool(of["monotone"]):
            continue
        grid = of["retention"].sel(alpha=of["on_grid"])
        change = np.diff(grid.values)
        at = int(change.argmax())
        alphas = grid["alpha"].values
        found.append(
            f"{method}: retention is not monotone along the share (it rises by "
            f"{float(change[at]):.2g} from {alphas[at]:.3g} to {alphas[at + 1]:.3g}), so the last "
            "share of the grid that keeps enough was refined; between points of the grid there may "
            "be others."
        )
    return found


def _on(name: str) -> str:
    return "over all sets" if name == "all" else f"on {name}"


def _from_to(of: xr.Dataset) -> str:
    """The first and the last number along steps; empty where either is not known."""
    first, last = (number_with_bounds(of.isel(step=at)) for at in (0, -1))
    return f"from {first} to {last}" if first and last else ""
