"""Errors in objective strings, each told in one line with the character where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError

if TYPE_CHECKING:
    from lark import UnexpectedInput

_WORDS = {
    "NAME": "a name",
    "NUMBER": "a number",
    "PLUS": "'+'",
    "MINUS": "'-'",
    "STAR": "'*'",
    "LPAR": "'('",
    "RPAR": "')'",
    "COLON": "':'",
    "COMMA": "','",
    "EQUAL": "'='",
    "$END": "the end",
}


class Problem(Exception):
    """An error at a character; it becomes an InputError once the text is at hand."""

    def __init__(self, message: str, position: int | None) -> None:
        self.message = message
        self.position = position or 0


@contextmanager
def located(text: str) -> Iterator[None]:
    """Inside, errors in `text` are raised with their character and the text around it.

    Raises:
        InputError: in place of a `Problem` or an error of the parser.
    """
    from lark import UnexpectedInput

    try:
        yield
        return
    except Problem as problem:
        message, position = problem.message, problem.position
    except UnexpectedInput as error:
        message, position = _syntax_error(error, text)
    raise InputError(f"{message} (character {position + 1} of {_around(text, position)})")


def _syntax_error(error: UnexpectedInput, text: str) -> tuple[str, int]:
    from lark import UnexpectedToken

    if not isinstance(error, UnexpectedToken):
        position = error.pos_in_stream or 0
        return f"unexpected {text[position]!r}", position
    ended = error.token.type == "$END"
    found = "end of the string" if ended else short(error.token)
    accepted = set(error.accepts or {"$END"})
    if len(accepted) > 1:  # any number may begin a range, which few are meant to
        accepted.discard("COLON")
    words = sorted(_WORDS[terminal] for terminal in accepted)
    position = len(text) if ended else error.token.start_pos or 0
    return f"unexpected {found}, expected {' or '.join(words)}", position


def short(text: str) -> str:
    """`text` in quotes and on one line, shortened where it is long."""
    shown = repr(str(text) if len(text) <= 40 else f"{text[:37]}...")
    return shown if len(shown) <= 80 else f"{shown[:76]}...{shown[-1]}"


def _around(text: str, position: int) -> str:
    """The part of `text` on both sides of `position`, in quotes and on one line."""
    for reach in (40, 8):  # less where characters are written as escapes
        start, end = max(position - reach, 0), position + reach
        shown = repr("..." * (start > 0) + text[start:end] + "..." * (end < len(text)))
        if len(shown) <= 200:
            break
    return shown
