"""The tables of a control for the terminal: the share of each method, and its measures there."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from geffect_fast.report.tables.evaluate import render_evaluation

if TYPE_CHECKING:
    import xarray as xr


def is_control(dataset: xr.Dataset) -> bool:
    """Whether measures are those of `geffect_fast.control`."""
    return "alpha_chosen" in dataset


def render_control(dataset: xr.Dataset) -> RenderableType:
    """Shares and measures of the methods, for `rich.console.Console.print`."""
    said = json.loads(dataset.attrs["control"])
    kept = float(dataset["retention"].sel(alpha=0.0).isel(model=0))
    table = Table(box=box.SIMPLE_HEAD, title="share kept of each method", title_justify="left")
    kept_on = f"{said['metric']}, {said.get('set', 'retain')}"
    for name in ("method", "share kept", "fails at", kept_on, "of the original's"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_column("without mixing", justify="right")
    for method in dataset["model"].values.tolist():
        of = dataset.sel(model=method)
        share, lost = float(of["alpha_chosen"]), float(of["alpha_lost"])
        there, whole = (of.sel(alpha=alpha) for alpha in (share, 1.0))
        value, low, high = (
            float(there[name]) for name in ("retention", "retention_low", "retention_high")
        )
        bounds = "" if math.isnan(low) else f" [{low:.2g}, {high:.2g}]"
        table.add_row(
            method,
            f"{share:.3g}",
            "" if math.isnan(lost) else f"{lost:.3g}",
            f"{value:.3g}{bounds}",
            f"{value / kept:.1%}",
            f"{float(whole['retention']) / kept:.1%}",
        )
    notes = [
        f"The original has {kept:.3g}; a share is the largest found that keeps {said['tau']:.0%} "
        f"of it, to within {said['tolerance']:g}. Below: measures at that share.",
        *rises(dataset),
    ]
    return Group(table, *(Text(note, style="dim") for note in notes), render_evaluation(dataset))


def rises(dataset: xr.Dataset) -> list[str]:
    """A sentence for each method whose retention rises along the grid."""
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
