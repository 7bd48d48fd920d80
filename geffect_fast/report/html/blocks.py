"""What a page is made of: sections of sentences, tables, maps and figures, as templates read them.

No block holds markup but figures' own; whatever else they hold is text, which templates escape.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from geffect_fast.report.figures.svg import Colours, Panels, take_apart
from geffect_fast.report.summary.objectives import Interval
from geffect_fast.report.tables.profile import number, symbol
from geffect_fast.report.tokens.colours import goodness, levels, mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph; `role` is `lead`, `note`, `label` (a heading within a section) or none."""

    kind: ClassVar[str] = "text"
    text: str
    role: str = ""


@dataclass(frozen=True)
class Items:
    """A list of sentences; numbered where the numbers are those in a figure."""

    kind: ClassVar[str] = "items"
    items: list[str]
    numbered: bool = False


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
    exact = f"{exact} [{value - width:+.3e}, {value + width:+.3e}]"
    if width < abs(value) or not level:
        return goodness(risk, level), mark(risk, level), exact
    return 0, f"({level:+d})", exact


@dataclass(frozen=True)
class Figures:
    """A figure's panels with their legend; `lists` holds what stands below each panel."""

    kind: ClassVar[str] = "figures"
    caption: str
    parts: Panels
    lists: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    pairs: list[tuple[str, str]]


@dataclass(frozen=True)
class Tokens:
    """The token view: what `token_html.token_values` makes of it."""

    kind: ClassVar[str] = "tokens"
    values: dict[str, Any]


Block = Text | Items | Table | HeatMap | Figures | Facts | Tokens


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        id: of its element.
        title: its heading.
        blocks: in order; a section without any is left out.
    """

    id: str
    title: str
    blocks: list[Block]


def figure_block(
    figure: Figure, name: str, caption: str, colours: Colours, lists: list[list[str]] | None = None
) -> Figures:
    """A figure's panels, its notes first in the caption."""
    parts = take_apart(figure, name, colours)
    notes = [note for note in parts.notes if note not in caption]
    return Figures(" ".join([caption, *notes]), parts, lists or [])


def cell(value: float, spec: str = "+.3g") -> str:
    """A number of a table; what is not one is said."""
    if math.isnan(value):
        return "–"
    return number(value, spec) if math.isfinite(value) else ("+∞" if value > 0 else "−∞")


def cell_with_interval(value: float, interval: Interval | None, spec: str = "+.3g") -> str:
    """A number of a table, with its interval behind it where that is known."""
    text = cell(value, spec)
    if interval is None or math.isnan(value) or any(map(math.isnan, interval)):
        return text
    low, high = (cell(bound, spec) for bound in interval)
    return f"{text} [{low}, {high}]"


def spoken(value: float) -> str:
    """A number of its own."""
    return (
        f"{value:+.3e}"
        if math.isfinite(value)
        else "not a number"
        if math.isnan(value)
        else ("+infinite" if value > 0 else "-infinite")
    )


def effect_heads(risks: Sequence[str]) -> list[str]:
    """`e_u`, `e_r` and so on."""
    return [f"e_{symbol(risk)}" for risk in risks]


def title_of(name: str, width: int = 44) -> str:
    """A name as a panel's title, on up to three lines."""
    return "\n".join(textwrap.wrap(name, width, max_lines=3, placeholder=" …"))
