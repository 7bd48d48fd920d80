"""What a page is made of: sections of sentences, tables, maps and figures, as templates read them.

No block holds markup but figures' own; whatever else they hold is text, which templates escape.
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
"""Rows of a table beyond which some are left out."""


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
    """A table with a name; the first cell of a row names it.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: cells.
        words: columns of words, by place, the first among them; the others hold numbers.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: list[str]
    rows: list[list[str]]
    words: frozenset[int] = frozenset([0])


@dataclass(frozen=True)
class HeatMap:
    """Effects on one risk as a table with levels of colour, a row scaled by its largest size.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: name, largest size, and cells: (level of goodness, mark, exact value).
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
        widths: np.ndarray | None = None,
    ) -> HeatMap:
        """From effects `(names, columns)`; NaN and infinite ones are marked.

        Given half of their intervals, those whose interval holds 0 are in brackets and without a
        colour.
        """
        rows = []
        offs = np.full(values.shape, np.nan) if widths is None else widths
        for name, effect, off in zip(names, values, offs, strict=True):
            size = float(np.abs(effect[np.isfinite(effect)]).max(initial=0.0))
            cells = [
                _heat_cell(risk, int(level), float(value), float(width))
                for level, value, width in zip(levels(effect, size), effect, off, strict=True)
            ]
            rows.append((name, number(size, ".2g"), cells))
        return HeatMap(caption, [c.replace("_", " ") for c in columns], rows)


def _heat_cell(risk: str, level: int, value: float, width: float) -> tuple[int, str, str]:
    """Goodness, mark and exact value of an effect with half of its interval, NaN: not known."""
    exact = spoken(value)
    if not math.isfinite(width) or not math.isfinite(value):
        return goodness(risk, level), mark(risk, level), exact
    exact = f"{exact} [{spoken(value - width)}, {spoken(value + width)}]"
    if width < abs(value) or not level:
        return goodness(risk, level), mark(risk, level), exact
    return 0, f"({level:+d})", exact


@dataclass(frozen=True)
class Figures:
    """A figure's panels with their legend; `lists` holds what stands below each panel."""

    kind: ClassVar[str] = "figures"
    caption: str
    figure: Panels
    lists: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Tokens:
    """The token view: what `tokens.html.token_values` makes of it."""

    kind: ClassVar[str] = "tokens"
    values: dict[str, Any]


Block = Text | Items | Table | HeatMap | Figures | Facts | Tokens


@dataclass(frozen=True)
class Section:
    """What stands under one heading of the page.

    Attributes:
        id: of its element.
        title: its heading.
        blocks: in order; a section without any is left out.
    """

    id: str
    title: str
    blocks: list[Block]


def figure_block(
    figure: PlainFigure, name: str, caption: str, lists: list[list[str]] | None = None
) -> Figures:
    """A figure's panels, with its notes after the caption."""
    apart = take_apart(figure, name)
    notes = [note for note in apart.notes if note not in caption]
    return Figures(" ".join([caption, *notes]), apart, lists or [])


def drawn_blocks(
    figures: Mapping[str, PlainFigure | None], names: Sequence[str], prefix: str = ""
) -> list[Block]:
    """A block for every named figure that there is, with its label as caption."""
    there = {name: figure for name in names if (figure := figures.get(name)) is not None}
    return [
        figure_block(figure, f"{prefix}{name}", str(figure.get_label()))
        for name, figure in there.items()
    ]


def notes_of(lines: Sequence[str]) -> list[Block]:
    """A note for every line that is not empty."""
    return [Text(line, "note") for line in lines if line]


def left_out(
    n: int, what: str, shown: int = MOST_ROWS, held: str = "summary.csv and results.nc hold"
) -> list[Block]:
    """A note that says how many are shown, where not all are."""
    if n <= shown:
        return []
    return notes_of([f"{shown} of {n:,} {what} are shown; {held} all."])
