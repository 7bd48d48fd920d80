"""The figure of optimal token weights: the frontier of effects, and objectives beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures.style import (
    BARS_NOTE,
    COLOURS,
    LINE_WANTED,
    blank_figure,
    style_of,
    zero_lines,
)
from geffect_fast.report.summary.effects import bounds_of, labels, total
from geffect_fast.report.summary.weights import goal_of
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import precision_error

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from geffect_fast.report.figures.canvas import PlainFigure

_POINT, _GREY = "#444444", "#666666"
MANY = 16
"""The most objectives whose points have labels. More points have a colour by family instead."""
ROOM = 1.3
"""Multiple of the reach of the curve and ga. Points beyond it are drawn nearer to 0."""


def frontier_figure(result: xr.Dataset, best: xr.Dataset) -> PlainFigure:
    """Figure of the frontier of (e_u, e_r), the weights chosen on it, and a point an objective.

    Points have labels, or colours by family where there are more than `MANY`. An objective whose
    effects are far larger than the curve's is drawn nearer to 0 on its own ray, where a smaller
    step would place it, and its label says so (`÷ 20`).

    Args:
        result: the result that `best` was made from.
        best: weights of `geffect_fast.optimal_weights`.
    """
    figure = blank_figure(8.2, 6.0)
    panel = figure.subplots()
    weight = float(best.attrs["max_weight"])
    e_u, e_r = best["frontier_e_u"].values, best["frontier_e_r"].values
    zero_lines(panel)
    label = f"the best that token weights from 0 to {weight:g} do"
    panel.plot(e_u, e_r, color=COLOURS[1], linewidth=2, zorder=2, label=label)
    at, label = (float(best["e_u"]), float(best["e_r"])), f"chosen: {goal_of(best)}"
    panel.plot(*at, "*", color=COLOURS[1], markersize=15, zorder=4, label=label)

    ga = [float(best[name].sum()) for name in ("token_e_u", "token_e_r")]
    reach = np.abs([[*e_u, ga[0]], [*e_r, ga[1]]]).max(axis=1)
    names, points, lost, bars = [], [], [], []
    wanted = [labels(result, "risk").index(risk) for risk in (UNLEARN, "retain")]
    effects, known = total(result)[:, wanted], bounds_of(result, "g_effect")
    intervals = np.full((2, *effects.shape), np.nan) if known is None else known[:, :, wanted]
    for k, objective in enumerate(labels(result, "objective")):
        effect = effects[k]
        if not np.isfinite(effect).all():
            lost.append(objective)
            continue
        divisor = _divisor(effect, ROOM * reach)
        names.append(objective if divisor == 1 else f"{objective} ÷ {divisor:g}")
        points.append(effect / divisor)
        bars.append(np.abs(intervals[:, k] - effect) / divisor)
    panel.margins(0.12)
    xy = np.array(points).reshape(-1, 2)
    if known is not None and 0 < len(names) <= MANY:
        off = np.array(bars)
        panel.errorbar(
            xy[:, 0], xy[:, 1], xerr=off[:, :, 0].T, yerr=off[:, :, 1].T, fmt="none", ecolor=_GREY,
            elinewidth=0.8, zorder=1,
        )  # fmt: skip
    named = _name(panel, names, xy) if len(names) <= MANY else _colour(panel, names, xy)
    panel.set_xlabel("e_u of all forget rows (left: removes)", fontsize=11)
    panel.set_ylabel("e_r (down: harms the rest)", fontsize=11)
    corner: dict[str, Any] = {"transform": panel.transAxes, "fontsize": 9}
    words = "wanted:\nremoves, spares the rest"
    panel.text(0.02, 0.98, words, ha="left", va="top", color=LINE_WANTED, **corner)
    if lost:
        panel.text(
            0.98,
            0.98,
            f"NaN or infinite: {', '.join(lost)}",
            ha="right",
            va="top",
            color=_GREY,
            **corner,
        )
    panel.legend(loc="lower right", fontsize=9, frameon=False)
    panel.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    note = (
        f"Points above the curve: weights above {weight:g}, or terms that ga has not (retain rows, "
        "other answers, hidden states)."
    )
    if any("÷" in label for label in names):
        note += "\n÷ k: drawn at a k-th of its size, where a step k times smaller puts it."
    if known is not None and len(names) <= MANY:
        note += f"\n{BARS_NOTE}"
    if share := precision_error(result.attrs):
        note += f"\nIn 16 bits points may be off by {100 * share:.2g} %."
    panel.set_title(note, loc="left", fontsize=8, color=_GREY)
    _untangle(panel, named)
    return figure


def _name(panel: Axes, labels: list[str], xy: np.ndarray) -> list[Annotation]:
    """Draw points and their labels, each on the side of its point where there is more room."""
    panel.plot(*xy.T, "o", color=_POINT, markersize=6, zorder=3, label="objectives")
    middle = sum(panel.get_xlim()) / 2
    return [
        panel.annotate(
            label,
            (x, y),
            xytext=(7 if x < middle else -7, 4),
            ha="left" if x < middle else "right",
            textcoords="offset points",
            fontsize=9,
            color=_POINT,
        )
        for label, (x, y) in zip(labels, xy, strict=True)
    ]


def _colour(panel: Axes, labels: list[str], xy: np.ndarray) -> list[Annotation]:
    """Draw points without labels, in a colour for each family, which the legend names."""
    parts = (label.partition(" ÷") for label in labels)
    families = np.array([name.split("(")[0] + over + k for name, over, k in parts])
    for i, family in enumerate(dict.fromkeys(families)):
        at, colour = xy[families == family].T, style_of(i)["color"]
        panel.plot(*at, "o", color=colour, markersize=5, zorder=3, label=family)
    return []


def _divisor(effect: np.ndarray, room: np.ndarray) -> float:
    """The smallest of 1, 2, 5, 10 … that brings an effect into the room; 1 where a room is 0."""
    needed = float((np.abs(effect) / room).max()) if room.all() else 0.0
    if needed <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(needed))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= needed)


def _untangle(panel: Axes, labels: list[Annotation]) -> None:
    """Move labels upwards where one would be written over another."""
    panel.figure.canvas.draw()
    placed: list[tuple[float, float, float, float]] = []
    scale = 72 / panel.figure.dpi
    for label in sorted(labels, key=lambda text: text.get_window_extent().y0):
        box = label.get_window_extent()
        y0, height = box.y0, box.height
        for left, low, right, high in sorted(placed, key=lambda b: b[1]):
            if box.x0 < right and left < box.x1 and y0 < high and low < y0 + height:
                y0 = high
        placed.append((box.x0, y0, box.x1, y0 + height))
        x, y = label.get_position()
        label.set_position((x, y + (y0 - box.y0) * scale))
