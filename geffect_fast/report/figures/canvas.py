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

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter


class PlainFigure(Figure):
    """A figure without formulas but the powers of ten at its ticks.

    Args:
        width: in inches.
        height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def draw(self, renderer: Any) -> None:
        plain_names(self)
        super().draw(renderer)


def plain_names(figure: Figure) -> None:
    """Take all words of a figure as they are.

    matplotlib reads what stands between two `$` as a formula, and fails where it is none; names of
    objectives, runs and data sets may hold them.
    """
    powers = {
        text
        for axis in figure.findobj(Axis)
        if not isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter)
        for text in axis.findobj(Text)
        if text is not axis.label
    }
    for text in set(figure.findobj(Text)) - powers:
        text.set_parse_math(False)
