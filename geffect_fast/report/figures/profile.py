"""Figures of a profile: effects by part of the model, and by forget row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures.style import (
    LINE_UNWANTED,
    LINE_WANTED,
    Drawings,
    blank_figure,
    effect_colours,
    zero_lines,
)
from geffect_fast.report.format import risk_words, title_of
from geffect_fast.report.summary.effects import (
    by_place,
    by_sample,
    labels,
    named_once,
    place_half_widths,
)
from geffect_fast.results.risks import UNLEARN, effect_name

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure

NOISE_NOTE = "dots: the interval by the choice of the objectives' rows holds 0"
_QUADRANTS = (
    (0.02, 0.98, "left", "top", "removes,\nhelps the rest"),
    (0.02, 0.02, "left", "bottom", "removes,\nharms the rest"),
    (0.98, 0.98, "right", "top", "reinforces,\nhelps the rest"),
    (0.98, 0.02, "right", "bottom", "reinforces,\nharms the rest"),
)


def profile_drawings(dataset: xr.Dataset) -> Drawings:
    """Functions that draw the figures of a profile, one each."""
    return {
        "layers": lambda: layers_figure(dataset),
        "instances": lambda: instances_figure(dataset),
    }


def layers_figure(dataset: xr.Dataset) -> PlainFigure | None:
    """Heat map of objectives against parts of the model front to back, a panel a risk.

    Each row is divided by its largest size, which stands at the row's right end, so that objectives
    of different magnitude can be read together. Blue is wanted, orange is not. None where the
    result sums over parameters.
    """
    placed = by_place(dataset, blocks=True)
    if placed is None:
        return None
    parts, values = placed
    half_widths = place_half_widths(dataset, blocks=True)
    objectives, risks = labels(dataset, "objective"), labels(dataset, "risk")
    width = min(max(0.42 * len(parts), 3.2), 12)
    figure = blank_figure(2.4 + len(risks) * (width + 0.9), 1.6 + 0.36 * len(objectives))
    panels = figure.subplots(1, len(risks), sharey=True, squeeze=False)[0]
    for m, (panel, risk) in enumerate(zip(panels, risks, strict=True)):
        effect = values[:, m]
        scale = np.abs(np.nan_to_num(effect)).max(axis=1)
        shown = np.divide(
            effect, scale[:, None], out=np.zeros_like(effect), where=scale[:, None] > 0
        )
        shown[~np.isfinite(effect)] = np.nan
        if risk == UNLEARN:  # flipped, so that above 0 is wanted for every risk
            shown = -shown
        image = panel.imshow(
            np.ma.masked_invalid(shown),
            cmap=effect_colours(wanted_below=False),
            vmin=-1,
            vmax=1,
            aspect="auto",
        )
        if half_widths is not None:
            mark_noise(panel, np.arange(len(parts)), effect, half_widths[:, m])
        panel.set_facecolor("#999999")
        panel.set_title(f"{effect_name(risk)}: effect on the {risk_words(risk)}", fontsize=11)
        ticks = part_ticks(parts)
        panel.set_xticks(list(ticks), list(ticks.values()), fontsize=9)
        _rotate_names(panel)
        panel.set_yticks(range(len(objectives)), objectives, fontsize=10)
        right = panel.secondary_yaxis("right")
        right.set_yticks(range(len(objectives)), [f"{s:.1e}" for s in scale], fontsize=8)
        right.tick_params(length=0)
        panel.text(1.02, 1.01, "max |e|", fontsize=8, transform=panel.transAxes)
        right.spines["right"].set_visible(False)
        for edge in range(1, len(objectives)):
            panel.axhline(edge - 0.5, color="white", linewidth=1)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("objective", fontsize=11)
    noise = "" if half_widths is None else f"\n{NOISE_NOTE}"
    figure.supxlabel(f"part of the model, input to output (numbers: blocks){noise}", fontsize=11)
    bar = figure.colorbar(image, ax=panels, fraction=0.025, pad=0.01, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["unwanted", "0", "wanted"], fontsize=9)
    bar.set_label("|e| / max |e| of its row", fontsize=9)
    return figure


def mark_noise(panel: Axes, x: np.ndarray, values: np.ndarray, half_widths: np.ndarray) -> None:
    """Draw dots on the cells of a heat map `(rows, columns)` whose interval holds 0.

    Args:
        panel: panel of the map.
        x: middles of the map's columns.
        values: values of the cells.
        half_widths: half widths of the values' intervals; NaN: not known.
    """
    rows, columns = np.nonzero((half_widths >= np.abs(values)) & (values != 0))
    panel.plot(x[columns], rows, ".", color="#333333", markersize=3, rasterized=True)


def instances_figure(dataset: xr.Dataset) -> PlainFigure | None:
    """Scatter of e_u against e_r of every forget row. Objectives of equal effects share a panel.

    None where the result sums over samples.
    """
    effect = by_sample(dataset)
    if effect is None or not effect.sizes["sample"]:
        return None
    shown = named_once({str(of["objective"].values): of for of in effect})
    n_columns = min(4, len(shown))
    n_rows = math.ceil(len(shown) / n_columns)
    figure = blank_figure(3.3 * n_columns, 0.7 + 2.9 * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for panel, (name, one) in zip(panels, shown.items(), strict=False):
        scatter_instances(panel, one.sel(risk=UNLEARN).values, one.sel(risk="retain").values)
        panel.set_title(title_of(name, 38), fontsize=10)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    keys = panels[0].get_legend_handles_labels()
    figure.legend(*keys, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    figure.supxlabel("e_u of a forget row (left: removes)", fontsize=11)
    figure.supylabel("e_r of the row (down: harms the rest)", fontsize=11)
    return figure


def scatter_instances(panel: Axes, e_u: np.ndarray, e_r: np.ndarray) -> None:
    """Draw the effects of rows, `(n,)` each. Words in each corner say what its quadrant means."""
    finite = np.isfinite(e_u) & np.isfinite(e_r)
    zero_lines(panel)
    wanted = is_wanted(e_u, e_r)
    for of, colour, words in (
        (finite & wanted, LINE_WANTED, "wanted: removes, spares the rest"),
        (finite & ~wanted, LINE_UNWANTED, "unwanted: harms the rest, or does not remove"),
    ):
        panel.scatter(e_u[of], e_r[of], s=20, color=colour, alpha=0.65, linewidths=0, label=words)
    for values, limit in ((e_u[finite], panel.set_xlim), (e_r[finite], panel.set_ylim)):
        reach = np.abs(values).max(initial=0.0) * 1.35 or 1.0
        # a side without points keeps enough room for its words
        limit(*(np.array([-1.0, 1.0]) * reach * [_room(-values, reach), _room(values, reach)]))
    axes = panel.transAxes
    for x, y, ha, va, words in _QUADRANTS:
        panel.text(x, y, words, fontsize=7, color="#666666", ha=ha, va=va, transform=axes)
    if not finite.all():
        words = f"{(~finite).sum()} rows NaN or infinite"
        panel.text(0.5, 0.6, words, ha="center", fontsize=8, color=LINE_UNWANTED, transform=axes)
    panel.locator_params(nbins=5)
    panel.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    panel.tick_params(labelsize=8)
    panel.xaxis.offsetText.set_fontsize(8)
    panel.yaxis.offsetText.set_fontsize(8)


def is_wanted(e_u: np.ndarray, e_r: np.ndarray) -> np.ndarray:
    """Whether both effects of each row are wanted, `(n,)`."""
    wanted: np.ndarray = (e_u < 0) & (e_r >= 0)
    return wanted


def _room(values: np.ndarray, reach: float) -> float:
    """Part of `reach` that an axis needs on the side where `values` are positive."""
    return max(0.55, values.max(initial=0.0) * 1.35 / reach)


def part_ticks(parts: list[str], most: int = 34) -> dict[int, str]:
    """Tick labels of parts of a model, by index: all names, and of many blocks some numbers."""
    step = math.ceil(len(parts) / most)
    return {
        i: part.replace("_", " ")
        for i, part in enumerate(parts)
        if not part.isdigit() or int(part) % step == 0
    }


def _rotate_names(panel: Axes) -> None:
    """Rotate the tick labels that are words. Numbers stay upright."""
    for label in panel.get_xticklabels():
        if not label.get_text().isdigit():
            label.set(rotation=40, horizontalalignment="right", rotation_mode="anchor")
