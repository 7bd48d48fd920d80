"""Figures as SVG within a page: text stays text, ids are the figure's own, colours follow the page.

matplotlib knows one set of colours. Here every colour of a figure becomes a CSS variable, which a
dark page gives the same hue and the lightness turned round, so that what stood out from white
stands out from the dark ground as much.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.path import Path

DARKEST, LIGHTEST = 0.205, 0.96
"""Oklab lightness of white and of black on a dark page: those of its ground and of its ink."""
BEND = 1.25
"""Above 1, middle greys come out lighter than halfway, as text on a dark ground must be to read."""
LARGEST = 1.45
"""Pixels of the page that a point of a figure is at most."""
WIDTH = 4.5
"""Inches, a figure's of 72 points, that a panel is wide: what a phone shows in its own size."""
STRONG, CLEAR = 0.15, 0.62
"""A colour of so much chroma gets at least so much lightness; one of less, less."""

_OF_PAGE = {"#ffffff": "--ground", "#000000": "--ink"}
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_NUMBER = re.compile(r"-?\d+\.\d+")
_TARGET = re.compile(r"#([^)]+)")
_UNSIGNED = {"Date": None, "Creator": None, "Format": None, "Type": None}
_DASHES = {"--": "7 3", "-.": "7 3 2 3", ":": "2 3"}

# Oklab, https://bottosson.github.io/posts/oklab (B. Ottosson, 2020), from linear sRGB
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


class Colours:
    """The colours of a page's figures, each a CSS variable."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def variable(self, colour: str) -> str:
        """What stands for `#rrggbb` in a style."""
        if colour in _OF_PAGE:
            return f"var({_OF_PAGE[colour]})"
        return f"var(--k{self._names.setdefault(colour, str(len(self._names)))})"

    def css(self, theme: str) -> Markup:
        """Declarations of all variables, for a `light` or a `dark` page."""
        shown = {c: dark(c) if theme == "dark" else c for c in self._names}
        return Markup(" ".join(f"--k{name}: {shown[c]};" for c, name in self._names.items()))


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


def take_apart(figure: Figure, name: str, colours: Colours) -> Panels:
    """The panels of a figure, each an `<svg>` of its own.

    Labels that all panels share are written at each of them.

    Args:
        figure: of matplotlib; not of use afterwards.
        name: begins the ids; of no other figure of the page.
        colours: of the page, which get the figure's.
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
    keys = [key for legend in figure.legends for key in _keys(legend, colours)]
    for shared in list(figure.legends):
        shared.remove()
    own_keys: dict[Axes, list[Key]] = {}
    for axes in panels[::-1]:  # a row's legend stands below the last of the column
        legend = axes.get_legend()
        below = [a for a in own_keys if axes.get_shared_x_axes().joined(axes, a)]
        inherited = own_keys[below[0]] if below else []
        own_keys[axes] = _keys(legend, colours) if legend else inherited
        if legend is not None:
            legend.remove()
    columns = [1 + _at(axes)[1] for axes in panels if axes.get_subplotspec() is not None]
    figure.set_figwidth(min(WIDTH, figure.get_figwidth()) * max(columns, default=1))
    figure.patch.set_visible(False)
    figure.set_layout_engine("none")  # what would not fit beside others is alone
    for axes in figure.axes:
        axes.set_visible(False)
    parts = []
    for i, axes in enumerate(panels):
        shown = [axes, *([bars[axes]] if axes in bars else [])]
        for each in shown:
            each.set_visible(True)
        words = [_title(axes), axes.get_ylabel(), f"against {axes.get_xlabel()}"]
        label = ", ".join(" ".join(each.split()) for each in words if each)
        parts.append(
            Panel(inline_svg(figure, f"{name}-{i}", label, colours, shown), own_keys[axes])
        )
        for each in shown:
            each.set_visible(False)
    return Panels(parts, keys, [" ".join(notes)] if notes else [])


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


def _keys(legend: Legend, colours: Colours) -> list[Key]:
    """A legend's entries as the page draws them."""
    return [
        Key(_swatch(handle, colours), " ".join(text.get_text().split()))
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
    ]


def _swatch(handle: Any, colours: Colours) -> Markup:
    """How a legend's entry looks: a dashed line, a mark, or a patch."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D
    from matplotlib.markers import MarkerStyle

    def variable(colour: Any) -> str:
        return colours.variable(to_hex(colour))

    shapes = []
    if isinstance(handle, Line2D):
        colour = variable(handle.get_color())
        if handle.get_linestyle() not in ("None", "", " "):
            dashes = _DASHES.get(str(handle.get_linestyle()), "none")
            shapes.append(
                f'<path d="M1 7H35" style="fill:none;stroke:{colour};stroke-width:2;'
                f'stroke-dasharray:{dashes}"/>'
            )
        if handle.get_marker() not in ("None", "", " ", None):
            marker = MarkerStyle(handle.get_marker())
            path = marker.get_path().transformed(marker.get_transform())
            shapes.append(_outline(path, 3.5, f"fill:{colour};stroke:{colour}"))
    elif hasattr(handle, "get_paths"):
        face, edge = handle.get_facecolor(), handle.get_edgecolor()
        style = f"fill:{variable(face[0]) if len(face) else 'none'}"
        style += f";stroke:{variable(edge[0])}" if len(edge) else ""
        path = handle.get_paths()[0]
        shapes.append(_outline(path, 4 / (abs(path.vertices).max() or 1.0), style))
    else:
        face = handle.get_facecolor()
        shapes.append(
            f'<rect x="6" y="2" width="24" height="10" style="fill:{variable(face)};'
            f'fill-opacity:{face[3]:.2f}"/>'
        )
    return Markup(  # numbers and names of variables only
        f'<svg class="key" viewBox="0 0 36 14" aria-hidden="true">{"".join(shapes)}</svg>'
    )


def _outline(path: Path, size: float, style: str) -> str:
    """A mark in the middle of a swatch."""
    rings: Any = path.to_polygons(closed_only=False)
    d = "".join(
        "M" + "L".join(f"{18 + size * x:.1f} {7 - size * y:.1f}" for x, y in ring) for ring in rings
    )
    return f'<path d="{d}" style="{style}"/>'


def inline_svg(
    figure: Figure, name: str, label: str, colours: Colours, shown: list[Axes]
) -> Markup:
    """What some axes of a figure show, as an `<svg>` element as wide as there is room.

    Args:
        figure: of matplotlib, laid out, with nothing else visible.
        name: begins the ids; of no other `<svg>` of the page.
        label: what it shows, read out in its place.
        colours: of the page, which get the figure's.
        shown: the axes.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.transforms import Affine2D, Bbox

    from geffect_fast.report.figures.plain import plain_names

    plain_names(figure)
    boxes = [axes.get_tightbbox() for axes in shown]
    box = Bbox.union([b for b in boxes if b is not None]).padded(2)
    box = box.transformed(figure.dpi_scale_trans.inverted() + Affine2D().scale(72))
    text = io.StringIO()
    # ids from the name, so that equal results give equal pages
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(text, metadata=_UNSIGNED)
    root = ElementTree.fromstring(text.getvalue())
    elements = list(root.iter())
    targets = {t for e in elements for v in e.attrib.values() for t in _targets(v)}
    for element in elements:
        element.tag = _local(element.tag)
        element.attrib = {
            _local(key): _value(_local(key), value, name, colours)
            for key, value in element.attrib.items()
            if _local(key) != "id" or value in targets
        }
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
    for parent in elements:
        for child in [c for c in parent if c.tag in ("style", "metadata")]:
            parent.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    top = 72 * figure.get_figheight() - box.y1
    root.set("viewBox", f"{box.x0:.1f} {top:.1f} {box.width:.1f} {box.height:.1f}")
    root.set("style", f"max-width: {LARGEST * box.width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", label)
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _local(name: str) -> str:
    """A name without its namespace, which elements within HTML do without."""
    return name.rpartition("}")[2]


def _targets(value: str) -> list[str]:
    """The ids that an attribute refers to."""
    return _TARGET.findall(value) if value.startswith(("#", "url(#")) else []


def _value(key: str, value: str, name: str, colours: Colours) -> str:
    if key == "id":
        return f"{name}-{value}"
    if _targets(value):
        return value.replace("#", f"#{name}-", 1)
    if key == "style":
        rules = [rule for rule in value.split("; ") if not rule.startswith("font-family")]
        return _COLOUR.sub(lambda c: colours.variable(c[0]), ";".join(rules))
    if key in ("d", "x", "y", "transform", "points"):
        return _NUMBER.sub(lambda n: f"{float(n[0]):.2f}", " ".join(value.split()))
    return value


def dark(colour: str) -> str:
    """What `#rrggbb` is on a dark page: of the same hue, its lightness turned round.

    The chroma is what is left of it within sRGB.
    """
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    lab = _TO_LAB @ np.cbrt(_TO_LMS @ linear)
    lightness, chroma = lab[0], lab[1:]
    turned = LIGHTEST - (LIGHTEST - DARKEST) * np.clip(lightness, 0, 1) ** BEND
    turned = max(turned, DARKEST + (CLEAR - DARKEST) * min(float(np.hypot(*chroma)) / STRONG, 1))
    for kept in np.linspace(1, 0, 21):
        lms = np.linalg.solve(_TO_LAB, [turned, *(kept * chroma)]) ** 3
        linear = np.linalg.solve(_TO_LMS, lms)
        if (linear >= -1e-3).all() and (linear <= 1 + 1e-3).all():
            break
    linear = linear.clip(0, 1)
    channels = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
