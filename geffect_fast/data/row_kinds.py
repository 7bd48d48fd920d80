"""Kinds of rows by their fields: kinds that are read, and kinds of other tools that are not.

Below are the kinds that are read, each with its fields after reading. Other fields of a row stay as
they are in the data.

    question       question, answer: text
    choice         question: text; choices: texts; answer: the right one's index
    chat           messages: turns of role and content
    text           text: all of it is learned
    continuation   prompt, gt: a text and its continuation, as MUSE writes them
    tokens         input_ids, labels: lists of ids
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

RowKind = Literal["question", "choice", "chat", "text", "continuation", "tokens"]

CALLED: dict[RowKind, str] = {
    "question": "questions and answers",
    "choice": "multiple choice",
    "chat": "conversations",
    "text": "plain text",
    "continuation": "beginnings and continuations of texts",
    "tokens": "tokenised rows",
}
"""The words for rows of each kind in messages."""

MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
"""Columns of MMLU's CSV files, which have no line with their names."""

_BY_FIELDS: tuple[tuple[str, RowKind], ...] = (
    ("input_ids", "tokens"),
    ("question choices", "choice"),
    ("question A B", "choice"),
    ("question answer", "question"),
    ("messages", "chat"),
    ("conversations", "chat"),
    ("prompt gt", "continuation"),
    ("text", "text"),
    ("labels", "tokens"),
)
_KINDS = tuple((frozenset(fields.split()), kind) for fields, kind in _BY_FIELDS)
"""Fields of each kind of row; the first fields that a row has decide its kind."""

FIELDS = frozenset().union(*(fields for fields, _ in _KINDS))
"""All fields that decide the kind of a row."""


def makes_row(names: Iterable[Any]) -> bool:
    """Whether fields of these names make a row of a kind that is read."""
    given = set(names)
    return any(fields <= given for fields, _ in _KINDS)


def row_kind(row: Mapping[str, Any]) -> RowKind:
    """The kind of a row; `question` for a row of no known kind."""
    return next((kind for fields, kind in _KINDS if fields <= row.keys()), "question")


def row_place(name: str, row: int) -> str:
    """The place of a row of a set, for messages."""
    return f"{name}: row {row} (counting from 0)"


# ---- rows as other tools write them ----

_TURNS = "put what the user says in 'question' and what the model says in 'answer', a row a turn"

_SHAPES: tuple[tuple[frozenset[str], str, str], ...] = tuple(
    (frozenset(fields.split()), name, advice)
    for fields, name, advice in (
        ("conversation", "a conversation", _TURNS),
        (
            "instruction output",
            "an instruction as Alpaca writes it",
            "put 'instruction' and 'input' in 'question', 'output' in 'answer'",
        ),
        (
            "instruction response",
            "an instruction as Dolly writes it",
            "put 'instruction' and 'context' in 'question', 'response' in 'answer'",
        ),
        (
            "prompt chosen rejected",
            "a preference",
            "put 'prompt' in 'question', the answer to forget in 'answer', the other in "
            "'alternative'",
        ),
        (
            "chosen rejected",
            "a preference",
            "put what both begin with in 'question', the answer to forget in 'answer', the other "
            "in 'alternative'",
        ),
        (
            "prompt completion",
            "prompt and completion",
            "rename 'prompt' to 'question', 'completion' to 'answer'",
        ),
        (
            "prompt response",
            "prompt and response",
            "rename 'prompt' to 'question', 'response' to 'answer'",
        ),
        ("query answer", "a query", "rename 'query' to 'question'"),
        ("query response", "a query", "rename 'query' to 'question', 'response' to 'answer'"),
        ("input output", "input and output", "rename 'input' to 'question', 'output' to 'answer'"),
        ("question options", "a choice", "rename 'options' to 'choices'"),
        ("question answers", "a question with several answers", "put one of 'answers' in 'answer'"),
        ("question response", "a question", "rename 'response' to 'answer'"),
        ("question output", "a question", "rename 'output' to 'answer'"),
    )
)
"""Rows of other tools: fields, name and advice; the first whose fields a row has counts."""


def known_shape(row: Mapping[Any, Any]) -> str | None:
    """A row's kind in another tool and advice, for a message; None where the kind is not known."""
    for fields, name, advice in _SHAPES:
        if fields <= row.keys():
            return f"this is {name}: {advice}"
    lowered = {str(field).strip().lower(): field for field in row}
    names = {ours: lowered.get(ours) for ours in ("question", "answer")}
    others = [f"{name!r} to {ours!r}" for ours, name in names.items() if name != ours]
    if others and None not in names.values():
        return f"names count as they are written: rename {', '.join(others)}"
    return None
