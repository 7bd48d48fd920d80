"""Figures within a page, taken apart into panels. Each panel is an SVG whose text stays text.

The colours are the figure's own. On a dark page the stylesheet inverts the lightness of drawings
and keeps their hues, so that they stand out from the dark ground as much as they did from white.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from geffect_fast.report.figures.style import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

    from geffect_fast.report.figures.canvas import PlainFigure

LARGEST = 1.45
"""The most pixels of the page that a point of a figure takes."""
WIDTH = 4.5
"""Width of a panel in inches of 72 points. A phone shows a panel of this width in full size."""

_UNSIGNED = {"Date": None, "Creator": None, "Format": None, "Type": None}
_OF_FILES = re.compile(
    # text before the drawing, metadata, comments, styles,
    # counted ids, fonts, space between elements
    r"(?s)\A.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>"
    r"| id=\"[^\"]*_\d{1,4}\"|font-family:[^;\"]*(?:; )?|xlink:(?=href)|(?<=>)\s+(?=<)|\s+\Z"
)
_ROOT = re.compile(r"\A<svg [^>]*>")
_PLACES = re.compile(r'(?<= )(?:d|x|y|transform|points)="[^"]*"')
_NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Key:
    """A legend entry: a drawing of a line or mark, and its name."""

    swatch: Markup
    text: str


@dataclass(frozen=True)
class Panel:
    """One panel of a figure by itself, with the entries of the panel's own legend."""

    svg: Markup
    keys: list[Key]


@dataclass(frozen=True)
class Panels:
    """A figure taken apart, so that its panels can stand side by side or one below the other.

    Attributes:
        panels: the panels in reading order, each with its colour bar.
        keys: entries of the legend that all panels share.
        notes: the text above all panels.
    """

    panels: list[Panel]
    keys: list[Key]
    notes: list[str]


def take_apart(figure: PlainFigure, name: str) -> Panels:
    """Take a figure apart into panels, each an `<svg>` of its own.

    Labels that all panels share are written at each panel.

    Args:
        figure: the figure, which is of no use afterwards.
        name: a name that no other figure of the page has.
    """
    bars = {
        axes: image.colorbar.ax
        for axes in figure.axes
        for image in (*axes.images, *axes.collections)
        if image.colorbar is not None
    }
    panels = [axes for axes in figure.axes if axes not in bars.values() and axes.get_visible()]
    _label_each(figure, panels)
    notes = figure.get_suptitle().splitlines()
    figure.suptitle("")
    shared = figure.legends[0] if figure.legends else None
    keys = _keys(shared, f"{name}-key")
    if shared is not None:
        shared.remove()
    legends: dict[Axes, Legend | None] = {}
    for axes in panels[::-1]:  # one legend below a column serves all its panels
        below = [a for a in legends if axes.get_shared_x_axes().joined(axes, a)]
        legends[axes] = axes.get_legend() or (legends[below[0]] if below else None)
    for legend in filter(None, dict.fromkeys(legends.values())):
        legend.remove()
    columns = 1 + max(_at(axes)[1] for axes in panels)
    figure.set_figwidth(min(WIDTH, figure.get_figwidth()) * columns)
    figure.patch.set_visible(False)
    figure.set_layout_engine("none")  # a panel alone needs no room for others
    figure.words_as_they_are()
    for axes in figure.axes:
        axes.set_visible(False)
    apart = []
    for i, axes in enumerate(panels):
        shown = [axes, *([bars[axes]] if axes in bars else [])]
        for each in shown:
            each.set_visible(True)
        words = [_title(axes), axes.get_ylabel(), f"against {axes.get_xlabel()}"]
        label = ", ".join(" ".join(each.split()) for each in words if each)
        keys_below = _keys(legends[axes], f"{name}-{i}-key")
        apart.append(Panel(inline_svg(figure, f"{name}-{i}", label), keys_below))
        for each in shown:
            each.set_visible(False)
    return Panels(apart, keys, [" ".join(notes)] if notes else [])


def _label_each(figure: PlainFigure, panels: list[Axes]) -> None:
    """Give each panel the labels and ticks from the edge of the figure or of the panel's grid."""
    from matplotlib.ticker import FixedLocator

    for axes in panels:
        grid = axes.get_gridspec()
        alike = [each for each in panels if each.get_gridspec() is grid]
        row = next((a for a in alike if _at(a)[0] == _at(axes)[0]), axes)
        column = [a for a in alike if _at(a)[1] == _at(axes)[1]]
        named = any(label.get_text() for label in axes.get_yticklabels())
        if isinstance(row.yaxis.get_major_locator(), FixedLocator) and not (
            named and isinstance(axes.yaxis.get_major_locator(), FixedLocator)
        ):
            axes.set_yticks(row.get_yticks())
            axes.yaxis.set_major_formatter(row.yaxis.get_major_formatter())
        axes.tick_params(labelleft=True, labelbottom=True)
        words = [
            axes.get_xlabel() or column[-1].get_xlabel() or figure.get_supxlabel(),
            axes.get_ylabel() or row.get_ylabel() or figure.get_supylabel(),
        ]
        if not _title(axes):
            axes.set_title(_title(column[0]), fontsize=10, loc="left")
        axes.set_xlabel(words[0], fontsize=9)
        axes.set_ylabel(words[1], fontsize=9)
    figure.supxlabel("")
    figure.supylabel("")


def _title(axes: Axes) -> str:
    return axes.get_title(loc="left") or axes.get_title()


def _at(axes: Axes) -> tuple[int, int]:
    """Row and column of a panel in its grid."""
    spec = axes.get_subplotspec()
    assert spec is not None
    return spec.rowspan.start, spec.colspan.start


def _keys(legend: Legend | None, name: str) -> list[Key]:
    """The entries of a legend, each with a drawing of its mark, and its name as text."""
    if legend is None:
        return []
    keys = []
    for i, (handle, text) in enumerate(zip(legend.legend_handles, legend.get_texts(), strict=True)):
        figure = blank_figure(0.5, 0.2)
        figure.patch.set_visible(False)
        figure.set_layout_engine("none")
        figure.legend(
            handles=[handle],
            labels=[""],
            loc="center",
            frameon=False,
            borderpad=0,
            handlelength=2.6,
            handletextpad=0,
        )
        keys.append(Key(inline_svg(figure, f"{name}-{i}"), " ".join(text.get_text().split())))
    return keys


def inline_svg(figure: PlainFigure, name: str, label: str = "") -> Markup:
    """The visible part of a figure as an `<svg>` element that takes the width it is given.

    Args:
        figure: the figure.
        name: a name that no other `<svg>` of the page has. Ids are made from the name, the same
            for the same figure.
        label: text that screen readers read out in place of the drawing. Empty: the drawing is a
            legend's key, which stands beside its name, and is skipped.
    """
    written = io.StringIO()
    figure.write(written, "svg", name, _UNSIGNED)
    text = _OF_FILES.sub("", written.getvalue())
    # hundredths of a point are enough
    text = _PLACES.sub(
        lambda place: _NUMBER.sub(lambda n: f"{float(n[0]):.2f}", " ".join(place[0].split())), text
    )
    part = figure.drawn_part()
    x, y = 72 * part.x0, 72 * (figure.get_figheight() - part.y1)  # from the top, in points
    width, height = 72 * part.width, 72 * part.height
    look = Markup('class="key" aria-hidden="true"')
    if label:
        look = Markup('style="max-width: {:.0f}px" role="img" aria-label="{}"').format(
            LARGEST * width, label
        )
    shown = Markup('<svg viewBox="{:.1f} {:.1f} {:.1f} {:.1f}" {}>').format(
        x, y, width, height, look
    )
    # The drawing without its root: matplotlib has escaped what is text.
    return shown + Markup(_ROOT.sub("", text))
