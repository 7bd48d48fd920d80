"""Sections and blocks of a page, in the form that templates read.

A block is a paragraph, a list, a table, a heat map, figures, facts or a token view. Figures hold
markup of their own. All other blocks hold text, which templates escape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from geffect_fast.report.figures.svg import Panels, take_apart
from geffect_fast.report.format import number, spoken
from geffect_fast.report.tokens.colours import goodness, levels, mark

if TYPE_CHECKING:
    from geffect_fast.report.figures.canvas import PlainFigure

MOST_ROWS = 200
"""The most rows of a table. A longer table leaves rows out."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `role` is `lead`, `note`, `label` (a heading within a section) or none."""

    kind: ClassVar[str] = "text"
    text: str
    role: str = ""


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: list[str]


@dataclass(frozen=True)
class Table:
    """A table with a caption. The first cell of a row names the row.

    Attributes:
        caption: a line that says what the table shows.
        head: names of the columns.
        rows: cells of every row.
        words: indices of the columns that hold words, the first among them. The others hold
            numbers.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: list[str]
    rows: list[list[str]]
    words: frozenset[int] = frozenset([0])


@dataclass(frozen=True)
class HeatMap:
    """Effects on one risk as a table with levels of colour, each row scaled by its largest size.

    Attributes:
        caption: a line that says what the map shows.
        head: names of the columns.
        rows: the name of each row, its largest size, and its cells. A cell is (level of goodness,
            mark, exact value).
    """

    kind: ClassVar[str] = "map"
    caption: str
    head: list[str]
    rows: list[tuple[str, str, list[tuple[int, str, str]]]]

    @staticmethod
    def of(
        caption: str,
        risk: str,
        columns: Sequence[str],
        names: Sequence[str],
        values: np.ndarray,
        half_widths: np.ndarray | None = None,
    ) -> HeatMap:
        """Make a map of effects `(names, columns)`. NaN and infinite effects are marked.

        `half_widths` are those of the effects' intervals. An effect whose interval holds 0 stands
        in brackets and has no colour.
        """
        rows = []
        offs = np.full(values.shape, np.nan) if half_widths is None else half_widths
        for name, effect, off in zip(names, values, offs, strict=True):
            size = float(np.abs(effect[np.isfinite(effect)]).max(initial=0.0))
            cells = [
                _heat_cell(risk, int(level), float(value), float(half_width))
                for level, value, half_width in zip(levels(effect, size), effect, off, strict=True)
            ]
            rows.append((name, number(size, ".2g"), cells))
        return HeatMap(caption, [c.replace("_", " ") for c in columns], rows)


def _heat_cell(risk: str, level: int, value: float, half_width: float) -> tuple[int, str, str]:
    """Goodness, mark and exact value of an effect; a half width of NaN is not known."""
    exact = spoken(value)
    if not math.isfinite(half_width) or not math.isfinite(value):
        return goodness(risk, level), mark(risk, level), exact
    exact = f"{exact} [{spoken(value - half_width)}, {spoken(value + half_width)}]"
    if half_width < abs(value) or not level:
        return goodness(risk, level), mark(risk, level), exact
    return 0, f"({level:+d})", exact


@dataclass(frozen=True)
class Figures:
    """A figure's panels with their legend; `lists` holds the lines that stand below each panel."""

    kind: ClassVar[str] = "figures"
    caption: str
    figure: Panels
    lists: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value."""

    kind: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Tokens:
    """The token view, as values of `tokens.html.token_values`."""

    kind: ClassVar[str] = "tokens"
    values: dict[str, Any]


Block = Text | Items | Table | HeatMap | Figures | Facts | Tokens


@dataclass(frozen=True)
class Section:
    """A heading of the page and the blocks under it.

    Attributes:
        id: id of the section's HTML element.
        title: the heading.
        blocks: the blocks in order. A section without blocks is left out of the page.
    """

    id: str
    title: str
    blocks: list[Block]


def figure_block(
    figure: PlainFigure, name: str, caption: str, lists: list[list[str]] | None = None
) -> Figures:
    """A block of a figure's panels. The figure's notes follow the caption."""
    apart = take_apart(figure, name)
    notes = [note for note in apart.notes if note not in caption]
    return Figures(" ".join([caption, *notes]), apart, lists or [])


def drawn_blocks(
    figures: Mapping[str, PlainFigure | None], names: Sequence[str], prefix: str = ""
) -> list[Block]:
    """A block for every named figure that exists, with the figure's label as caption."""
    there = {name: figure for name in names if (figure := figures.get(name)) is not None}
    return [
        figure_block(figure, f"{prefix}{name}", str(figure.get_label()))
        for name, figure in there.items()
    ]


def notes_of(lines: Sequence[str]) -> list[Block]:
    """A note block for every line that is not empty."""
    return [Text(line, "note") for line in lines if line]


def left_out(
    n: int, what: str, shown: int = MOST_ROWS, held: str = "summary.csv and results.nc hold"
) -> list[Block]:
    """A note that says how many of `n` are shown; none where all are."""
    if n <= shown:
        return []
    return notes_of([f"{shown} of {n:,} {what} are shown; {held} all."])
