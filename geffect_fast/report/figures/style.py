"""The style of all figures: blank panels, colours, scales, titles, legends, and files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.tokens.colours import STEPS, colour
from geffect_fast.results.intervals import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from geffect_fast.report.figures.canvas import PlainFigure

Drawings = dict[str, Callable[[], "PlainFigure | None"]]
"""Functions that draw figures, by file stem; None: the result holds nothing for the figure."""

LINE_WANTED, LINE_UNWANTED = "#1f7fcb", "#c4640f"
"""Darker shades of the token views' blue and orange, as dots and lines need more contrast."""
COLOURS = (
    "#000000",
    "#117733",
    "#AA4499",
    "#8F8F2E",
    "#882255",
    "#33998A",
    "#CC6677",
    "#777777",
    "#8866CC",
    "#4D5D00",
)
"""Colours of lines and marks that stand for names. None is blue or orange, which mean wanted and
unwanted. Dashes and markers tell lines apart where a reader's colour vision does not."""
DASHES = ("-", "--", "-.", ":")
GREY = "#555555"
PANEL = 4.4
"""Width of a panel in inches."""

WIDE = 50.0
"""Ratio of the largest to the ordinary value beyond which the scale is logarithmic."""
SHADED_NOTE = f"Shaded: {100 * LEVEL:.0f} % intervals by the choice of the rows."
BARS_NOTE = f"Bars: {100 * LEVEL:.0f} % intervals by the choice of the rows."
EFFECTS_NOTE = "blue: wanted (e_u below 0, any other above), orange: unwanted"
DECADES = 6
"""The most decades that a logarithmic scale shows on one side of zero."""


def drawn(drawings: Drawings) -> dict[str, PlainFigure]:
    """Draw all figures, and return those that hold something, by file stem."""
    made = {name: draw() for name, draw in drawings.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def blank_figure(width: float, height: float) -> PlainFigure:
    """An empty figure that belongs to no window and no global state. Sizes are in inches."""
    from geffect_fast.report.figures.canvas import PlainFigure

    return PlainFigure(width, height)


def panels_for(n: int, width: float = PANEL, height: float = 3.6) -> tuple[PlainFigure, np.ndarray]:
    """A figure with `n` panels side by side, at most three in a row."""
    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = blank_figure(0.4 + width * columns, 0.6 + height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in grid[n:]:
        panel.remove()
    return figure, grid[:n]


def effect_colours(*, wanted_below: bool) -> Colormap:
    """Colour map of effects from below zero to above zero: blue is wanted, orange is not.

    Args:
        wanted_below: whether effects below zero are wanted, as for e_u; else effects above zero
            are, as for all other risks.
    """
    from matplotlib.colors import LinearSegmentedColormap

    shades = [colour(level, "light") for level in (-STEPS, 0, STEPS)]
    return LinearSegmentedColormap.from_list("wanted", shades[:: -1 if wanted_below else 1])


def style_of(i: int) -> dict[str, Any]:
    """Colour and dashes of the `i`-th line; 40 of them differ."""
    n = len(COLOURS)
    return {
        "color": COLOURS[i % n],
        "linestyle": DASHES[(i % n // 4 + i // n) % len(DASHES)],
    }


def note(figure: PlainFigure, text: str) -> None:
    """Write a line above all panels, below the text that is there already."""
    said = figure.get_suptitle()
    figure.suptitle(f"{said}\n{text}" if said else text, fontsize=9, color=GREY)


def zero_lines(panel: Axes, across: bool = True, **look: Any) -> None:
    """Draw lines where values of a panel are 0; `across`: on the horizontal axis too."""
    look = dict[str, Any](color=GREY, linewidth=0.8) | look
    panel.axhline(0, **look)
    if across:
        panel.axvline(0, **look)


def dress(panel: Axes) -> None:
    """Give a panel small ticks, a grid behind all else, and no edges above and on the right."""
    panel.tick_params(labelsize=8)
    panel.grid(color="#dddddd", linewidth=0.6, zorder=0)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def set_titles(panel: Axes, title: str, broken: Sequence[str], mark: str = "") -> None:
    """Write a panel's title, and below it the values that are not finite and their mark."""
    if broken:
        note = "\n".join(textwrap.wrap(f"NaN or infinite{mark}: " + "; ".join(broken), 60))
        title = f"{title}\n{note}"
    panel.set_title(title, fontsize=10, loc="left")


def fit_scale(set_scale: Any, lines: Sequence[np.ndarray], positive: bool = False) -> str:
    """Set a logarithmic scale where values span decades, linear about 0 unless `positive`.

    Returns:
        Words to write beside the axis; empty where the scale is linear.
    """
    sizes = np.abs(np.concatenate([np.zeros(0), *lines]))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if not sizes.size:
        return ""
    largest, ordinary = float(sizes.max()), float(np.quantile(sizes, 0.25, method="lower"))
    if largest / WIDE <= ordinary:
        return ""
    if positive:
        set_scale("log")
        return "(log scale)"
    power = max(math.floor(math.log10(ordinary)), math.ceil(math.log10(largest)) - DECADES)
    power = max(power, -300)  # smaller numbers have fewer digits, and the scale divides by them
    set_scale("symlog", linthresh=10.0**power, linscale=0.6)
    return f"(log scale, linear within ±{10.0**power:g})"


def legend_below(figure: PlainFigure, panel: Axes) -> None:
    """Name the lines of a panel below the whole figure, where the names cover nothing."""
    handles, labels = panel.get_legend_handles_labels()
    widest = max(map(len, labels), default=1)
    figure.legend(
        handles,
        ["\n".join(textwrap.wrap(label, 60)) for label in labels],
        loc="outside lower center",
        ncols=max(1, min(4, len(labels), int(14 * figure.get_figwidth() / (min(widest, 60) + 6)))),
        fontsize=9,
        frameon=False,
        handlelength=3.2,
    )


def save_figure(figure: PlainFigure, file: Path, kinds: Sequence[str] = ("png", "svg")) -> None:
    """Write a figure as PNG, as SVG, or both.

    The SVG holds its text as text, and is the same for the same figure.

    Args:
        figure: the figure. Its label, a sentence, becomes the description for screen readers.
        file: path without an ending. The file's name is the title.
        kinds: endings of the files.
    """
    figure.place()
    about = {"Title": file.name, "Description": figure.get_label()}
    for kind in kinds:
        unsigned = {"Date": None} if kind == "svg" else {}
        figure.write(f"{file}.{kind}", kind, file.name, about | unsigned)
