"""Rows of multiple choice as WMDP, MMLU and others write them: checks, and the prompt of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from string import ascii_uppercase as LETTERS
from typing import Any

from geffect_fast.data.row_checks import check_text
from geffect_fast.errors import InputError, in_one_line


def checked_choice(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields `question`, `choices` and `answer` of a row, the last as an index.

    Args:
        row: a row in which `choices` is a list of texts, or columns `A`, `B` ... take its place,
            and `answer` is an index from 0, a letter, or the right choice's text.
        where: the row's place, for messages.

    Raises:
        InputError: a field is missing or of another type, or `answer` stands for no choice or for
            more than one.
    """
    question = check_text(row, "question", where)
    choices = _choices(row, where)
    if "answer" not in row:
        raise InputError(f"{where} has no 'answer'; add the right choice's index, from 0")
    return {"question": question, "choices": choices, "answer": _index(row, choices, where)}


def lettered(row: Mapping[str, Any]) -> str:
    """The question, its choices by letter, and `Answer:`, as the prompts of MMLU and WMDP."""
    listed = zip(LETTERS, row["choices"], strict=False)
    return "\n".join(
        [row["question"].strip(), *(f"{a}. {choice.strip()}" for a, choice in listed), "Answer:"]
    )


def _choices(row: Mapping[str, Any], where: str) -> list[str]:
    raw: Any = row.get("choices")
    if "choices" not in row:
        raw = [row[letter] for letter in takewhile(row.__contains__, LETTERS)]
    elif isinstance(raw, str):  # from a cell of a table
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raw = None
    raw = raw.tolist() if hasattr(raw, "tolist") else raw
    if not isinstance(raw, list | tuple):
        kind = type(row.get("choices")).__name__
        raise InputError(
            f"{where}: 'choices' is of type {kind}; make it a list of texts, or give them in "
            "columns A, B, C, D"
        )
    if not 2 <= len(raw) <= len(LETTERS):
        raise InputError(
            f"{where}: 'choices' holds {len(raw)}; give 2 to {len(LETTERS)}, or leave the row out"
        )
    return [
        check_text({f"choices[{i}]": choice}, f"choices[{i}]", where)
        for i, choice in enumerate(raw)
    ]


def _index(row: Mapping[str, Any], choices: list[str], where: str) -> int:
    raw = row["answer"]
    raw = raw.item() if hasattr(raw, "item") else raw
    if isinstance(raw, str):
        text = raw.strip()
        may_be = [i for i, choice in enumerate(choices) if choice.strip() == text]
        if len(text) == 1:
            may_be += [i for i, letter in enumerate(LETTERS) if letter == text.upper()]
        if text.isdecimal() and not may_be:
            may_be.append(int(text) if len(text) < 4 else len(LETTERS))
        if len(set(may_be)) > 1:
            raise InputError(
                f"{where}: 'answer' {in_one_line(repr(raw), 40)} may be choice "
                f"{' or '.join(map(str, sorted(set(may_be))))} (counting from 0); give the index "
                "as a number"
            )
        index = may_be[0] if may_be else -1
    elif isinstance(raw, int) and not isinstance(raw, bool):
        index = raw
    elif isinstance(raw, float) and raw.is_integer():  # from a column with gaps
        index = int(raw)
    else:
        raise InputError(
            f"{where}: 'answer' is of type {type(raw).__name__}; give the right choice's index, "
            "from 0, or its letter"
        )
    if not 0 <= index < len(choices):
        shown = in_one_line(repr(raw) if abs(index) < 10**40 else "a huge number", 40)
        raise InputError(
            f"{where}: 'answer' {shown} is none of the {len(choices)} choices; give an index from "
            f"0 to {len(choices) - 1}, or a letter"
        )
    return index
