"""Figures within a page: their panels apart, each an SVG whose text stays text.

Colours are matplotlib's own: on a dark page the stylesheet turns the lightness of drawings round
and keeps their hues, so that what stood out from white stands out from the dark ground as much.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

LARGEST = 1.45
"""Pixels of the page that a point of a figure is at most."""
WIDTH = 4.5
"""Inches, a figure's of 72 points, that a panel is wide: what a phone shows in its own size."""

_UNSIGNED = {"Date": None, "Creator": None, "Format": None, "Type": None}
_DASHES = {"--": "7 3", "-.": "7 3 2 3", ":": "2 3"}
_OF_FILES = re.compile(
    # what stands before the drawing and about it, counted ids, fonts, space between elements
    r"(?s)\A.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>"
    r"| id=\"[^\"]*_\d{1,4}\"|font-family:[^;\"]*(?:; )?|xlink:(?=href)|(?<=>)\s+(?=<)|\s+\Z"
)
_ROOT = re.compile(r'<svg [^>]*?viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>')
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


def take_apart(figure: Figure, name: str) -> Panels:
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
    keys = [key for legend in figure.legends for key in _keys(legend)]
    for shared in list(figure.legends):
        shared.remove()
    own_keys: dict[Axes, list[Key]] = {}
    for axes in panels[::-1]:  # a row's legend stands below the last of the column
        legend = axes.get_legend()
        below = [a for a in own_keys if axes.get_shared_x_axes().joined(axes, a)]
        inherited = own_keys[below[0]] if below else []
        own_keys[axes] = _keys(legend) if legend else inherited
        if legend is not None:
            legend.remove()
    columns = [1 + _at(axes)[1] for axes in panels if axes.get_subplotspec() is not None]
    figure.set_figwidth(min(WIDTH, figure.get_figwidth()) * max(columns, default=1))
    figure.patch.set_visible(False)
    figure.set_layout_engine("none")  # what would not fit beside others is alone
    for axes in figure.axes:
        axes.set_visible(False)
    apart = []
    for i, axes in enumerate(panels):
        shown = [axes, *([bars[axes]] if axes in bars else [])]
        for each in shown:
            each.set_visible(True)
        words = [_title(axes), axes.get_ylabel(), f"against {axes.get_xlabel()}"]
        label = ", ".join(" ".join(each.split()) for each in words if each)
        apart.append(Panel(inline_svg(figure, f"{name}-{i}", label), own_keys[axes]))
        for each in shown:
            each.set_visible(False)
    return Panels(apart, keys, [" ".join(notes)] if notes else [])


def _label_each(figure: Figure, panels: list[Axes]) -> None:
    """Give each panel the words and ticks that stand at the edge of the figure or of its grid."""
    from matplotlib.ticker import FixedLocator

    for axes in panels:
        spec = axes.get_subplotspec()
        alike = panels if spec is None else _of_grid(panels, spec.get_gridspec())
        row = next((a for a in alike if spec and _at(a)[0] == _at(axes)[0]), axes)
        column = [a for a in alike if spec and _at(a)[1] == _at(axes)[1]] or [axes]
        if isinstance(row.yaxis.get_major_locator(), FixedLocator):
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


def _of_grid(panels: list[Axes], grid: object) -> list[Axes]:
    """Those in one grid of panels."""
    return [p for p in panels if (s := p.get_subplotspec()) and s.get_gridspec() is grid]


def _at(axes: Axes) -> tuple[int, int]:
    """Row and column in its grid."""
    spec = axes.get_subplotspec()
    assert spec is not None
    return spec.rowspan.start, spec.colspan.start


def _keys(legend: Legend) -> list[Key]:
    """A legend's entries as the page draws them."""
    return [
        Key(_swatch(handle), " ".join(text.get_text().split()))
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
    ]


def _swatch(handle: Any) -> Markup:
    """How a legend's entry looks: a dashed line, a mark, or a patch."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D
    from matplotlib.markers import MarkerStyle

    shapes, none = [], ("None", "", " ", None)
    if isinstance(handle, Line2D):
        colour = to_hex(handle.get_color())
        if handle.get_linestyle() not in none:
            dashes = _DASHES.get(str(handle.get_linestyle()), "none")
            look = f"fill:none;stroke:{colour};stroke-width:2;stroke-dasharray:{dashes}"
            shapes.append(f'<path d="M1 7H35" style="{look}"/>')
        if handle.get_marker() not in none:
            marker = MarkerStyle(handle.get_marker())
            path = marker.get_path().transformed(marker.get_transform())
            shapes.append(_outline(path, 3.5, f"fill:{colour};stroke:{colour}"))
    elif hasattr(handle, "get_paths"):
        face, edge = handle.get_facecolor(), handle.get_edgecolor()
        look = f"fill:{to_hex(face[0]) if len(face) else 'none'}"
        look += f";stroke:{to_hex(edge[0])}" if len(edge) else ""
        path = handle.get_paths()[0]
        shapes.append(_outline(path, 4 / (abs(path.vertices).max() or 1.0), look))
    else:
        face = handle.get_facecolor()
        look = f"fill:{to_hex(face)};fill-opacity:{face[3]:.2f}"
        shapes.append(f'<rect x="6" y="2" width="24" height="10" style="{look}"/>')
    return Markup(  # numbers and colours only
        f'<svg class="key" viewBox="0 0 36 14" aria-hidden="true">{"".join(shapes)}</svg>'
    )


def _outline(path: Any, size: float, look: str) -> str:
    """A mark in the middle of a swatch."""
    d = "".join(
        "M" + "L".join(f"{18 + size * x:.1f} {7 - size * y:.1f}" for x, y in ring)
        for ring in path.to_polygons(closed_only=False)
    )
    return f'<path d="{d}" style="{look}"/>'


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """What is visible of a figure, as an `<svg>` element as wide as there is room.

    Args:
        figure: of matplotlib.
        name: of no other `<svg>` of the page; ids are made from it, the same for the same figure.
        label: what it shows, read out in its place.
    """
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            written, format="svg", bbox_inches="tight", pad_inches=2 / 72, metadata=_UNSIGNED
        )
    text = _OF_FILES.sub("", written.getvalue())
    text = _PLACES.sub(lambda found: _NUMBER.sub(_rounded, " ".join(found[0].split())), text)

    def root(found: re.Match[str]) -> str:
        width, height = map(float, found.groups())
        return Markup(
            '<svg viewBox="0 0 {:.1f} {:.1f}" style="max-width: {:.0f}px" role="img" '
            'aria-label="{}">'
        ).format(width, height, LARGEST * width, label)

    return Markup(_ROOT.sub(root, text, count=1))  # matplotlib has escaped what is text


def _rounded(number: re.Match[str]) -> str:
    """Hundredths of a point are enough."""
    return f"{float(number[0]):.2f}"
