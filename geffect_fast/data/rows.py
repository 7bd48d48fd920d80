"""Reading of data sets and refusals, with a check of every row.

Files and other sources are read by `geffect_fast.data.containers`; the kinds of rows are those of
`geffect_fast.data.row_kinds`. A row keeps all its fields. The fields of its kind are checked and
brought into the form of `row_kinds`; all others stay as they are in the data. `tokenize_rows` hands
the fields on with each sample (`Sample.fields`), so that a metric of TOFU's `perturbed_answer`
finds it there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from geffect_fast.data.batch import IGNORE
from geffect_fast.data.choices import checked_choice
from geffect_fast.data.containers import open_rows, refusals_of
from geffect_fast.data.conversations import checked_conversation, is_turns
from geffect_fast.data.files import shown
from geffect_fast.data.row_checks import check_text, missing
from geffect_fast.data.row_kinds import CALLED, RowKind, known_shape, row_kind
from geffect_fast.errors import InputError, in_one_line

Source = Any
"""A path, a Hugging Face data set id, a table, or an iterable (list, torch Dataset) of rows."""

_MAX_ID = 2**31


def read_rows(
    source: Source,
    *,
    name: str,
    data_format: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Read and check a data set; rows keep their order and their other fields.

    Args:
        source: path of a file (a JSON list, or an object that holds one; JSON lines; CSV or TSV,
            MMLU's without names of columns too; Parquet; plain text; any of them but Parquet in a
            gzip) or of a folder saved by `datasets`; a Hugging Face data set id, `org/name`,
            `org/name:config` or `org/name:config:split`; a table of pandas, pyarrow or datasets; or
            an iterable or torch Dataset of rows. The kinds of rows are those of
            `geffect_fast.data.row_kinds`. In addition, ShareGPT's `conversations` and bare lists of
            turns become `messages`, bare strings become `text`, and columns `A`, `B` ... become
            `choices`. Tokenised fields are lists, arrays or tensors of shape `(length,)`; `labels`
            are unshifted, with -100 where nothing is learned. A row may have a field `alternative`,
            one or a list of them, text or tokenised like the row itself. A row may have a field
            `weights`, one number of 0 or more for each label token of its answer; all rows have
            `weights`, or none.
        name: the argument's name, for messages.
        data_format: format of a file: `auto`, by its content, or `json`, `jsonl`, `csv`, `tsv`,
            `parquet`, `text`.
        tell: called with one line that says what was found.

    Returns:
        One dict for each row, all of one kind; tokenised fields are lists of int, weights lists of
        float. Messages count rows from 0.

    Raises:
        InputError: the set cannot be read, is empty, or a row is unusable.
    """
    rows: list[dict[str, Any]] = []
    container, found = open_rows(source, name, data_format)
    for where, raw in found:
        row = _check_row(raw, where)
        kinds: list[RowKind] = [row_kind(row), row_kind(rows[0] if rows else row)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{where} is of another kind ({CALLED[kinds[0]]}) than the rows before "
                f"({CALLED[kinds[1]]}); use one kind"
            )
        if rows and ("weights" in row) != ("weights" in rows[0]):
            has = ("has", "have none") if "weights" in row else ("has no", "have some")
            raise InputError(
                f"{where} {has[0]} 'weights', the rows before {has[1]}: give all rows some, or none"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{name}: {shown(source)} holds no rows; give at least one")
    if tell is not None and container:
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        tell(f"{name}: {count} of {CALLED[row_kind(rows[0])]} ({container})")
    return rows


def read_refusals(source: Source) -> list[str] | list[dict[str, list[int]]]:
    """Read the refusals that take the place of answers.

    Args:
        source: path of a file of plain lines, one refusal each (TOFU's `idontknow.jsonl` is such a
            file, despite its name), of JSON lines with a field `refusal` or `answer`, of one JSON
            array, or of Parquet; or an iterable of str, or of tokenised sequences (`input_ids`,
            `labels`), one for each forget row.

    Returns:
        The refusals, all of them text or all tokenised.

    Raises:
        InputError: the source cannot be read, is empty, or an entry is unusable.
    """
    refusals: list[Any] = []
    for where, raw in refusals_of(source):
        refusal = _check_refusal(raw, where)
        if refusals and type(refusal) is not type(refusals[0]):
            raise InputError(f"{where} mixes text and tokenised refusals: use one kind")
        refusals.append(refusal)
    if not refusals:
        raise InputError(f"refusals: {shown(source)} holds none; give at least one sentence")
    return refusals


# ---- what a row may be ----


def _check_row(raw: Any, where: str) -> dict[str, Any]:
    if isinstance(raw, str):
        raw = {"text": raw}
    elif is_turns(raw):
        raw = {"messages": raw}
    elif not isinstance(raw, Mapping):
        raise InputError(
            f"{where} is of type {type(raw).__name__}, not an object with 'question' and 'answer'; "
            "make it one, or leave it out"
        )
    row = dict(raw)
    kind = row_kind(row)
    if kind == "tokens":
        row.update(_check_tokens(row, where))
    elif kind == "chat":
        row.update(checked_conversation(row, where))
    elif kind == "choice":
        row.update(checked_choice(row, where))
    else:
        for field in {"text": ("text",), "continuation": ("prompt", "gt")}.get(
            kind, ("question", "answer")
        ):
            check_text(row, field, where, known_shape(row))
    for optional in ("alternative", "weights"):
        if missing(row.get(optional)):
            row.pop(optional, None)
    if "alternative" in row:
        row["alternative"] = _check_alternatives(row["alternative"], kind == "tokens", where)
    if "weights" in row:
        row["weights"] = _check_weights(row, where)
    return row


def _check_alternatives(raw: Any, tokenised: bool, where: str) -> Any:
    """A row's field `alternative`, checked: one alternative, or a list of at least one."""
    if isinstance(raw, list | tuple):
        if not raw:
            raise InputError(f"{where}: 'alternative' is an empty list; fill it in or leave it out")
        return [_check_alternative(one, tokenised, where) for one in raw]
    return _check_alternative(raw, tokenised, where)


def _check_alternative(raw: Any, tokenised: bool, where: str) -> str | dict[str, list[int]]:
    if tokenised:
        return _check_tokens(raw, f"{where}, 'alternative'")
    return check_text({"alternative": raw}, "alternative", where)


def _check_refusal(raw: Any, where: str) -> str | dict[str, list[int]]:
    if isinstance(raw, str):
        return check_text({"refusal": raw}, "refusal", where)
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} is of type {type(raw).__name__}; a refusal is a sentence")
    if "input_ids" in raw or "labels" in raw:
        return _check_tokens(raw, where)
    return check_text(raw, "refusal" if "refusal" in raw else "answer", where)


def _check_tokens(raw: Any, where: str) -> dict[str, list[int]]:
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} is of type {type(raw).__name__}; give 'input_ids' and 'labels'")
    ids, labels = (_check_ids(raw, field, where) for field in ("input_ids", "labels"))
    if len(ids) != len(labels):
        raise InputError(
            f"{where}: {len(ids)} 'input_ids' but {len(labels)} 'labels'; give one label a token"
        )
    if not ids:
        raise InputError(f"{where}: 'input_ids' is empty; leave the row out")
    if bad := [i for i in ids if not 0 <= i < _MAX_ID]:
        raise InputError(f"{where}: 'input_ids' holds {bad[0]}; token ids start at 0")
    if bad := [i for i in labels if not 0 <= i < _MAX_ID and i != IGNORE]:
        raise InputError(
            f"{where}: 'labels' holds {bad[0]}; use a token id, or {IGNORE} for 'not learned'"
        )
    if all(label == IGNORE for label in labels[1:]):
        raise InputError(
            f"{where}: 'labels' has nothing to learn after the first token; "
            f"label the answer's tokens (unshifted, {IGNORE} elsewhere)"
        )
    if "attention_mask" in raw and not all(_listed(raw, "attention_mask", where)):
        raise InputError(
            f"{where}: 'attention_mask' marks padding; drop the padded tokens, samples are packed"
        )
    return {"input_ids": ids, "labels": labels}


def _check_ids(raw: Mapping[str, Any], field: str, where: str) -> list[int]:
    items = _listed(raw, field, where)
    if items and all(isinstance(item, bool) for item in items):
        raise InputError(
            f"{where}: '{field}' is a boolean mask; give token ids, and {IGNORE} as the label of "
            "those that are not learned"
        )
    for item in items:
        if not isinstance(item, int) or isinstance(item, bool):
            raise InputError(
                f"{where}: '{field}' holds type {type(item).__name__}; give a flat list of ids"
            )
    return items


def _listed(
    raw: Mapping[str, Any], field: str, where: str, wanted: str = "a flat list of ids"
) -> list[Any]:
    """A field of numbers, given as a list, an array or a tensor, as a list of Python numbers."""
    if field not in raw:
        raise InputError(f"{where} has no '{field}'; tokenised rows need 'input_ids' and 'labels'")
    value = raw[field]
    try:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple):
            return [item.item() if hasattr(item, "item") else item for item in value]
    except (RuntimeError, ValueError) as error:  # a tensor without numbers, or a list of vectors
        raise InputError(
            f"{where}: '{field}' cannot be read ({in_one_line(error)}); give {wanted}"
        ) from None
    raise InputError(f"{where}: '{field}' is of type {type(value).__name__}; give {wanted}")


def _check_weights(raw: Mapping[str, Any], where: str) -> list[float]:
    value = _listed(raw, "weights", where, "a list of numbers, one a label token of its answer")
    for item in value:
        if not isinstance(item, int | float) or isinstance(item, bool):
            raise InputError(
                f"{where}: 'weights' holds type {type(item).__name__}; give a flat list of numbers"
            )
        if not 0 <= item <= sys.float_info.max:
            raise InputError(
                f"{where}: 'weights' holds {in_one_line(item)}; give finite numbers of 0 or more, "
                "0 for a token to leave alone"
            )
    return list(map(float, value))
