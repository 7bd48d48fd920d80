"""The figure that all plots are drawn in: of no window, with names as text whatever they hold.

matplotlib is imported here first, whatever MPLBACKEND says, which names a backend of windows.
"""

from __future__ import annotations

import os
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
        # as matplotlib does it, which then fails where it knows none of that name
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogFormatterSciNotation
from matplotlib.transforms import Bbox

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PAD = 2 / 72
"""Inches of ground around what is drawn."""


class PlainFigure(Figure):
    """A figure without formulas.

    matplotlib reads what stands between two `$` as a formula, and fails where it is none; names of
    objectives, runs and data sets may hold them.

    Args:
        width: in inches.
        height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(self)
        self._seen = False

    def draw(self, renderer: Any) -> None:
        if not self._seen:
            self.words_as_they_are()
        with rc_context({"text.parse_math": False}):  # ticks are made as they are drawn
            super().draw(renderer)

    def words_as_they_are(self) -> None:
        """To be called when all is there that a figure shows, and before it is saved."""
        for axis in self.findobj(Axis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                axis.set_major_formatter(_Powers.like(axis.get_major_formatter()))
                axis.set_minor_formatter(_Powers.like(axis.get_minor_formatter()))
        for text in self.findobj(Text):
            text.set_parse_math(False)
        self._seen = True

    def place(self) -> None:
        """Find places for panels and legends, once: saving would do so every time."""
        self.words_as_they_are()
        with rc_context({"text.parse_math": False}):
            self.get_layout_engine().execute(self)
        self.set_layout_engine("none")

    def drawn_part(self) -> Bbox:
        """Where something visible is, in inches, with a little ground around it."""
        with rc_context({"text.parse_math": False}):
            return self.get_tightbbox(self.canvas.get_renderer()).padded(_PAD)


class _Powers(LogFormatterSciNotation):
    """Powers of ten in raised digits and not as a formula."""

    @staticmethod
    def like(other: Any) -> Any:
        """A formatter that labels the same ticks."""
        if not isinstance(other, LogFormatterSciNotation):
            return other
        made = _Powers()
        vars(made).update(vars(other))
        return made

    def __call__(self, x: float, pos: int | None = None) -> str:
        formula = super().__call__(x, pos)
        inner = formula.removeprefix("$\\mathdefault{").removesuffix("}$")
        base, _, power = inner.replace(r"\times", "×").partition("^{")
        return base.replace("-", "−") + power.removesuffix("}").translate(_RAISED)
