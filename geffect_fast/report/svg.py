"""Figures as SVG within a page: text stays text, ids are the figure's own, colours follow the page.

matplotlib knows one set of colours. Here every colour of a figure becomes a CSS variable, which a
dark page gives the same hue and the lightness turned round, so that what stood out from white
stands out from the dark ground as much.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARKEST, LIGHTEST = 0.205, 0.96
"""Oklab lightness of white and of black on a dark page: those of its ground and of its ink."""
BEND = 1.25
"""Above 1, middle greys come out lighter than halfway, as text on a dark ground must be to read."""
STRONG, CLEAR = 0.15, 0.62
"""A colour of so much chroma gets at least so much lightness; one of less, less."""

_COLOUR = re.compile(r"#[0-9a-f]{6}")
_NUMBER = re.compile(r"-?\d+\.\d+")
_TARGET = re.compile(r"#([^)]+)")
_UNSIZED = {"Date": None, "Creator": None, "Format": None, "Type": None}

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
        return f"var(--k{self._names.setdefault(colour, str(len(self._names)))})"

    def css(self, theme: str) -> Markup:
        """Declarations of all variables, for a `light` or a `dark` page."""
        shown = {"light": str, "dark": dark}[theme]
        return Markup(" ".join(f"--k{name}: {shown(c)};" for c, name in self._names.items()))


def inline_svg(figure: Figure, name: str, label: str, colours: Colours) -> Markup:
    """A figure as an `<svg>` element with a description, as wide as there is room.

    Args:
        figure: of matplotlib; left as it was.
        name: begins its ids; of no other figure of the page.
        label: what it shows, read out in its place.
        colours: of the page, which get the figure's.
    """
    import matplotlib as mpl

    text = io.StringIO()
    # one family, as the page has its own; ids from the name, so that equal runs give equal pages
    settings = {"svg.fonttype": "none", "svg.hashsalt": name}
    with mpl.rc_context(settings):
        figure.savefig(text, format="svg", metadata=_UNSIZED, transparent=True)
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
    width = root.get("viewBox", "").split()[2]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    # points of the figure are at most so many px of the page
    root.set("style", f"max-width: {1.45 * float(width):.0f}px")
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
    lightness, *chroma = _TO_LAB @ np.cbrt(_TO_LMS @ linear)
    turned = LIGHTEST - (LIGHTEST - DARKEST) * np.clip(lightness, 0, 1) ** BEND
    turned = max(turned, DARKEST + (CLEAR - DARKEST) * min(np.hypot(*chroma) / STRONG, 1))
    for kept in np.linspace(1, 0, 21):
        lms = np.linalg.solve(_TO_LAB, [turned, *(kept * np.array(chroma))]) ** 3
        linear = np.linalg.solve(_TO_LMS, lms)
        if (linear >= -1e-3).all() and (linear <= 1 + 1e-3).all():
            break
    linear = linear.clip(0, 1)
    channels = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
