"""The style of all tables for the terminal. At no width is a number cut or text left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP, _EDGES = 3, 2
"""Columns of the terminal between two columns of a table, and at the table's edges."""
_WRAPPED = 10
"""The least width of a column of words that wraps."""


@dataclass
class FittedTable:
    """A table that is as wide as its lines, where the terminal has room for them.

    Where there is less room, columns of words wrap first, then columns of numbers, between a
    number and its interval. Columns that still find no room go into a further table below. Each
    table begins with the columns that name the rows: the columns of words before the first column
    of numbers, or the first column.

    Attributes:
        title: title of the table.
        heads: heads of its columns.
        words: heads of the columns that hold words. All others hold numbers.
        rows: the cells of each row, and one style for all of them.
        sections: numbers of the rows that have a line before them.
    """

    title: str
    heads: Sequence[str]
    words: Collection[str]
    rows: list[tuple[tuple[str | Text, ...], str]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        """Add a row; columns without a cell stay empty."""
        self.rows.append((cells + ("",) * (len(self.heads) - len(cells)), style))

    def add_section(self) -> None:
        """Draw a line before the next row."""
        self.sections.add(len(self.rows))

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        columns = [
            [
                cell if isinstance(cell, Text) else console.render_str(cell)
                for cell in (head, *(cells[i] for cells, _ in self.rows))
            ]
            for i, head in enumerate(self.heads)
        ]
        yield Text(self.title, style="bold")
        for widths in self._tables([_widths(of) for of in columns], options.max_width):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for i, width in widths.items():
                table.add_column(
                    columns[i][0],
                    justify="left" if self.heads[i] in self.words else "right",
                    width=width,
                    overflow="fold",
                )
            for n, (_, style) in enumerate(self.rows):
                if n in self.sections:
                    table.add_section()
                table.add_row(*(columns[i][n + 1] for i in widths), style=style)
            yield table

    def _tables(self, known: Sequence[tuple[int, int]], width: int) -> Iterator[dict[int, int]]:
        """The columns of each table, by index, with their widths.

        Args:
            known: for each column the lengths of its longest word and of its longest line.
            width: columns of the terminal.
        """
        first = next((i for i, head in enumerate(self.heads) if head not in self.words), 1)
        names = [*range(max(first, 1))]
        most = (width - _EDGES) // (len(names) + 1) - _GAP  # names and one more column fit
        least = [
            min(most, max(narrow, min(_WRAPPED, whole)) if head in self.words else narrow)
            for head, (narrow, whole) in zip(self.heads, known, strict=True)
        ]
        shown = names
        for i in range(len(names), len(known)):
            if shown > names and sum(least[at] + _GAP for at in (*shown, i)) > width:
                yield self._fitted(shown, least, known, width)
                shown = names
            shown = [*shown, i]
        yield self._fitted(shown, least, known, width)

    def _fitted(
        self,
        shown: Sequence[int],
        least: Sequence[int],
        known: Sequence[tuple[int, int]],
        width: int,
    ) -> dict[int, int]:
        """Widths of columns side by side. Words give way first, then the widest numbers."""
        room = width - _EDGES - _GAP * (len(shown) - 1)
        widths = {i: known[i][1] for i in shown}
        words = [i for i in shown if self.heads[i] in self.words]
        numbers = sorted(set(shown) - set(words), key=lambda i: -widths[i])
        for i in numbers:
            over = sum(widths[n] for n in numbers) + sum(least[w] for w in words) - room
            widths[i] -= max(0, min(over, widths[i] - least[i]))
        while sum(widths.values()) > room:
            widest = max((i for i in words if widths[i] > least[i]), key=widths.__getitem__)
            widths[widest] -= 1
        return widths


def _widths(texts: Sequence[Text]) -> tuple[int, int]:
    """Lengths of the longest word and of the longest line of a column."""
    lines = [line for text in texts for line in text.plain.splitlines()]
    return (
        max((cell_len(word) for line in lines for word in line.split()), default=0),
        max(map(cell_len, lines), default=0),
    )
