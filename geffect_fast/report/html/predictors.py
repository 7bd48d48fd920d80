"""What a page says of measures that are set against effects at the original model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geffect_fast.report.figures.predictors import FIGURE, predictor_figure
from geffect_fast.report.format import cell, cell_with_interval
from geffect_fast.report.html.blocks import Block, Table, Text, drawn_blocks, notes_of
from geffect_fast.report.summary.predictors import (
    BESIDE_NOTE,
    RANKS_NOTE,
    measured_pairs,
    prediction_sentence,
    predictor_notes,
)

if TYPE_CHECKING:
    import xarray as xr


def predictor_blocks(dataset: xr.Dataset) -> list[Block]:
    """The blocks of a section: what was found, both tables, and the figure.

    Args:
        dataset: of `geffect_fast.against_effects`.
    """
    blocks: list[Block] = [Text(prediction_sentence(dataset), "lead"), _beside(dataset)]
    blocks += notes_of([BESIDE_NOTE])
    if bool(dataset["spearman"].notnull().any()):
        blocks.append(_ranks(dataset))
        blocks += notes_of([" ".join([RANKS_NOTE, *predictor_notes(dataset)])])
    return blocks + drawn_blocks({FIGURE: predictor_figure(dataset)}, (FIGURE,))


def _beside(dataset: xr.Dataset) -> Table:
    """A row a run: its effects before, and what changed."""
    predictors = dataset["predictor"].values.tolist()
    pairs = measured_pairs(dataset)
    rows = []
    for run in dataset["run"].values.tolist():
        of = dataset.sel(run=run)
        effects = [[float(of[f"effect{s}"].sel(predictor=p)) for s in _SIDES] for p in predictors]
        changes = [float(of["change"].sel(metric=metric, set=name)) for metric, name in pairs]
        rows.append(
            [
                *(run, str(of["objective"].item())),
                *(cell_with_interval(e, (low, high), "+.3g") for e, low, high in effects),
                *(cell(change, "+.3g") for change in changes),
            ]
        )
    head = ["run", "objective", *predictors, *(f"{metric}, {name}" for metric, name in pairs)]
    caption = "Effects at the original model beside the change of every metric"
    return Table(caption, head, rows, frozenset([0, 1]))


def _ranks(dataset: xr.Dataset) -> Table:
    """A row a metric and set: Spearman's coefficient of every predictor."""
    rows = []
    for metric, name in measured_pairs(dataset):
        cells = []
        for predictor in dataset["predictor"].values.tolist():
            of = dataset.sel(metric=metric, set=name, predictor=predictor)
            value, low, high = (float(of[f"spearman{side}"]) for side in _SIDES)
            star = "*" if bool(of["beyond_noise"]) else ""
            cells.append(f"{cell_with_interval(value, (low, high), '+.2f')}{star}")
        rows.append([f"{metric}, {name}", *cells])
    head = ["change of", *dataset["predictor"].values.tolist()]
    return Table("Rank correlations with what is known before", head, rows)


_SIDES = ("", "_low", "_high")
