"""Output to a terminal, which shows control characters in other people's text and obeys none.

Questions, tokens, file names and messages of templates may hold escape codes that recolour, erase
or retitle a terminal, and characters that change the order of reading. The streams of a command
(`clean_output`) and `Console` show such characters, as in `\\x1b` and `\\u202e`, so that no `print`
can forget to do so.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TextIO

import rich.console
from rich.segment import Segment
from rich.text import Text

from geffect_fast.visible import visible

PIPED = 120
"""Width, in columns, of tables that go to no terminal."""
_BAR = re.compile(r"\r|\n*(?:\x1b\[A)+\Z")
"""Moves of tqdm between its bars: a write of tqdm begins with such a move, or consists of one."""


class Console(rich.console.Console):
    """rich's console for any text: colours come from styles alone, never from text or markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"highlight": False, "markup": False, "emoji": False} | options))

    def render_str(self, text: str, **how: Any) -> Text:
        """Render a string as rich does, but made visible, so that widths are right too."""
        return super().render_str(visible(text), **how)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Render as rich does; all text but rich's own control codes is made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


class _CleanStream:
    """A text stream like another one, to which it writes text made visible."""

    def __init__(self, stream: TextIO, has_bars: bool) -> None:
        self._stream, self._has_bars = stream, has_bars
        self.rich_proxied_file = stream  # rich's consoles make text visible, and write here

    def write(self, text: str) -> int:
        bar = _BAR.match(text) if self._has_bars else None
        moves = bar[0] if bar is not None else ""
        self._stream.write(moves + visible(text[len(moves) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def clean_output() -> Iterator[None]:
    """Inside, all text that any code prints to stdout and stderr is made visible."""
    before = sys.stdout, sys.stderr
    wrap: Callable[..., Any] = _CleanStream
    sys.stdout = before[0] and wrap(before[0], has_bars=False)
    sys.stderr = before[1] and wrap(before[1], has_bars=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def columns() -> int | None:
    """The width of tables: `PIPED` columns, or None, which is the terminal's width."""
    return None if sys.stdout is not None and sys.stdout.isatty() else PIPED


def plain_text(renderable: Any, width: int | None = None) -> str:
    """The text that `Console.print` prints, without colour; no display by rich in a notebook."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_jupyter=False).print(renderable)
    return stream.getvalue().rstrip()


_NOTICED: ContextVar[set[str] | None] = ContextVar("noticed", default=None)


@contextmanager
def noticed_once() -> Iterator[None]:
    """Inside, no notice is printed a second time; meant for commands of several runs."""
    token = _NOTICED.set(set())
    try:
        yield
    finally:
        _NOTICED.reset(token)


def print_notice(*decided: str) -> None:
    """Print decisions as a line on stderr, beside a command's own output."""
    noticed = _NOTICED.get()
    if noticed is not None:
        decided = tuple(text for text in decided if text not in noticed)
        noticed.update(decided)
    if decided:
        print("; ".join(decided), file=sys.stderr)


@contextmanager
def progress_bar(show: bool, what: str, total: float) -> Iterator[Callable[..., Any]]:
    """A bar from 0 to `total`, none where `show` is False or stderr is no terminal or notebook.

    Yields:
        A function that takes the progress so far as `completed=`, or further progress as
        `advance=`.
    """
    if not show:
        yield lambda **_: None
        return
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    with Progress(console=console, transient=True, disable=not shown) as progress:
        yield partial(progress.update, progress.add_task(escape(what), total=total))
