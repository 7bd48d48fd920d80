"""JSON files of two kinds: one row a line, or one document with a list of rows.

A document is the list itself, or an object that holds the list. A list is decoded row by row while
the file is read, so that memory holds the rows but not the whole text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from typing import Any, TextIO

from geffect_fast.data.files import DataFile
from geffect_fast.data.row_kinds import FIELDS, known_shape, makes_row, row_place
from geffect_fast.errors import InputError, in_one_line

CHUNK = 2**20
"""Characters of a list that are read at a time; of a longer row, as many as were read before."""
_LONGEST_WORD = 16
"""Characters before the end of the read text where a fault may come from the cut alone."""


def json_lines(file: DataFile) -> Iterator[tuple[str, Any]]:
    """Places and values of all lines that are not blank."""
    with file.text() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                file.check_utf8(line, number)
                yield file.line(number), parsed(line.rstrip("\n"), file.line(number))


def json_document(file: DataFile) -> Iterator[tuple[str, Any]]:
    """Places and rows of a list, of the one list in an object, or of an object that is a row."""
    if file.head_text().startswith("["):
        with file.text() as opened:
            rows: Any = _List(file, opened)
            yield from ((row_place(file.name, i) + file.origin, row) for i, row in enumerate(rows))
        return
    with file.text() as opened:
        whole = parsed(file.check_utf8(opened.read(), 1), file.place, "mend it, or use JSON lines")
    if not isinstance(whole, dict) or makes_row(whole):
        yield file.place, whole
        return
    lists = {field: value for field, value in whole.items() if isinstance(value, list)}
    if len(lists) != 1:
        names = ", ".join(in_one_line(repr(field), 40) for field in list(lists or whole)[:6])
        holds = f"several lists ({names})" if lists else f"no list of rows (its fields: {names})"
        advice = (
            "by columns: write it by rows, as pandas' to_json(orient='records') does"
            if makes_row(lists)
            else "keep the one list of rows"
        )
        raise InputError(f"{file.place} is one object with {holds}; {advice}")
    ((field, rows),) = lists.items()
    origin = f"{file.origin}, field {in_one_line(repr(field), 40)}"
    yield from ((row_place(file.name, i) + origin, row) for i, row in enumerate(rows))


def is_document(head: str) -> bool:
    """Whether a file that begins with `head`, which begins with `{` or `[`, is one document."""
    first, *others = [line for line in head.split("\n") if line.strip()]
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):  # damaged, or the beginning of a document
        if others:
            return not others[0].startswith(head[0]) or first.rstrip()[-1] in "[{,"
        if head[0] == "[":
            return True
        key, _, value = head[1:].partition(":")  # the line is longer than the head
        return value.lstrip().startswith("[") and key.strip(' "') not in FIELDS
    if others:
        return head[0] == "[" and not others[0].startswith("[")
    if isinstance(row, list):
        return True
    holds = any(isinstance(v, list) and isinstance(next(iter(v), 0), dict) for v in row.values())
    return holds and not makes_row(row) and known_shape(row) is None


def parsed(text: str, where: str, remedy: str = "put one JSON object on each line") -> Any:
    """The value of a JSON text; raises `InputError`, with line and column, where there is none."""
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        at = f"{line}column {error.colno}"
        raise InputError(f"{where} is malformed JSON ({error.msg}, {at}); {remedy}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where} is unusable JSON ({in_one_line(error)}); {remedy}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object; raises `ValueError` where a field comes twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its field {twice!r} comes twice, keep one")
    return fields


class _List:
    """The values of a JSON list, decoded one by one while the file is read."""

    def __init__(self, file: DataFile, opened: TextIO) -> None:
        self._file, self._opened = file, opened
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # where `_text` begins
        self._decode = json.JSONDecoder(object_pairs_hook=_each_once).raw_decode

    def __iter__(self) -> Iterator[Any]:
        self._skip()
        self._at += 1  # the opening bracket
        if self._skip() != "]":
            while True:
                yield self._value()
                mark = self._skip()
                if mark == "]":
                    break
                if mark != ",":
                    self._fail("Expecting ',' delimiter", self._at)
                self._at += 1
                self._skip()
        self._at += 1
        if self._skip():
            self._fail("Extra data", self._at)

    def _more(self) -> None:
        """Drop the decoded text, and read on, at least as many characters as are left."""
        done, self._text = self._text[: self._at], self._text[self._at :]
        self._line += done.count("\n")
        self._column = len(done) - done.rfind("\n") - 1 + (0 if "\n" in done else self._column)
        self._at = 0
        new = self._opened.read(max(CHUNK, len(self._text)))
        self._file.check_utf8(new, self._line + self._text.count("\n"))
        self._ended = not new
        self._text += new

    def _skip(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            self._at = WHITESPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _LONGEST_WORD or "Unterminated" in error.msg
                if self._ended or not cut:
                    self._fail(error.msg, error.pos)
            except (RecursionError, ValueError) as error:
                raise InputError(
                    f"{self._file.place} is unusable JSON ({in_one_line(error)}); mend the JSON "
                    "array, or use JSON lines"
                ) from None
            else:
                # A number may go on behind the text that was read, as 1.5 does in 1.5e-7.
                cut = isinstance(value, int | float) and end > len(self._text) - len("e-7")
                if self._ended or not cut:
                    self._at = end
                    return value
            self._more()

    def _fail(self, what: str, at: int) -> None:
        before = self._text[:at]
        line = self._line + before.count("\n")
        column = at - before.rfind("\n") + (0 if "\n" in before else self._column)
        raise InputError(
            f"{self._file.place} is malformed JSON ({what}, line {line} column {column}); mend the "
            "JSON array, or use JSON lines"
        )
