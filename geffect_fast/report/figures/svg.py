"""Figures within a page: their panels apart, each an SVG whose text stays text.

Colours are matplotlib's own: on a dark page the stylesheet turns the lightness of drawings round
and keeps their hues, so that what stood out from white stands out from the dark ground as much.
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
"""Pixels of the page that a point of a figure is at most."""
WIDTH = 4.5
"""Inches, a figure's of 72 points, that a panel is wide: what a phone shows in its own size."""

_UNSIGNED = {"Date": None, "Creator": None, "Format": None, "Type": None}
_OF_FILES = re.compile(
    # what stands before the drawing and about it, counted ids, fonts, space between elements
    r"(?s)\A.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>"
    r"| id=\"[^\"]*_\d{1,4}\"|font-family:[^;\"]*(?:; )?|xlink:(?=href)|(?<=>)\s+(?=<)|\s+\Z"
)
_ROOT = re.compile(r"\A<svg [^>]*>")
_PLACES = re.compile(r'(?<= )(?:d|x|y|transform|points)="[^"]*"')
_NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass(frozen=True)
class Key:
    """What a line or mark means: how it looks, and its name."""

    swatch: Markup
    text: str


@dataclass(frozen=True)
class Panel:
    """One panel of a figure by itself, and what its own legend says."""

    svg: Markup
    keys: list[Key]


@dataclass(frozen=True)
class Panels:
    """A figure taken apart, so that its panels can stand side by side or one below the other.

    Attributes:
        panels: in reading order, each with its colour bar.
        keys: the legend of all.
        notes: what stands above all panels.
    """

    panels: list[Panel]
    keys: list[Key]
    notes: list[str]


def take_apart(figure: PlainFigure, name: str) -> Panels:
    """The panels of a figure, each an `<svg>` of its own.

    Labels that all panels share are written at each of them.

    Args:
        figure: of matplotlib; not of use afterwards.
        name: of no other figure of the page.
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
    for axes in panels[::-1]:  # a row's legend stands below the last of the column
        below = [a for a in legends if axes.get_shared_x_axes().joined(axes, a)]
        legends[axes] = axes.get_legend() or (legends[below[0]] if below else None)
    for legend in filter(None, dict.fromkeys(legends.values())):
        legend.remove()
    columns = 1 + max(_at(axes)[1] for axes in panels)
    figure.set_figwidth(min(WIDTH, figure.get_figwidth()) * columns)
    figure.patch.set_visible(False)
    figure.set_layout_engine("none")  # what would not fit beside others is alone
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
    """Give each panel the words and ticks that stand at the edge of the figure or of its grid."""
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
    """Row and column in its grid."""
    spec = axes.get_subplotspec()
    assert spec is not None
    return spec.rowspan.start, spec.colspan.start


def _keys(legend: Legend | None, name: str) -> list[Key]:
    """The entries of a legend: each mark drawn by itself, its name as text of the page."""
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
    """What is visible of a figure, as an `<svg>` element as wide as there is room.

    Args:
        figure: of matplotlib.
        name: of no other `<svg>` of the page; ids are made from it, the same for the same figure.
        label: what it shows, read out in its place; empty: it is a legend's key, beside words.
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
