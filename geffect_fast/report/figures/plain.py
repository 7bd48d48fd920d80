"""The figure that all plots are drawn in: names are text in it, whatever they hold."""

from __future__ import annotations

from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter


class PlainFigure(Figure):
    """A figure without formulas but the powers of ten at its ticks."""

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
