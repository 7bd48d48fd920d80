"""The figure class of all plots. A figure belongs to no window and never reads text as a formula.

This module imports matplotlib without regard to MPLBACKEND, which names a backend for windows, and
hands the name on afterwards. So an unknown backend does not stop the import.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from contextlib import suppress
from typing import Any

if "matplotlib" not in sys.modules:
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        # matplotlib raises ValueError where it knows no backend of that name
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import Formatter, LogFormatterSciNotation, ScalarFormatter
from matplotlib.transforms import Bbox

_UPRIGHT = re.compile(r"\\mathdefault\{((?:[^{}]|\{[^{}]*\})*)\}")
_POWER = re.compile(r"\^\{([^}]*)\}")
_RAISED = str.maketrans("-−0123456789", "⁻⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PAD = 2 / 72
"""Inches of ground around the visible part of a figure."""


class PlainFigure(Figure):
    """A figure without formulas.

    matplotlib reads text between two `$` as a formula, and fails where the text is not one. Names
    of objectives, runs and data sets may hold `$`.

    Args:
        width: width in inches.
        height: height in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=150, layout="constrained")
        self._agg = FigureCanvasAgg(self)
        self._seen = False

    def draw(self, renderer: Any) -> None:
        if not self._seen:
            self.words_as_they_are()
        with rc_context({"text.parse_math": False}):  # ticks are made as they are drawn
            super().draw(renderer)

    def words_as_they_are(self) -> None:
        """Turn formulas off in all text and all tick labels.

        Call this once the figure holds all that it shows, and before it is saved.
        """
        for axis in self.findobj(Axis):
            axis.set_major_formatter(_without_formulas(axis.get_major_formatter()))
            axis.set_minor_formatter(_without_formulas(axis.get_minor_formatter()))
        for text in self.findobj(Text):
            text.set_parse_math(False)
        self._seen = True

    def _repr_html_(self) -> str:
        """The figure for a notebook: with a transparent ground, and dark where the notebook is.

        The figure is as wide as on paper, at 96 pixels of the page to an inch.
        """
        from geffect_fast.report.html.templates import render

        png = base64.b64encode(self._png(transparent=True)).decode()
        width = round(96 * self.get_figwidth())
        return render("figure.html.jinja", png=png, label=str(self.get_label()), width=width)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """The figure on white, for viewers that show no HTML."""
        width, height = self.get_size_inches() * 96
        return self._png(transparent=False), {"width": round(width), "height": round(height)}

    def _png(self, *, transparent: bool) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", transparent=transparent)
        return written.getvalue()

    def place(self) -> None:
        """Lay out panels and legends, once. Otherwise saving would do so every time."""
        self.words_as_they_are()
        with rc_context({"text.parse_math": False}):
            layout = self.get_layout_engine()
            assert layout is not None
            layout.execute(self)
        self.set_layout_engine("none")

    def write(self, file: Any, kind: str, name: str, metadata: dict[str, Any]) -> None:
        """Write a figure that is laid out. `savefig` would draw it twice, once for the layout.

        Args:
            file: a path or an open file.
            kind: png or svg; the text of an SVG stays text.
            name: the name that ids within an SVG are made from.
            metadata: metadata as `savefig` takes it.
        """
        dpi = self.dpi
        try:
            if kind == "png":
                self._agg.print_png(file, metadata=metadata)
            else:
                with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
                    FigureCanvasSVG(self).print_svg(file, metadata=metadata)
        finally:
            self.set_canvas(self._agg)
            self.dpi = dpi

    def drawn_part(self) -> Bbox:
        """Bounding box of all that is visible, in inches, with a little ground around it."""
        with rc_context({"text.parse_math": False}):
            return self.get_tightbbox(self._agg.get_renderer()).padded(_PAD)


class _WithoutFormulas:
    """A formatter whose labels write powers of ten in raised digits."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return _raised(super().__call__(x, pos))  # type: ignore[misc]

    def get_offset(self) -> str:
        """The factor that all labels of an axis are multiplied by."""
        return _raised(super().get_offset())  # type: ignore[misc]


class _Powers(_WithoutFormulas, LogFormatterSciNotation):
    pass


class _Numbers(_WithoutFormulas, ScalarFormatter):
    pass


def _without_formulas(formatter: Formatter) -> Formatter:
    """A formatter that labels the same ticks without formulas; unknown kinds as they are."""
    for plain, kind in ((_Powers, LogFormatterSciNotation), (_Numbers, ScalarFormatter)):
        if isinstance(formatter, kind):
            made = plain()
            vars(made).update(vars(formatter))
            return made
    return formatter


def _raised(formula: str) -> str:
    words = _UPRIGHT.sub(r"\1", formula.replace("$", "")).replace(r"\times", "×")
    return _POWER.sub(lambda power: power[1].translate(_RAISED), words).replace("-", "−")
