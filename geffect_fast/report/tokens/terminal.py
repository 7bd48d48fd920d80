"""The token view in a terminal: tokens on coloured grounds, or with levels beneath them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.cells import cell_len, set_cell_size
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from geffect_fast.report.format import number
from geffect_fast.report.tokens.colours import (
    INK,
    SCALE_NOTE,
    SHADES_OF_256,
    STEPS,
    UNDEFINED,
    colour,
    goodness,
    inline,
    mark,
    terminal_theme,
)
from geffect_fast.report.tokens.view import (
    STEP_NOTE,
    Answer,
    TokenView,
    heading,
    meaning,
    sequence_name,
    top_words,
)
from geffect_fast.results.risks import effect_name
from geffect_fast.terminal import Console, plain_text


def tokens_text(view: TokenView, width: int | None = 80) -> str:
    """The view's first objective as plain text, without colour."""
    return plain_text(TerminalView(view), width)


class TerminalView:
    """The tokens under a view's first objective, for `rich.console.Console.print`.

    Args:
        view: a view that `token_view` returns.
    """

    def __init__(self, view: TokenView) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        width = _label_width(self.view, coloured)
        yield from _legend(self.view, console.color_system if coloured else None, width)
        for answer in self.view.answers:
            yield Text()
            if coloured:
                rows = _coloured(self.view, answer, str(console.color_system))
            else:
                rows = _marked(self.view, answer, max(8, options.max_width - width))
            question = (_row_name(answer), Text(answer.question, style="bold"))
            yield _grid((question, *rows, *_totals(self.view, answer)), width)


def _legend(view: TokenView, system: str | None, width: int) -> Iterator[RenderableType]:
    yield Text(heading(view, 0), style="bold")
    for m, risk in enumerate(view.risks):
        below, above = meaning(risk)
        scale = number(float(view.scales[0, m]), ".2g")
        line = Text(effect_name(risk).ljust(width), style="dim")
        if system is None:
            low, high = mark(risk, -STEPS), mark(risk, STEPS)
            line.append(f"{low} {below}, {high} {above}; {STEPS} is {scale}", Style(dim=False))
        else:
            line.append(f"-{scale} ", Style(dim=False))
            for level in range(-STEPS, STEPS + 1, 3):
                line.append("  ", _style(goodness(risk, level), system) + Style(dim=False))
            line.append(f" {scale}  {below} / {above}", Style(dim=False))
        yield line
    full = str(STEPS) if system is None else "Full colour"
    unwanted = "! marks" if system is None else "Underlined is"
    notes = [f"{full} is {SCALE_NOTE}.", f"{unwanted} what is unwanted.", STEP_NOTE, *view.left_out]
    yield Text(" ".join(notes), style="dim")


def _row_name(answer: Answer) -> str:
    return f"{answer.data} row {answer.row}"


def _read(view: TokenView, answer: Answer) -> Iterator[tuple[int, slice]]:
    """The answer and the alternatives that the objective reads: numbers, and places of tokens."""
    for sequence, tokens in answer.sequences.items():
        if sequence == 0 or view.values[0, :, :, tokens].any():
            yield sequence, tokens


def _coloured(view: TokenView, answer: Answer, system: str) -> Iterator[tuple[str, Text]]:
    """Labels and coloured texts of the answer and its alternatives, one of each for every risk."""
    levels = [view.levels(0, m)[0] for m in range(len(view.risks))]
    for sequence, tokens in _read(view, answer):
        for risk, of_risk in zip(view.risks, levels, strict=True):
            text = Text(overflow="fold")
            for i in range(tokens.start, tokens.stop):
                text.append(view.texts[i], _style(goodness(risk, int(of_risk[i])), system))
            yield _coloured_label(risk, sequence), text


def _coloured_label(risk: str, sequence: int) -> str:
    return effect_name(risk) + (f" alt. {sequence}" if sequence else "")


def _marked(view: TokenView, answer: Answer, width: int) -> Iterator[tuple[str, Text]]:
    """Labels and lines of the answer and its alternatives, with every risk's levels beneath."""
    levels = [view.levels(0, m)[0] for m in range(len(view.risks))]
    for sequence, tokens in _read(view, answer):
        cells = [
            (
                view.texts[i],
                *(mark(r, int(of[i])) for r, of in zip(view.risks, levels, strict=True)),
            )
            for i in range(tokens.start, tokens.stop)
        ]
        for n, line in enumerate(_lines(cells, width)):
            name = sequence_name(sequence) if n == 0 else ""
            for label, row in zip((name, *map(effect_name, view.risks)), line, strict=True):
                yield label, Text(row.rstrip(), no_wrap=True)


def _lines(cells: list[tuple[str, ...]], width: int) -> Iterator[list[str]]:
    """Lines of tokens with lines of marks beneath them, as many tokens as fit on a line.

    Each item holds one line of tokens and one line of marks for every risk.
    """
    lines = [""] * len(cells[0])
    used = 0
    for text, *marks in cells:
        leading = " " * (text.startswith(" ") and len(text) > 1)
        for n, piece in enumerate(_pieces(text.replace("\n", ""), width)):
            column = [piece, *(leading + word if n == 0 else "" for word in marks)]
            room = max(map(cell_len, column))
            if used + room > width:
                yield lines
                lines, used = [""] * len(column), 0
            lines = [
                row + set_cell_size(cell, room) for row, cell in zip(lines, column, strict=True)
            ]
            used += room
        if text.endswith("\n"):
            yield lines
            lines, used = [""] * len(lines), 0
    if used:
        yield lines


def _pieces(text: str, width: int) -> list[str]:
    """The text of a token, cut into pieces where it is longer than a line."""
    pieces = [""]
    for character in text:
        if cell_len(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def _totals(view: TokenView, answer: Answer) -> Iterator[tuple[str, Text]]:
    """Labels and lines with the sum of the answer's effects and the tokens that bring most."""
    for m, risk in enumerate(view.risks):
        text = Text(number(view.total(0, m, answer), "+.2e"))
        strongest = view.strongest(0, m, answer)
        words = [f"“{inline(view.texts[i])}” {100 * share:.0f}%" for i, share in strongest]
        text.append(f"; {top_words(risk)}: {', '.join(words) or 'none'}")
        yield f"{effect_name(risk)} in all", text


def _grid(rows: Iterable[tuple[str, Text]], width: int) -> Table:
    grid = Table.grid(padding=0)
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(label, style="dim"), text)
    return grid


def _label_width(view: TokenView, coloured: bool) -> int:
    """Width of the labels on the left of the texts, in columns of the terminal."""
    names = [effect_name(risk) for risk in view.risks]
    labels = [f"{name} in all" for name in names] + list(map(_row_name, view.answers))
    last = max(
        (sequence for answer in view.answers for sequence, _ in _read(view, answer)), default=0
    )
    if last and coloured:
        labels += [_coloured_label(risk, last) for risk in view.risks]
    elif last:
        labels.append(sequence_name(last))
    return 2 + max(map(cell_len, labels))


def _style(good: int, system: str) -> Style:
    """The style of a token: a background with readable text. Unwanted tokens are underlined."""
    if good == UNDEFINED:
        return Style(reverse=True, bold=True)
    if good == 0:
        return Style()
    underline = good < 0
    if system in ("standard", "windows"):  # sixteen colours, of unknown shades
        name = "cyan" if good > 0 else "yellow"
        if abs(good) <= STEPS // 2:
            return Style(color=name, underline=underline)
        return Style(color="black", bgcolor=name, underline=underline)
    theme = terminal_theme()
    background = colour(good, theme)
    if system == "256":  # rich would take the nearest, which may be red or teal
        shades = SHADES_OF_256[theme][good > 0]
        background = f"color({shades[(abs(good) - 1) * len(shades) // STEPS]})"
    return Style(color=INK[theme], bgcolor=background, underline=underline)
