"""The figure of changes against predictors: a panel a metric and predictor, a point a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.format import bounds, number
from geffect_fast.report.summary.effects import read_number
from geffect_fast.report.summary.predictors import measured_pairs

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure

FIGURE = "against_effects"
SHOWN = ("e_u", "e_r", "collateral", "update_u", "update_r")
"""Predictors that the figure shows where the result holds them. Tables show all predictors."""
_WORDS = {
    "e_u": "e_u at the original model",
    "e_r": "e_r at the original model",
    "collateral": "collateral at the original model",
    "update_u": "forget risk by the first updates, first order",
    "update_r": "retain risk by the first updates, first order",
}
_MARKERS = ("o", "^", "s", "D", "v", "P")
_NOTE = "A point a run. ρ: Spearman's, in brackets by drawing the runs anew; *: told from chance."


def predictor_figure(dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of changes: a panel a metric and predictor, a point a run, a colour a set.

    A metric whose changes are the same for all runs is left out.

    Args:
        dataset: result of `geffect_fast.against_effects`.

    Returns:
        The figure; None where no change differs between runs, or there is no predictor to draw.
    """
    pairs = [pair for pair in measured_pairs(dataset) if _differs(dataset, pair)]
    metrics = list(dict.fromkeys(metric for metric, _ in pairs))
    predictors = [name for name in SHOWN if name in dataset["predictor"].values]
    if not metrics or not predictors:
        return None
    figure = style.blank_figure(0.6 + 3.5 * len(predictors), 0.9 + 3.0 * len(metrics))
    grid = figure.subplots(len(metrics), len(predictors), squeeze=False)
    names = list(dict.fromkeys(name for _, name in pairs))
    looks = {
        name: {"color": style.style_of(i)["color"], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, name in enumerate(names)
    }
    for row, metric in zip(grid, metrics, strict=True):
        sets = [name for of, name in pairs if of == metric]
        for panel, predictor in zip(row, predictors, strict=True):
            of = dataset.sel(metric=metric, predictor=predictor)
            # set before the points are drawn, as margins follow the scale a panel then has
            style.fit_scale(panel.set_xscale, [of["effect"].values])
            said = [_points(panel, of.sel(set=name), name, looks[name]) for name in sets]
            style.zero_lines(panel, color="#bbbbbb", zorder=0)
            panel.set_title("\n".join([metric, *said]), fontsize=9, loc="left")
            panel.set_xlabel(_WORDS[predictor], fontsize=8)
            panel.set_ylabel("change", fontsize=8)
            style.dress(panel)
            panel.tick_params(labelsize=7)
    keys: dict[str, Any] = {}
    for panel in grid.ravel():
        keys |= {str(each.get_label()): each for each in panel.collections}
    keys = {name: keys[name] for name in names}
    look = {"ncols": len(names), "frameon": False, "fontsize": 9}
    figure.legend([*keys.values()], names, loc="outside lower center", **look)
    style.note(figure, _NOTE)
    figure.set_label(
        f"Changes of {', '.join(metrics)} against what was known at the original model, "
        f"{', '.join(predictors)}: a panel a pair, a colour a data set."
    )
    return figure


def _differs(dataset: xr.Dataset, pair: tuple[str, str]) -> bool:
    """Whether the changes of a metric and set are not all the same."""
    changes = dataset["change"].sel(metric=pair[0], set=pair[1]).values
    return len(np.unique(changes[np.isfinite(changes)])) > 1


def _points(panel: Axes, of: xr.Dataset, name: str, look: dict[str, Any]) -> str:
    """Draw a point for each run on a set, and return the words on their rank correlation."""
    x, y = of["effect"].values, of["change"].values
    there = np.isfinite(x) & np.isfinite(y)
    panel.scatter(x[there], y[there], s=22, alpha=0.8, linewidths=0, zorder=3, label=name, **look)
    value, interval = read_number(of, "spearman")
    if np.isnan(value):
        return f"{name}: ρ –"
    drawn = "" if np.isnan(interval[0]) else f" {bounds(interval, '+.2f')}"
    star = "*" if bool(of["beyond_noise"]) else ""
    return f"{name}: ρ {number(value, '+.2f')}{star}{drawn}"
