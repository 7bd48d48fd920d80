"""Lines over steps: the one look of all figures of step results and comparisons."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.results.intervals import LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#882255",
)
"""Okabe and Ito's, which every colour vision tells apart, with wine in place of their yellow."""
DASHES = ("-", "--", "-.", ":")
GREY = "#555555"

MARKED = 30
"""Up to so many steps every one has a marker."""
WIDE = 50.0
"""Values whose largest is so many times the ordinary one are drawn on a logarithmic scale."""
SHADED = 0.16
"""How opaque the interval about a line is."""
SHADED_NOTE = f"Shaded: {100 * LEVEL:.0f} % intervals by the choice of the rows."
BARS_NOTE = f"Bars: {100 * LEVEL:.0f} % intervals by the choice of the rows."
DECADES = 6
"""The most decades that such a scale shows on one side of zero."""


def style_of(i: int) -> dict[str, Any]:
    """Colour and dashes of the `i`-th line; 32 of them differ."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[(i // 4 + i // len(COLOURS)) % len(DASHES)],
    }


def draw_lines(
    panel: Axes,
    steps: np.ndarray,
    lines: Mapping[str, np.ndarray],
    *,
    title: str,
    words: str,
    across: str = "update step",
    absent: int = 0,
    positive: bool = False,
    styles: Sequence[dict[str, Any]] | None = None,
    limits: tuple[float, float] | None = None,
    scaled: Sequence[np.ndarray] | None = None,
    bands: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Lines over steps in a panel; what is not finite is said in its title and marked below.

    Args:
        panel: empty.
        steps: `(S,)`.
        lines: `(S,)` each, by name; their places say their style.
        title: of the panel.
        words: along its vertical axis.
        across: along its horizontal axis.
        absent: so many of the first steps have no value by nature.
        positive: values are above 0, and no zero line is wanted.
        styles: in place of those of `style_of`.
        limits: of the vertical axis, which is linear then.
        scaled: values that choose its scale, where panels share it; else those of the lines.
        bands: bounds of intervals of some of the lines, `(2, S)`, by name.
    """
    from matplotlib.ticker import MaxNLocator

    scale = ""
    if limits is None:  # before anything is drawn, so that margins are of this scale
        chosen = list(lines.values()) if scaled is None else scaled
        scale = fit_scale(panel.set_yscale, chosen, positive)
    marker = "o" if len(steps) <= MARKED else None
    broken = []
    for i, (name, values) in enumerate(lines.items()):
        style = style_of(i) if styles is None else styles[i]
        finite = np.isfinite(values)
        shown = np.where(finite, values, np.nan)
        panel.plot(
            steps,
            shown,
            label=name,
            marker=marker,
            markersize=3.5,
            linewidth=1.6,
            zorder=3,
            **style,
        )
        if bands and name in bands:
            shade(panel, steps, bands[name], style["color"])
        lost = steps[absent:][~finite[absent:]]
        if lost.size:
            several = f"{lost.size} steps from {lost[0]}" if lost.size > 1 else f"step {lost[0]}"
            broken.append(f"{shortened(name, 28)} at {several}")
            panel.plot(
                lost,
                np.full(lost.size, 0.02),
                "x",
                transform=panel.get_xaxis_transform(),
                color=style["color"],
                markersize=4,
                zorder=4,
            )
    if not positive:
        panel.axhline(0, color=GREY, linewidth=0.9, zorder=1)
    if limits is not None:
        panel.set_ylim(*limits)
    panel.set_ylabel(f"{words}\n{scale}" if scale and words else words, fontsize=9)
    panel.set_xlabel(across, fontsize=9)
    set_titles(panel, title, broken, " (×)")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if len(steps) > 1:
        room = 0.02 * (steps[-1] - steps[0])
        panel.set_xlim(steps[0] - room, steps[-1] + room)
    dress(panel)


def shade(panel: Axes, x: np.ndarray, bounds: np.ndarray, colour: Any) -> None:
    """Shade an interval `(2, n)` about a line, where it is known and finite; alone it is a bar."""
    known = np.isfinite(bounds).all(axis=0)
    low, high = np.where(known, bounds, np.nan)
    panel.fill_between(x, low, high, color=colour, alpha=SHADED, linewidth=0, zorder=2)
    # a step between others that are not known has no area
    alone = known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])
    panel.vlines(x[alone], low[alone], high[alone], color=colour, linewidth=1.2, zorder=2)


def note(figure: Figure, text: str) -> None:
    """Write a line above all panels, below what stands there."""
    said = figure.get_suptitle()
    figure.suptitle(f"{said}\n{text}" if said else text, fontsize=9, color=GREY)


def dress(panel: Axes) -> None:
    """Small ticks and a grid that stays behind."""
    panel.tick_params(labelsize=8)
    panel.grid(color="#dddddd", linewidth=0.6, zorder=0)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def set_titles(panel: Axes, title: str, broken: Sequence[str], mark: str = "") -> None:
    """A panel's title, and below it what is not finite and how that is marked."""
    if broken:
        note = "\n".join(textwrap.wrap(f"NaN or infinite{mark}: " + "; ".join(broken), 60))
        title = f"{title}\n{note}"
    panel.set_title(title, fontsize=10, loc="left")


def fit_scale(set_scale: Any, lines: Sequence[np.ndarray], positive: bool = False) -> str:
    """A logarithmic scale where values span decades, linear about 0 unless they are positive.

    Returns:
        What to write beside the axis; empty where the scale is linear.
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
    power = max(power, -300)  # beyond are numbers with fewer digits, which the scale divides by
    set_scale("symlog", linthresh=10.0**power, linscale=0.6)
    return f"(log scale, linear within ±{10.0**power:g})"


def shortened(name: str, width: int) -> str:
    """A name that fits."""
    return name if len(name) <= width else name[: width - 1] + "…"


def legend_below(figure: Figure, panel: Axes, **more: Any) -> None:
    """The lines of a panel named below the whole figure, where they cover nothing."""
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
        **more,
    )


def figure_svg(figure: Figure, name: str) -> str:
    """A figure as SVG, its text as text, the same text for the same figure.

    Args:
        figure: its label describes it in a sentence, which readers of screens are told.
        name: its title.
    """
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        about = {"Date": None, "Title": name, "Description": figure.get_label()}
        figure.savefig(written, format="svg", metadata=about)
    return written.getvalue()


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Every figure as `NAME.png` and `NAME.svg` in a folder that is there; the files."""
    files = []
    for name, figure in figures.items():
        png, svg = folder / f"{name}.png", folder / f"{name}.svg"
        figure.savefig(png, dpi=150, metadata={"Title": name, "Description": figure.get_label()})
        figure.set_layout_engine("none")  # its panels stay where they are: to place them is slow
        svg.write_text(figure_svg(figure, name), encoding="utf-8")
        files += [png, svg]
    return files
