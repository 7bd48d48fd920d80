"""The table of a relearning for the terminal: metrics by set and model down, steps across."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from geffect_fast.report.tables.evaluate import shown

if TYPE_CHECKING:
    import xarray as xr

_COLUMNS = 6
"""Most steps that are shown, the first and the last among them."""


def is_relearning(dataset: xr.Dataset) -> bool:
    """Whether measures are those of `geffect_fast.relearn`."""
    return {"model", "step"} <= set(dataset["value"].dims)


def render_relearning(dataset: xr.Dataset) -> RenderableType:
    """Measures of the models on the way, for `rich.console.Console.print`."""
    steps = dataset["step"].values
    at = np.unique(np.linspace(0, len(steps) - 1, min(_COLUMNS, len(steps))).round().astype(int))
    table = Table(box=box.SIMPLE_HEAD, title="measures by step", title_justify="left")
    for name in ("metric", "set", "model"):
        table.add_column(name)
    for step in steps[at]:
        table.add_column(str(step), justify="right")
    for metric in dataset["metric"].values.tolist():
        for name in dataset["set"].values.tolist():
            for model in dataset["model"].values.tolist():
                of = dataset.sel(metric=metric, set=name, model=model)
                table.add_row(metric, name, model, *(shown(of.isel(step=i)) for i in at))
    return Group(table, Text(_note(dataset, len(steps) - len(at)), style="dim"))


def _note(dataset: xr.Dataset, left_out: int) -> str:
    """What the table shows: brackets, its sets and models, and how many steps have no column."""
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
