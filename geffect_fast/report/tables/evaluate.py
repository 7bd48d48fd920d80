"""The table of an evaluation for the terminal: metrics down, sets across, models or steps apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import xarray as xr

_BOUNDS = "In brackets: bounds by the choice of the rows."
_NO_BOUNDS = (
    "No brackets: rows that all score alike, one row alone, or a p-value, of which drawing rows "
    "says nothing."
)
_OF_STATISTIC = {
    "AUC": "AUC: the probability that a forget row looks more trained on than a hold-out row.",
    "p-value": "p-value: 1 where no test tells the model from one without the forget rows.",
    "harmonic mean": "harmonic mean: 0 where one of its parts is.",
}
_OF_METRIC = {
    "privleak": "privleak: change of 1 - AUC against a model without the forget rows (0.5 without "
    "such a model); below 0 forget rows still look trained on.",
}


def render_evaluation(dataset: xr.Dataset) -> RenderableType:
    """Measures of one model, or of several below each other, for `rich.console.Console.print`."""
    table = Table(box=box.SIMPLE_HEAD, title="measures", title_justify="left")
    axis = next((dim for dim in dataset["value"].dims if dim in ("model", "step")), None)
    if axis is not None:
        table.add_column(str(axis))
    table.add_column("metric")
    table.add_column("number")
    sets = [
        name
        for name in dataset["set"].values.tolist()
        if bool(dataset["value"].sel(set=name).notnull().any())
    ]
    for name in sets:
        table.add_column(name, justify="right")
    places = [None] if axis is None else dataset[axis].values.tolist()
    for metric in dataset["metric"].values.tolist():
        of_metric = dataset.sel(metric=metric)
        for at in places:
            of = of_metric if axis is None else of_metric.sel({axis: at})
            row = [] if axis is None else [str(at)]
            cells = [shown(of.sel(set=name)) for name in sets]
            table.add_row(*row, metric, str(of["statistic"].item()), *cells)
    return Group(table, Text(" ".join(notes(dataset)), style="dim"))


def notes(dataset: xr.Dataset) -> list[str]:
    """What stands in the table beside means, each explained in a sentence."""
    known = dataset["value"].notnull()
    bounded = dataset["value_low"].notnull()
    over = [dim for dim in known.dims if dim != "metric"]
    shown_here = dataset["metric"].values[known.any(over).values].tolist()
    statistics = dataset["statistic"].sel(metric=shown_here).values.tolist()
    return [
        *([_BOUNDS] if bool(bounded.any()) else []),
        *([_NO_BOUNDS] if bool((known & ~bounded).any()) else []),
        *(said for statistic, said in _OF_STATISTIC.items() if statistic in statistics),
        *(said for name, said in _OF_METRIC.items() if any(m.startswith(name) for m in shown_here)),
    ]


def shown(of: xr.Dataset) -> str:
    """A number with its bounds, empty where there is none."""
    value, low, high = (float(of[name]) for name in ("value", "value_low", "value_high"))
    if math.isnan(value):
        return ""
    number = f"{value:.3g}"
    return number if math.isnan(low) else f"{number} [{low:.2g}, {high:.2g}]"
