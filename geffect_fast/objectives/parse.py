"""Objective strings: `npo(beta=0.1) + 0.5*kl` to an objective, by a grammar and nothing else."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Objective, combine
from geffect_fast.objectives.parameters import Value, finite
from geffect_fast.objectives.registry import lookup, nearest

if TYPE_CHECKING:
    from lark import Lark, Token, UnexpectedInput

    Terms = list[tuple[float, Objective]]
    Argument = tuple[Token, str | None, Value]

_GRAMMAR = r"""
many: one ("," one)*
one: total
total: signed | total "+" signed -> plus | total "-" signed -> minus
?signed: product | "+" signed | "-" signed -> negative
?product: scaled | NUMBER "*" signed -> times
?scaled: atom | scaled "*" number -> times_after
?atom: call | "(" total ")"
call: NAME | NAME "(" [argument ("," argument)*] ")"
argument: [NAME "="] value
?value: number | NAME -> boolean
number: NUMBER | "+" number | "-" number -> negative_number

NAME: /[A-Za-z_][A-Za-z0-9_]*/
NUMBER: /([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?/
%ignore /\s+/
"""

_WORDS = {
    "NAME": "a name",
    "NUMBER": "a number",
    "PLUS": "'+'",
    "MINUS": "'-'",
    "STAR": "'*'",
    "LPAR": "'('",
    "RPAR": "')'",
    "COMMA": "','",
    "EQUAL": "'='",
    "$END": "the end",
}
MAX_CHARACTERS = 10_000


def parse(text: str) -> Objective:
    """The objective that a string describes.

    Args:
        text: names with parameters by name or position, added, subtracted and scaled, such as
            `npo(beta=0.1) + 0.5*kl`, `wga(2)`, `0.5*(ga + nll)`.

    Returns:
        The objective; `str` of it is the canonical string, which parses to an equal objective.

    Raises:
        InputError: one line with what is wrong, the character where, and the text around it.
    """
    return _parse(text, "one")


def parse_list(text: str) -> list[Objective]:
    """The objectives of a list separated by commas, `ga,wga(alpha=1),npo(beta=0.1) + kl`.

    Raises:
        InputError: as `parse`.
    """
    return _parse(text, "many")


def resolve(spec: str | Objective) -> Objective:
    """An objective, given as itself or as a string.

    Raises:
        InputError: it is neither, or the string cannot be parsed.
    """
    return spec if isinstance(spec, Objective) else parse(spec)


class _Problem(Exception):
    """Something wrong at a character; becomes an InputError once the text is at hand."""

    def __init__(self, message: str, position: int | None) -> None:
        self.message = message
        self.position = position or 0


class _Actions:
    """What each rule of the grammar means; runs as the parser reduces, so depth costs no stack."""

    def many(self, items: list[Objective]) -> list[Objective]:
        return items

    def one(self, items: list[Terms]) -> Objective:
        return combine(items[0])

    def total(self, items: list[Terms]) -> Terms:
        return items[0]

    def plus(self, items: list[Terms]) -> Terms:
        items[0].extend(items[1])
        return items[0]

    def minus(self, items: list[Terms]) -> Terms:
        items[0].extend(self.negative(items[1:]))
        return items[0]

    def negative(self, items: list[Terms]) -> Terms:
        return [(-coefficient, objective) for coefficient, objective in items[0]]

    def times(self, items: list[Any]) -> Terms:
        return self.times_after([items[1], self.number(items[:1])])

    def times_after(self, items: list[Any]) -> Terms:
        terms, (token, factor) = items
        scaled = [(factor * coefficient, objective) for coefficient, objective in terms]
        if any(finite(coefficient) is None for coefficient, _ in scaled):
            raise _Problem("coefficient out of range", token.start_pos)
        return scaled

    def number(self, items: list[Any]) -> tuple[Token, float]:
        if isinstance(items[0], tuple):  # "+" number
            return items[0]
        token = items[0]
        number = finite(float(token))
        if number is None or len(token) > 400:  # longer than any finite number needs to be
            raise _Problem(f"number {_short(token)} is too long or out of range", token.start_pos)
        return token, int(token) if token.isdecimal() else number

    def negative_number(self, items: list[tuple[Token, float]]) -> tuple[Token, float]:
        token, number = items[0]
        return token, -number

    def boolean(self, items: list[Token]) -> tuple[Token, bool]:
        token = items[0]
        if token.lower() not in ("true", "false"):
            message = f"expected a number, true or false, not {_short(token)}"
            raise _Problem(message, token.start_pos)
        return token, token.lower() == "true"

    def argument(self, items: list[Any]) -> Argument:
        name, (token, value) = items
        return (token, None, value) if name is None else (name, str(name), value)

    def call(self, items: list[Any]) -> Terms:
        name = items[0]
        try:
            cls = lookup(str(name))
            objective = cls(**_keywords(cls, [item for item in items[1:] if item is not None]))
        except InputError as error:
            raise _Problem(str(error), name.start_pos) from None
        return [(1.0, objective)]


def _keywords(cls: type[Objective], arguments: list[Argument]) -> dict[str, Value]:
    """Arguments of a call by parameter name, or a `_Problem` at the one that does not fit."""
    names = tuple(field.name for field in dataclasses.fields(cls))
    given: dict[str, Value] = {}
    for i, (token, name, value) in enumerate(arguments):
        if name is None:
            if i >= len(names):
                takes = f"({', '.join(names)})" if names else "no parameters"
                raise _Problem(f"too many arguments: {cls.name} takes {takes}", token.start_pos)
            if any(earlier is not None for _, earlier, _ in arguments[:i]):
                raise _Problem("positional argument after a named one", token.start_pos)
            name = names[i]
        elif name not in names:
            advice = nearest(name, names)
            message = f"objective {cls.name} has no parameter {_short(token)}; {advice}"
            raise _Problem(message, token.start_pos)
        if name in given:
            raise _Problem(f"objective {cls.name}: {name} is given twice", token.start_pos)
        given[name] = value
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in given and _is_required(f)]
    if missing:
        raise InputError(f"objective {cls.name} needs a value for {', '.join(missing)}")
    return given


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def _lark() -> Lark:
    from lark import Lark

    return Lark(
        _GRAMMAR,
        parser="lalr",
        lexer="basic",
        start=["one", "many"],
        transformer=_Actions(),
        maybe_placeholders=True,
    )


def _parse(text: object, start: str) -> Any:
    from lark import UnexpectedInput

    if not isinstance(text, str):
        hint = f"; write {text.__name__}()" if isinstance(text, type) else ""
        raise InputError(f"objective {text!r} must be a string or an Objective{hint}")
    if not text.strip():
        raise InputError(f"objective string {text[:20]!r} is empty; write a name such as 'ga'")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"objective string {_short(text)} has {len(text)} characters, "
            f"at most {MAX_CHARACTERS} are allowed"
        )
    try:
        return _lark().parse(text, start=start)
    except _Problem as problem:
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
    found = "end of the string" if ended else _short(error.token)
    words = sorted(_WORDS[terminal] for terminal in error.accepts or {"$END"})
    position = len(text) if ended else error.token.start_pos or 0
    return f"unexpected {found}, expected {' or '.join(words)}", position


def _short(text: str) -> str:
    """`text` in quotes and on one line, shortened where it is long."""
    shown = repr(str(text) if len(text) <= 40 else f"{text[:37]}...")
    return shown if len(shown) <= 80 else f"{shown[:76]}...{shown[-1]}"


def _around(text: str, position: int) -> str:
    """The part of `text` on both sides of `position`, in quotes and on one line."""
    for reach in (40, 8):  # less of what is written as escapes
        start, end = max(position - reach, 0), position + reach
        shown = repr("..." * (start > 0) + text[start:end] + "..." * (end < len(text)))
        if len(shown) <= 200:
            break
    return shown
