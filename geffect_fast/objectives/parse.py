"""Parsing of objective strings, `npo(beta=0.1) + 0.5*kl`, by a grammar and nothing else.

Where objectives are swept, a range may stand for a number: `npo(beta=0.01:4:30,log)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Objective, combine
from geffect_fast.objectives.family import Range, RangedObjective, RangedSum, Term
from geffect_fast.objectives.open_unlearning import lookup
from geffect_fast.objectives.parameters import Value, finite, kind_of, written
from geffect_fast.objectives.problem import Problem, located, short
from geffect_fast.registry import nearest

if TYPE_CHECKING:
    from lark import Lark, Token

    Number = tuple[Token, float]
    Argument = tuple[Token, str | None, Value | Range | str]

_GRAMMAR = r"""
!many: one ("," one)*
one: total
total: term | total "+" term -> plus | total "-" term -> minus
?term: signed | weights "*" signed -> weighted
?weights: unsigned | "(" unsigned ["," NAME] ")" -> spaced
?unsigned: NUMBER ":" number ":" number -> range
?signed: product | "+" signed | "-" signed -> negative
?product: scaled | NUMBER "*" signed -> times
?scaled: atom | scaled "*" number -> times_after
?atom: call | "(" total ")"
call: NAME | NAME "(" [argument ("," argument)*] ")"
argument: [NAME "="] value
?value: number | number ":" number ":" number -> range | NAME -> word
number: NUMBER | "+" number | "-" number -> negative_number

NAME: /(open_unlearning\.)?[A-Za-z_][A-Za-z0-9_]*/
NUMBER: /([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?/
%ignore /\s+/
"""

LOG = "log"
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
    with located(text):
        return _without_ranges(_parsed(text, "one"))


def parse_list(text: str) -> list[Objective]:
    """The objectives of a list separated by commas, `ga,wga(alpha=1),npo(beta=0.1) + kl`.

    Raises:
        InputError: as `parse`.
    """
    with located(text):
        return [_without_ranges(found) for found in _parsed(text, "many")[::2]]


def parse_families(text: str) -> list[tuple[str, Objective | RangedSum]]:
    """The objectives of a list in which ranges may stand for numbers, each with its own text.

    Raises:
        InputError: as `parse`.
    """
    with located(text):
        found = _parsed(text, "many")
    commas = [comma.start_pos for comma in found[1::2]]
    starts, ends = [0, *(comma + 1 for comma in commas)], [*commas, len(text)]
    texts = [" ".join(text[a:b].split()) for a, b in zip(starts, ends, strict=True)]
    return list(zip(texts, found[::2], strict=True))


def resolve(spec: str | Objective) -> Objective:
    """An objective, given as itself or as a string.

    Raises:
        InputError: it is neither, or the string cannot be parsed.
    """
    return spec if isinstance(spec, Objective) else parse(spec)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of object that the names in a grammar's calls stand for.

    Attributes:
        base: the base class, a `Parameterised`.
        such_as: an existing name, as an example.
        lookup: gives the class of a name, a frozen dataclass that is declared as objectives are.
    """

    base: type[Any]
    such_as: str
    lookup: Callable[[str], Any]


OBJECTIVE = Kind(Objective, "ga", lookup)


def parse_call(text: str, kind: Kind) -> Any:
    """The object that a single name with its parameters stands for, `orthograd(rank_tol=1e-6)`.

    Raises:
        InputError: as `parse`.
    """
    with located(text):
        (made,) = _parsed(text, "call", kind)
        if isinstance(made.objective, RangedObjective):
            raise Problem("a range is no value here; give one number", None)
        return made.objective


class _Actions:
    """The actions of the grammar's rules, run as the parser reduces, so depth costs no stack."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def many(self, items: list[Any]) -> list[Any]:
        return items

    def one(self, items: list[list[Term]]) -> Objective | RangedSum:
        for _, ranges, objective in items[0]:
            if ranges or isinstance(objective, RangedObjective):
                return RangedSum(tuple(items[0]))
        return combine([(c, o) for c, _, o in items[0] if not isinstance(o, RangedObjective)])

    def total(self, items: list[list[Term]]) -> list[Term]:
        return items[0]

    def plus(self, items: list[list[Term]]) -> list[Term]:
        items[0].extend(items[1])
        return items[0]

    def minus(self, items: list[list[Term]]) -> list[Term]:
        items[0].extend(self.negative(items[1:]))
        return items[0]

    def negative(self, items: list[list[Term]]) -> list[Term]:
        return [term._replace(coefficient=-term.coefficient) for term in items[0]]

    def weighted(self, items: list[Any]) -> list[Term]:
        (_, swept), terms = items
        return [term._replace(ranges=(*term.ranges, swept)) for term in terms]

    def times(self, items: list[Any]) -> list[Term]:
        return self.times_after([items[1], self.number(items[:1])])

    def times_after(self, items: list[Any]) -> list[Term]:
        terms, (token, factor) = items
        scaled = [term._replace(coefficient=factor * term.coefficient) for term in terms]
        if any(finite(term.coefficient) is None for term in scaled):
            raise Problem("coefficient out of range", token.start_pos)
        return scaled

    def number(self, items: list[Any]) -> Number:
        if isinstance(items[0], tuple):  # "+" number
            return items[0]
        token = items[0]
        number = finite(float(token))
        if number is None or len(token) > 400:  # longer than any finite number needs to be
            raise Problem(f"number {short(token)} is too long or out of range", token.start_pos)
        return token, int(token) if token.isdecimal() else number

    def negative_number(self, items: list[Number]) -> Number:
        token, number = items[0]
        return token, -number

    def range(self, items: list[Any]) -> tuple[Token, Range]:
        (token, start), (_, stop), (last, count) = (self.number([item]) for item in items)
        if start > stop:
            ends = f"{written(start)}:{written(stop)}"
            message = f"range {ends} ends before it begins; give the smaller value first"
            raise Problem(message, token.start_pos)
        if count != int(count) or count < 1 or (count == 1 and start != stop):
            most = "at least 1" if start == stop else "at least 2"
            message = f"a range needs a whole number of values, {most}, got {count:g}"
            raise Problem(message, last.start_pos)
        return token, Range(start, stop, int(count), token.start_pos or 0)

    def spaced(self, items: list[Any]) -> tuple[Token, Range]:
        (token, swept), word = items
        return (token, swept) if word is None else (token, _in_log(swept, word))

    def word(self, items: list[Token]) -> tuple[Token, bool | str]:
        token = items[0]
        if token.lower() not in ("true", "false", LOG):
            message = f"expected a number, true or false, not {short(token)}"
            raise Problem(message, token.start_pos)
        return token, LOG if token.lower() == LOG else token.lower() == "true"

    def argument(self, items: list[Any]) -> Argument:
        name, (token, value) = items
        return (token, None, value) if name is None else (name, str(name), value)

    def call(self, items: list[Any]) -> list[Term]:
        name = items[0]
        try:
            cls = self._kind.lookup(str(name))
            keywords = _keywords(cls, [item for item in items[1:] if item is not None])
            if any(isinstance(value, Range) for value in keywords.values()):
                return [Term(1.0, (), RangedObjective(cls, keywords, name.start_pos))]
            return [Term(1.0, (), cls(**keywords).expanded())]
        except InputError as error:
            raise Problem(str(error), name.start_pos) from None


def _keywords(cls: type[Objective], arguments: list[Argument]) -> dict[str, Value | Range]:
    """Arguments of a call by parameter name, or a `Problem` at the one that does not fit."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = tuple(fields)
    given: dict[str, Value | Range] = {}
    named, last = False, ""
    for token, name, value in arguments:
        if isinstance(value, str):
            before = given.get(last)
            if name is not None or not isinstance(before, Range):
                message = "expected a number, true or false, not 'log', which goes behind a range"
                raise Problem(message, token.start_pos)
            given[last] = _in_log(before, token)
            continue
        if name is None:
            if len(given) >= len(names):
                takes = f"({', '.join(names)})" if names else "no parameters"
                raise Problem(f"too many arguments: {cls.name} takes {takes}", token.start_pos)
            if named:
                raise Problem("positional argument after a named one", token.start_pos)
            last = names[len(given)]
        elif name not in fields:
            advice = nearest(name, names)
            message = f"{cls.noun} {cls.name} has no parameter {short(token)}; {advice}"
            raise Problem(message, token.start_pos)
        else:
            named, last = True, name
        if last in given:
            raise Problem(f"{cls.noun} {cls.name}: {last} is given twice", token.start_pos)
        if isinstance(value, Range) and kind_of(fields[last]) is bool:
            message = f"{cls.noun} {cls.name}: {last} must be true or false, got the range {value}"
            raise Problem(message, token.start_pos)
        given[last] = value
    missing = [name for name, field in fields.items() if name not in given and _is_required(field)]
    if missing:
        raise InputError(f"{cls.noun} {cls.name} needs a value for {', '.join(missing)}")
    return given


def _in_log(swept: Range, word: Token) -> Range:
    """A range made evenly spaced in the logarithm by the word `log` that follows the range."""
    if word.lower() != LOG or swept.log:
        raise Problem(f"expected only 'log' behind a range, not {short(word)}", word.start_pos)
    if swept.start <= 0:
        message = f"range {swept}: values evenly spaced in the logarithm must be above 0"
        raise Problem(message, swept.position)
    return dataclasses.replace(swept, log=True)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _without_ranges(found: Objective | RangedSum) -> Objective:
    """The objective; a `Problem` at its first range where it has any."""
    if isinstance(found, Objective):
        return found
    swept = found.axes()[0].range
    text = str(swept)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    message = f"range {text} belongs to a sweep (gf.sweep, geffect-fast sweep); give one value here"
    raise Problem(message, swept.position)


@cache
def _lark(kind: Kind) -> Lark:
    from lark import Lark

    return Lark(
        _GRAMMAR,
        parser="lalr",
        lexer="basic",
        start=["one", "many", "call"],
        transformer=_Actions(kind),
        maybe_placeholders=True,
    )


def _parsed(text: object, start: str, kind: Kind = OBJECTIVE) -> Any:
    """The result of parsing a text by the grammar.

    Raises:
        InputError: `text` is no string, or the text is empty or too long.
        Problem, lark.UnexpectedInput: the text does not follow the grammar.
    """
    noun = kind.base.noun
    if not isinstance(text, str):
        hint = f"; write {text.__name__}()" if isinstance(text, type) else ""
        raise InputError(f"{noun} {text!r} must be a string or an {kind.base.__name__}{hint}")
    if not text.strip():
        raise InputError(
            f"{noun} string {text[:20]!r} is empty; write a name such as {kind.such_as!r}"
        )
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{noun} string {short(text)} has {len(text)} characters, "
            f"at most {MAX_CHARACTERS} are allowed"
        )
    return _lark(kind).parse(text, start=start)
