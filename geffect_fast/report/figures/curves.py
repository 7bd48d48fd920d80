"""Drawing of lines over steps, such as a line an objective or a run, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.format import risk_words, shortened
from geffect_fast.results.intervals import LEVEL
from geffect_fast.results.risks import UNLEARN, effect_name, symbol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure

MARKED = 30
"""The most steps at which every step has a marker."""
SHADED = 0.16
"""Opacity of the shaded interval about a line."""
PARTS_NOTE = f"Shaded: {100 * LEVEL:.0f} % intervals by the choice of the objectives' rows."
"""The note on intervals by part of the model, which the rows of other risks do not widen."""


def effect_words(risk: str) -> tuple[str, str]:
    """Title and axis label of a panel with the effect on a risk."""
    hint = "lower: removes more" if risk == UNLEARN else "below 0: harms"
    return f"effect on the {risk_words(risk)}", f"{effect_name(risk)}  ({hint})"


def cosine_words(risk: str) -> tuple[str, str]:
    """Title and axis label of a panel with cosines."""
    return f"with the gradient of the {risk_words(risk)}", f"cosine_{symbol(risk)}"


def over(steps: np.ndarray) -> str:
    """The steps that are drawn, in words."""
    return f"over {len(steps)} steps from {steps[0]} to {steps[-1]}"


def lines_by_risk(
    steps: np.ndarray,
    risks: Sequence[str],
    names: Sequence[str],
    values: np.ndarray,
    bounds: np.ndarray | None = None,
    *,
    words: Callable[[str], tuple[str, str]] = effect_words,
    above: str = "",
    said: str = style.SHADED_NOTE,
    positive: bool = False,
    **more: Any,
) -> PlainFigure:
    """A figure with a panel a risk and a line a name. A legend below all panels names the lines.

    Args:
        steps: the steps, `(S,)`.
        risks: the risks, one for each of M panels.
        names: names of K lines.
        values: values of the lines, `(S, K, M)`.
        bounds: bounds of the values' intervals, `(2, S, K, M)`; None: not known.
        words: gives the title and the axis label of a risk's panel.
        above: title of all panels.
        said: note on the intervals, above all panels.
        positive: whether a panel whose values are all above 0 goes without a zero line.
        more: further arguments of `draw_lines`.
    """
    figure, panels = style.panels_for(len(risks))
    if above:
        figure.suptitle(above, fontsize=10)
    for m, (panel, risk) in enumerate(zip(panels, risks, strict=True)):
        title, along = words(risk)
        draw_lines(
            panel,
            steps,
            dict(zip(names, values[..., m].T, strict=True)),
            title=title,
            words=along,
            positive=positive and bool((values[..., m] > 0).all()),
            bounds=None if bounds is None else bounds[..., m],
            **more,
        )
    if bounds is not None:
        style.note(figure, said)
    style.legend_below(figure, panels[0])
    return figure


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
    bounds: np.ndarray | None = None,
) -> None:
    """Draw lines over steps in a panel.

    Values that are not finite are named below the panel's title and marked at its lower edge.

    Args:
        panel: an empty panel.
        steps: the steps, `(S,)`.
        lines: values of each line, `(S,)`, by name. A line's place decides its style.
        title: title of the panel.
        words: label of the vertical axis.
        across: label of the horizontal axis.
        absent: number of first steps that have no value by nature.
        positive: whether all values are above 0, so that there is no zero line.
        styles: styles of the lines, in place of `style_of`.
        limits: limits of the vertical axis, which is then linear.
        scaled: values that decide the vertical scale, where panels share it; None: the lines'.
        bounds: bounds of the intervals of the first n lines, `(2, S, n)`; None: not known.
    """
    from matplotlib.ticker import MaxNLocator

    scale = ""
    if limits is None:  # before lines are drawn, so that margins follow this scale
        chosen = list(lines.values()) if scaled is None else scaled
        scale = style.fit_scale(panel.set_yscale, chosen, positive)
    marker = "o" if len(steps) <= MARKED else None
    broken = []
    for i, (name, values) in enumerate(lines.items()):
        look = style.style_of(i) if styles is None else styles[i]
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
            **look,
        )
        if bounds is not None and i < bounds.shape[2]:
            shade(panel, steps, bounds[..., i], look["color"])
        lost = steps[absent:][~finite[absent:]]
        if lost.size:
            several = f"{lost.size} steps from {lost[0]}" if lost.size > 1 else f"step {lost[0]}"
            broken.append(f"{shortened(name, 28)} at {several}")
            panel.plot(
                lost,
                np.full(lost.size, 0.02),
                "x",
                transform=panel.get_xaxis_transform(),
                color=look["color"],
                markersize=4,
                zorder=4,
            )
    if not positive:
        style.zero_lines(panel, across=False, linewidth=0.9, zorder=1)
    if limits is not None:
        panel.set_ylim(*limits)
    panel.set_ylabel(f"{words}\n{scale}" if scale and words else words, fontsize=9)
    panel.set_xlabel(across, fontsize=9)
    style.set_titles(panel, title, broken, " (×)")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if len(steps) > 1:
        room = 0.02 * (steps[-1] - steps[0])
        panel.set_xlim(steps[0] - room, steps[-1] + room)
    style.dress(panel)


def shade(panel: Axes, x: np.ndarray, bounds: np.ndarray, colour: Any) -> None:
    """Shade an interval `(2, n)` about a line, where the interval is known and finite.

    At a point whose neighbours have no interval, the interval is drawn as a bar.
    """
    known = np.isfinite(bounds).all(axis=0)
    low, high = np.where(known, bounds, np.nan)
    panel.fill_between(x, low, high, color=colour, alpha=SHADED, linewidth=0, zorder=2)
    # a point between two without an interval has no area to shade
    alone = known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])
    panel.vlines(x[alone], low[alone], high[alone], color=colour, linewidth=1.2, zorder=2)
