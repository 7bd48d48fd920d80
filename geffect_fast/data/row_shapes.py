"""Rows as other tools write them: by which fields each is known, and how to turn it into ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURNS = "put what the user says in 'question' and what the model says in 'answer', a row a turn"

_SHAPES: tuple[tuple[frozenset[str], str, str], ...] = tuple(
    (frozenset(fields.split()), name, advice)
    for fields, name, advice in (
        ("messages", "chat messages", _TURNS),
        ("conversations", "a conversation as ShareGPT writes it", _TURNS),
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
        (
            "prompt gt",
            "a prompt as MUSE writes it",
            "rename 'prompt' to 'question', 'gt' to 'answer'",
        ),
        ("query answer", "a query", "rename 'query' to 'question'"),
        ("query response", "a query", "rename 'query' to 'question', 'response' to 'answer'"),
        ("input output", "input and output", "rename 'input' to 'question', 'output' to 'answer'"),
        (
            "question choices",
            "a choice as WMDP and MMLU write it",
            "put the text of the right one of 'choices' in 'answer'",
        ),
        ("question options", "a choice", "put the text of the right one of 'options' in 'answer'"),
        ("question answers", "a question with several answers", "put one of 'answers' in 'answer'"),
        ("question response", "a question", "rename 'response' to 'answer'"),
        ("question output", "a question", "rename 'output' to 'answer'"),
        (
            "text",
            "plain text, as MUSE's and WMDP's corpora are",
            "tokenise it and give 'input_ids' and the same as 'labels', or put its beginning in "
            "'question' and its rest in 'answer'",
        ),
    )
)
"""Fields by which a row is known, what it is then, and what to do; the first that fits counts."""


def known_shape(row: Mapping[Any, Any]) -> str | None:
    """What a row is and what to do with it, for a message; None where nothing is known of it."""
    for fields, name, advice in _SHAPES:
        if fields <= row.keys():
            return f"this is {name}: {advice}"
    lowered = {str(field).strip().lower(): field for field in row}
    names = {ours: lowered.get(ours) for ours in ("question", "answer")}
    others = [f"{name!r} to {ours!r}" for ours, name in names.items() if name != ours]
    if others and None not in names.values():
        return f"names count as they are written: rename {', '.join(others)}"
    return None


def known_turns(row: Any) -> str | None:
    """As `known_shape`, for a row that is a bare list of turns."""
    if not isinstance(row, list | tuple) or not row or not isinstance(row[0], Mapping):
        return None
    turns = {"role", "content"} <= row[0].keys() or {"from", "value"} <= row[0].keys()
    return f"this is a conversation: {_TURNS}" if turns else None
