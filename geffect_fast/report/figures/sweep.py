"""Figures of a sweep: effects against hyper-parameters, and the Pareto front of all objectives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.figures.curves import shade
from geffect_fast.report.summary.effects import thinned
from geffect_fast.report.summary.sweep import Swept, SweptFamily

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure

_ROWS = {
    "e_u": "e_u\n(lower: removes more)",
    "e_r": "e_r\n(below 0: harms the rest)",
    "collateral": "collateral\n(lower: less harm\nper removal)",
}
LEGEND, NAMED = 10, 10
"""The most lines or families that a legend holds, and the most objectives of a front with names."""
BARS = 24
"""The most objectives whose intervals are drawn. Of more, the front's are, or its named ones."""


def sweep_drawings(dataset: xr.Dataset) -> style.Drawings:
    """Functions that draw the figures of a sweep, one each."""
    return {"sweep": lambda: sweep_figure(dataset), "pareto": lambda: pareto_figure(dataset)}


def sweep_figure(dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of effects and collateral against every swept parameter, a line a family.

    A family with several swept parameters has a line for each combination of the other parameters'
    values, darker for larger values. None where no parameter has two values.
    """
    swept = Swept.of(dataset)
    drawn: dict[str, list[tuple[SweptFamily, str]]] = {}
    for i, family in enumerate(swept.families):
        for name, values in family.values.items():
            if len(set(values)) > 1:
                drawn.setdefault(name, []).append((family, style.style_of(i)["color"]))
    if not drawn:
        return None
    figure = style.blank_figure(0.8 + 4.2 * len(drawn), 8.6)
    panels = figure.subplots(len(_ROWS), len(drawn), squeeze=False, sharex="col")
    for name, families, column in zip(drawn, drawn.values(), panels.T, strict=True):
        for panel, quantity in zip(column, _ROWS, strict=True):
            values, bounds = getattr(swept, quantity), np.stack(swept.bounds[quantity])
            if quantity == "collateral":  # infinite bounds leave the panel
                bounds = np.where(np.isnan(values), np.nan, bounds.clip(-10, 10))
            for family, colour in families:
                _draw_family(panel, family, name, values[family.at], bounds[:, family.at], colour)
            style.zero_lines(panel, across=False)
            panel.margins(y=0.1)
            if quantity == "collateral":  # objectives that hardly forget would hide others
                at = np.concatenate([family.at for family, _ in families])
                seen = np.concatenate([[0.0], values[at], *bounds[:, at]])
                seen = np.clip(np.nan_to_num(seen), -2, 2)
                room = 0.1 * np.ptp(seen) or 1.0
                panel.set_ylim(seen.min() - room, seen.max() + room)
            else:
                _fit_scales(panel.set_yscale, [values[family.at] for family, _ in families])
            panel.tick_params(labelsize=8)
        positive = all((family.values[name] > 0).all() for family, _ in families)
        if positive and any(family.axes[name] for family, _ in families):
            column[-1].set_xscale("log")
        column[-1].set_xlabel(name.replace("_", " "), fontsize=11)
        _legend(column[-1], loc="upper center", bbox_to_anchor=(0.5, -0.28))
    for panel, words in zip(panels[:, 0], _ROWS.values(), strict=True):
        panel.set_ylabel(words, fontsize=10)
    if swept.has_bounds:
        style.note(figure, style.SHADED_NOTE)
    figure.set_label("Effects and collateral against hyper-parameters.")
    return figure


def pareto_figure(dataset: xr.Dataset, size: tuple[float, float] = (9.5, 6.2)) -> PlainFigure:
    """Scatter of e_u against e_r of all objectives, with the Pareto front drawn and named."""
    swept = Swept.of(dataset)
    figure = style.blank_figure(*size)
    panel = figure.subplots()
    finite = np.isfinite(swept.e_u) & np.isfinite(swept.e_r)
    for i, family in enumerate(swept.families):
        at = family.at[finite[family.at]]
        marker = "o" if family.axes else "D"
        colour = style.style_of(i)["color"]
        panel.scatter(
            swept.e_u[at], swept.e_r[at], s=26, c=colour, marker=marker, label=family.text, zorder=3
        )
    style.zero_lines(panel)
    front = swept.ranked_front()
    if swept.has_bounds:
        _draw_bars(panel, swept, np.flatnonzero(finite) if finite.sum() <= BARS else front)
        style.note(figure, style.BARS_NOTE)
    e_u, e_r = swept.e_u[front], swept.e_r[front]
    panel.step(e_u, e_r, where="post", color="black", linewidth=1, zorder=2)
    panel.scatter(
        e_u,
        e_r,
        s=60,
        facecolors="none",
        edgecolors="black",
        linewidths=0.7,
        label="Pareto front",
        zorder=4,
    )
    each = [family.at[finite[family.at]] for family in swept.families]
    _fit_scales(panel.set_xscale, [swept.e_u[at] for at in each])
    _fit_scales(panel.set_yscale, [swept.e_r[at] for at in each])
    panel.margins(0.12)
    limits = panel.axis()
    if limits[0] < 0 < limits[3]:
        panel.fill_between(
            [limits[0], 0], 0, limits[3], color=style.LINE_WANTED, alpha=0.07, linewidth=0
        )
        panel.axis(limits)
    panel.text(
        0.015,
        0.98,
        "wanted: removes, spares the rest",
        color=style.LINE_WANTED,
        fontsize=10,
        fontweight="bold",
        ha="left",
        va="top",
        transform=panel.transAxes,
    )
    panel.set_xlabel("e_u: effect on the forget risk (left: removes more)", fontsize=11)
    panel.set_ylabel("e_r: effect on the retain risk (down: harms more)", fontsize=11)
    if not finite.all():
        panel.set_title(f"{(~finite).sum()} objectives NaN or infinite", fontsize=9)
    _legend(panel, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.draw_without_rendering()  # fixes the points, so that names keep apart
    _name_points(panel, thinned(front, NAMED), swept)
    figure.set_label("Removal against harm, and the Pareto front.")
    return figure


def _draw_bars(panel: Axes, swept: Swept, places: np.ndarray) -> None:
    """Draw intervals of objectives. Of more than `BARS`, only the named ones have theirs drawn."""
    if len(places) > BARS:
        places = thinned(places, NAMED)
    x, y = swept.e_u[places], swept.e_r[places]
    offs = [
        np.abs(np.stack(swept.bounds[name])[:, places] - values)
        for name, values in (("e_u", x), ("e_r", y))
    ]
    panel.errorbar(
        x, y, xerr=offs[0], yerr=offs[1], fmt="none", ecolor=style.GREY, elinewidth=0.8, alpha=0.7,
        zorder=1,
    )  # fmt: skip


def _draw_family(
    panel: Axes,
    family: SweptFamily,
    name: str,
    values: np.ndarray,
    bounds: np.ndarray,
    colour: str,
) -> None:
    """Draw a family's values against one of its parameters.

    There is a line for each combination of the other parameters' values.

    Args:
        panel: panel to draw in.
        family: the family.
        name: name of the parameter.
        values: values to draw, `(n,)`.
        bounds: bounds of the values' intervals, `(2, n)`; NaN: not known.
        colour: colour of the family.
    """
    from matplotlib.colors import to_rgb

    others = [n for n, v in family.values.items() if n != name and len(set(v)) > 1]
    points = sorted(set(zip(*(family.values[n] for n in others), strict=True))) if others else [()]
    x = family.values[name]
    for i, point in enumerate(points):
        on_line = np.ones(len(x), dtype=bool)
        for other, value in zip(others, point, strict=True):
            on_line &= family.values[other] == value
        order = np.flatnonzero(on_line)[np.argsort(x[on_line], kind="stable")]
        depth = 1 if len(points) == 1 else 0.35 + 0.65 * i / (len(points) - 1)
        tint = tuple(1 - depth * (1 - part) for part in to_rgb(colour))
        fixed = ", ".join(f"{n}={v:.6g}" for n, v in zip(others, point, strict=True))
        label = f"{family.text}: {fixed}" if fixed else family.text
        y = np.where(np.isfinite(values), values, np.nan)[order]
        panel.plot(x[order], y, color=tint, marker="o", markersize=3, linewidth=1.4, label=label)
        shade(panel, x[order], bounds[:, order], tint)


def _fit_scales(set_scale: Callable[..., Any], families: list[np.ndarray]) -> None:
    """Set a scale that is linear about 0 and logarithmic beyond, where sizes differ much.

    Sizes differ much where one family's largest is more than 20 times another's.
    """
    sizes = [np.abs(values[np.isfinite(values)]).max(initial=0.0) for values in families]
    sizes = [size for size in sizes if size > 0]
    if sizes and max(sizes) > 20 * min(sizes):
        set_scale("symlog", linthresh=10.0 ** math.ceil(math.log10(min(sizes))))


def _legend(panel: Axes, **where: Any) -> None:
    """Draw a legend of all lines, or of `LEGEND` of them."""
    handles, labels = panel.get_legend_handles_labels()
    kept = thinned(np.arange(len(labels)), LEGEND)
    title = f"{LEGEND} of {len(labels)}, from light to dark" if len(labels) > LEGEND else None
    panel.legend(
        [handles[i] for i in kept],
        [labels[i] for i in kept],
        fontsize=8,
        frameon=False,
        title=title,
        title_fontsize=8,
        **where,
    )


def _name_points(panel: Axes, places: np.ndarray, swept: Swept) -> None:
    """Write names beside points, on the side towards the middle. Names do not overlap."""
    taken: list[tuple[float, float]] = []
    for i in places:
        point = (swept.e_u[i], swept.e_r[i])
        x, y = panel.transData.transform(point)
        if any(abs(x - a) < 170 and abs(y - b) < 14 for a, b in taken):
            continue
        taken.append((x, y))
        left = panel.transAxes.inverted().transform((x, y))[0] < 0.5
        panel.annotate(
            swept.objectives[i],
            point,
            (7, -7) if left else (-7, 7),
            textcoords="offset points",
            ha="left" if left else "right",
            va="top" if left else "bottom",
            fontsize=8,
            zorder=4,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )
