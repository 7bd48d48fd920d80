"""Tables for the terminal of effects at the original model beside what unlearning changed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from geffect_fast.measure.rank_correlation import FEWEST
from geffect_fast.report.format import bounds, number
from geffect_fast.report.summary.effects import read_number
from geffect_fast.report.summary.predictors import (
    EFFECTS,
    EFFECTS_NOTE,
    RANKS_NOTE,
    measured_pairs,
    original_values,
    prediction_sentence,
    predictor_notes,
)
from geffect_fast.report.tables.cells import with_interval
from geffect_fast.report.tables.fitted import FittedTable

if TYPE_CHECKING:
    import xarray as xr


_BESIDE_NOTE = f"{EFFECTS_NOTE} The others: what the unlearned model has, below it the change."
_TAU_NOTE = "τ: Kendall's."
_MOST = 4
"""The most pairs of a metric and a set that one table has room for."""


def render_against_effects(dataset: xr.Dataset) -> RenderableType:
    """The table of effects beside changes, and that of rank correlations where there are any.

    Both are for `rich.console.Console.print`. A few runs have no rank correlations.
    """
    beside = Group(*render_beside(dataset), Text(_BESIDE_NOTE, style="dim"))
    if not bool(dataset["spearman"].notnull().any()):
        return Group(beside, Text(prediction_sentence(dataset)))
    note = Text(" ".join([RANKS_NOTE, _TAU_NOTE, *predictor_notes(dataset)]), style="dim")
    return Group(beside, render_ranks(dataset), note, Text(prediction_sentence(dataset)))


def render_beside(dataset: xr.Dataset) -> list[FittedTable]:
    """Tables with a row a run: effects at the original model, every metric's value and change.

    The metrics are those on the forget data, on the retain data and over all sets together. One
    table holds up to `_MOST` pairs of a metric and a set; further pairs go into further tables.
    """
    pairs = [pair for pair in measured_pairs(dataset) if pair[1] in ("forget", "retain", "all")]
    return [_beside(dataset, pairs[at : at + _MOST]) for at in range(0, len(pairs), _MOST)]


def _beside(dataset: xr.Dataset, pairs: list[tuple[str, str]]) -> FittedTable:
    """The table of effects beside the changes of some pairs of a metric and a set."""
    shown = [name for name in EFFECTS if name in dataset["predictor"].values]
    table = FittedTable(
        "effects at the original model beside what unlearning did",
        ["run", *shown, *(f"{_short(metric)}\n{name}" for metric, name in pairs)],
        ["run"],
    )
    before = dict(zip(measured_pairs(dataset), original_values(dataset), strict=True))
    values = [number(before[pair], ".3g") for pair in pairs]
    table.add_row("original", *[""] * len(shown), *values)
    for run in dataset["run"].values.tolist():
        of = dataset.sel(run=run)
        cells = []
        for predictor in shown:
            spec = ".2f" if predictor == "collateral" else "+.2g"
            known = read_number(of.sel(predictor=predictor), "effect")
            cells.append(with_interval(*known, spec))
        for metric, name in pairs:
            value = float(of["value"].sel(model=run, metric=metric, set=name))
            change = float(of["change"].sel(metric=metric, set=name))
            cells.append(Text(f"{number(value, '.3g')}\n").append(number(change, "+.2g"), "dim"))
        objective = str(of["objective"].item())
        words = Text(run)
        if objective != run:
            words.append(f"\n{objective}", "dim")
        table.add_row(words, *cells)
    return table


def render_ranks(dataset: xr.Dataset) -> FittedTable:
    """A table with a row a metric and set: every predictor's rank correlation with the change."""
    predictors = dataset["predictor"].values.tolist()
    most = int(dataset["n_runs"].max())
    title = f"rank correlations over {most} runs"
    table = FittedTable(title, ["change of", *predictors], ["change of"])
    for metric, name in measured_pairs(dataset):
        of = dataset.sel(metric=metric, set=name)
        table.add_row(
            f"{metric}\n{name}", *(_rank_cell(of.sel(predictor=p), most) for p in predictors)
        )
    return table


def _rank_cell(of: xr.Dataset, most: int) -> Text:
    """Coefficients of a predictor and a change; empty where fewer than `FEWEST` runs have both."""
    (value, interval), n = read_number(of, "spearman"), int(of["n_runs"])
    if math.isnan(value):
        return Text("" if n < FEWEST else "–")
    beyond = bool(of["beyond_noise"])
    text = Text(number(value, "+.2f") + ("*" if beyond else ""), "" if beyond else "dim")
    if not math.isnan(interval[0]):
        text.append(f"\n{bounds(interval, '+.2f')}", style="dim")
    text.append(f"\nτ {number(float(of['kendall']), '+.2f')}", style="dim")
    return text if n == most else text.append(f"\n{n} runs", style="dim")


def _short(metric: str) -> str:
    """A metric's name. A long one is broken after its first word, as columns are narrow."""
    return metric.replace("_", "_\n", 1) if len(metric) > 12 else metric
