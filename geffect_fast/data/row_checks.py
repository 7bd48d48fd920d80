"""Checks of the text fields of rows, for rows of every kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geffect_fast.errors import InputError, in_one_line


def missing(value: Any) -> bool:
    """Whether a value stands for a missing one: null, or the NaN that tables write in its place."""
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or type(value).__name__ in ("NAType", "NaTType")
    )


def check_text(row: Mapping[str, Any], field: str, where: str, shape: str | None = None) -> str:
    """The text of a field, checked.

    Args:
        row: the row.
        field: name of the field.
        where: the row's place, for messages.
        shape: `known_shape` of the row, which messages then give in place of their own advice.

    Raises:
        InputError: the field is missing, is no text, is empty, or holds half a surrogate pair.
    """
    if field not in row:
        fields = ", ".join(sorted(in_one_line(repr(key), 40) for key in row)[:6]) or "none"
        advice = shape or "add a non-empty string"
        raise InputError(f"{where} has no '{field}' (its fields: {fields}); {advice}")
    value = row[field]
    if missing(value) and value is not None:
        raise InputError(f"{where}: '{field}' is NaN; fill it in or leave the row out")
    if not isinstance(value, str):
        advice = shape or "make it a string"
        raise InputError(f"{where}: '{field}' is of type {type(value).__name__}; {advice}")
    if not value.strip():
        raise InputError(f"{where}: '{field}' is empty; fill it in or leave the row out")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InputError(f"{where}: '{field}' holds half a surrogate pair; mend its encoding")
    return value
