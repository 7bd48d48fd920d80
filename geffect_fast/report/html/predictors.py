"""Page sections on measures that are set against effects at the original model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geffect_fast.report.format import number, number_with_interval
from geffect_fast.report.html.blocks import Block, Table, notes_of
from geffect_fast.report.summary.effects import read_number
from geffect_fast.report.summary.predictors import (
    EFFECTS,
    EFFECTS_NOTE,
    RANKS_NOTE,
    measured_pairs,
    predictor_notes,
)

if TYPE_CHECKING:
    import xarray as xr


def predictor_blocks(dataset: xr.Dataset) -> list[Block]:
    """Tables of each run's predictors, of the changes on each set, and of how the two agree.

    Args:
        dataset: result of `geffect_fast.against_effects`.
    """
    note = " ".join([EFFECTS_NOTE, *predictor_notes(dataset)])
    blocks: list[Block] = [_known(dataset), *notes_of([note])]
    sets = dict.fromkeys(name for _, name in measured_pairs(dataset))
    blocks += [_beside(dataset, name) for name in sets]
    blocks += notes_of(["Changes: what the unlearned model has more than the original."])
    if bool(dataset["spearman"].notnull().any()):
        blocks += [_ranks(dataset), *notes_of([RANKS_NOTE])]
    return blocks


def _known(dataset: xr.Dataset) -> Table:
    """A table with a row a run: every predictor with its bounds."""
    predictors = dataset["predictor"].values.tolist()
    rows = []
    for run in dataset["run"].values.tolist():
        of = dataset.sel(run=run)
        known = (read_number(of.sel(predictor=name), "effect") for name in predictors)
        cells = [number_with_interval(*each, "+.2g") for each in known]
        rows.append([run, str(of["objective"].item()), *cells])
    head = ["run", "objective", *predictors]
    return Table("What is known at the original model", head, rows, frozenset([0, 1]))


def _beside(dataset: xr.Dataset, name: str) -> Table:
    """A table with a row a run: its effects, and the change of every metric on one set."""
    metrics = [metric for metric, of in measured_pairs(dataset) if of == name]
    rows = []
    for run in dataset["run"].values.tolist():
        of = dataset.sel(run=run, set=name)
        rows.append(
            [
                run,
                *(number(float(of["effect"].sel(predictor=each)), "+.2g") for each in EFFECTS),
                *(number(float(of["change"].sel(metric=metric)), "+.3g") for metric in metrics),
            ]
        )
    where = "of all sets together" if name == "all" else f"on {name}"
    head = ["run", *EFFECTS, *metrics]
    return Table(f"Effects before, and changes {where}", head, rows)


def _ranks(dataset: xr.Dataset) -> Table:
    """A table with a row a metric and set: Spearman's coefficient of every predictor."""
    rows = []
    for metric, name in measured_pairs(dataset):
        cells = []
        for predictor in dataset["predictor"].values.tolist():
            of = dataset.sel(metric=metric, set=name, predictor=predictor)
            star = "*" if bool(of["beyond_noise"]) else ""
            cells.append(number_with_interval(*read_number(of, "spearman"), "+.2f") + star)
        rows.append([f"{metric}, {name}", *cells])
    head = ["change of", *dataset["predictor"].values.tolist()]
    return Table("Rank correlations with what is known before", head, rows)
