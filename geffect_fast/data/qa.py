"""Reading question-answer sets and refusals from wherever the user keeps them."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from geffect_fast.data.batch import IGNORE
from geffect_fast.data.files import check_regular, folder_kind, no_data
from geffect_fast.data.row_shapes import known_shape, known_turns
from geffect_fast.errors import InputError

Source = Any
"""A path, a Hugging Face data set id, or an iterable (list, torch Dataset) of dicts."""

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[^:]*))?(:(?P<split>[^:]*))?")
_MAX_ID = 2**31
_FILE_SUFFIXES = {".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet", ".gz", ".zip"}
_FILE_REMEDY = "give a file of JSON lines, each with 'question' and 'answer', or one JSON array"


def read_rows(source: Source, *, name: str) -> list[dict[str, Any]]:
    """Read and check a question-answer set; rows keep their order and their other fields.

    Args:
        source: path of a `.json` or `.jsonl` file (JSON lines, or one array); a Hugging Face data
            set id, `org/name`, `org/name:config` or `org/name:config:split`; or an iterable or
            torch Dataset of dicts. A row is text (`question`, `answer`, optional `alternative`, one
            or a list of them), or tokenised (`input_ids`, unshifted `labels` with -100 where
            nothing is learned, both lists, arrays or tensors of shape `(length,)`, optional
            `alternative` of the same two fields, or a list of such). Either may carry `weights`,
            one number of 0 or more for each label token of its answer; then all rows do.
        name: the argument's name, for messages.

    Returns:
        One dict a row; tokenised fields are lists of int, weights lists of float. Rows are counted
        from 0.

    Raises:
        InputError: the set cannot be read, is empty, or a row is unusable.
    """
    rows: list[dict[str, Any]] = []
    for where, raw in _raw_rows(source, name):
        row = _check_row(raw, where)
        if rows and ("input_ids" in row) != ("input_ids" in rows[0]):
            kinds = ("tokenised", "text") if "input_ids" in row else ("text", "tokenised")
            raise InputError(f"{where} is {kinds[0]}, the rows before are {kinds[1]}: use one kind")
        if rows and ("weights" in row) != ("weights" in rows[0]):
            kinds = ("has", "have none") if "weights" in row else ("has no", "have some")
            raise InputError(
                f"{where} {kinds[0]} 'weights', the rows before {kinds[1]}: give all rows some, or "
                "none"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{name}: {_shown(source)} holds no rows; give at least one")
    return rows


def read_refusals(source: Source) -> list[str] | list[dict[str, list[int]]]:
    """Read the refusals that stand in for answers.

    Args:
        source: path of a file of plain lines, one refusal each (TOFU's `idontknow.jsonl` is such a
            file, despite its name), of JSON lines with a field `refusal` or `answer`, or of one
            JSON array; or an iterable of str, or of tokenised sequences (`input_ids`, `labels`),
            one a forget row.

    Returns:
        All text or all tokenised.

    Raises:
        InputError: the source cannot be read, is empty, or an entry is unusable.
    """
    refusals: list[Any] = []
    for where, raw in _raw_refusals(source):
        refusal = _check_refusal(raw, where)
        if refusals and type(refusal) is not type(refusals[0]):
            raise InputError(f"{where} mixes text and tokenised refusals: use one kind")
        refusals.append(refusal)
    if not refusals:
        raise InputError(f"refusals: {_shown(source)} holds none; give at least one sentence")
    return refusals


def row_place(name: str, row: int) -> str:
    """How messages call a row of a set."""
    return f"{name}: row {row} (counting from 0)"


# ---- where rows come from: pairs of (place for messages, raw row) ----


def _raw_rows(source: Source, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(source, str) and not os.path.lexists(source):
        hub = _HUB_ID.fullmatch(source)
        if hub and Path(source).suffix.lower() not in _FILE_SUFFIXES:
            rows = _hub_rows(source, hub, name)
            return _numbered(rows, name, f" of {source!r}")
    if isinstance(source, str | os.PathLike):
        text = _read_text(source, name, _FILE_REMEDY)
        if text.lstrip().startswith("["):
            return _json_array(text, source, name)
        return _json_lines(text, source, name)
    return _numbered(_iterable(source, name), name)


def _raw_refusals(source: Source) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | os.PathLike):
        return _numbered(_iterable(source, "refusals"), "refusals")
    text = _read_text(source, "refusals", "give a file with one refusal a line")
    if text.lstrip().startswith("["):
        return _json_array(text, source, "refusals")
    if text.lstrip().startswith("{"):
        return _json_lines(text, source, "refusals")
    return ((place, line.strip()) for place, line in _lines(text, source, "refusals"))


def _read_text(source: str | os.PathLike[str], name: str, remedy: str) -> str:
    shown = _shown(source)
    try:
        file = Path(source).expanduser()
        check_regular(file, f"{name}: {shown}")
        raw = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{name}: file {shown} does not exist; {remedy}") from None
    except IsADirectoryError:
        holds = folder_kind(file)
        what = f"a directory; {remedy}" if holds is None else f"a directory {holds}"
        raise InputError(f"{name}: {shown} is {what}") from None
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot read {shown} ({_one_line(reason)}); {remedy}") from None
    if found := no_data(raw[:512]):
        raise InputError(f"{name}: {shown} is {found[0]}; {found[1]}; {remedy}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{name}: line {line} of {shown} is not UTF-8; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str, source: Any, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{name}: line {number} of {_shown(source)}", line


def _json_lines(text: str, source: Any, name: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(text, source, name):
        yield where, _parse(line, where, "put one JSON object on each line")


def _json_array(text: str, source: Any, name: str) -> Iterator[tuple[str, Any]]:
    rows = _parse(text, f"{name}: {_shown(source)}", "mend the JSON array, or use JSON lines")
    return _numbered(rows, name, f" of {_shown(source)}")


def _parse(text: str, where: str, remedy: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        at = f"{line}column {error.colno}"
        raise InputError(f"{where} is malformed JSON ({error.msg}, {at}); {remedy}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where} is unusable JSON ({_one_line(error)}); {remedy}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object; of one that comes twice nobody can say which is meant."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its field {twice!r} comes twice, keep one")
    return fields


def _numbered(rows: Iterable[Any], name: str, origin: str = "") -> Iterator[tuple[str, Any]]:
    return ((row_place(name, i) + origin, row) for i, row in enumerate(rows))


def _iterable(source: Any, name: str) -> Iterable[Any]:
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        raise InputError(
            f"{name}: got a {type(source).__name__} of columns; give its rows, .to_dict('records')"
        )
    if hasattr(source, "to_pylist"):
        raise InputError(f"{name}: got an Arrow {type(source).__name__}; give its .to_pylist()")
    if isinstance(source, Mapping | bytes):
        got = f"type {type(source).__name__}"
        if all(isinstance(key, str) for key in source):
            got += f" with keys {', '.join(map(repr, list(source)[:6]))}"
        raise InputError(f"{name}: got {got}; give a path or a list of rows")
    if hasattr(source, "__iter__"):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[i] for i in range(len(source)))
    raise InputError(f"{name}: got type {type(source).__name__}; give a path or a list of rows")


def _hub_rows(source: str, hub: re.Match[str], name: str) -> Iterable[Any]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"{name}: no file {source!r}; if it is a Hugging Face data set: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(hub["id"], hub["config"] or None, split=hub["split"] or None)
    except Exception as error:  # the library lets through errors of several network packages
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise InputError(
            f"{name}: no file {source!r}, and as a Hugging Face data set it cannot be loaded "
            f"({reason}); check the id and the network, or give a file"
        ) from None
    if not isinstance(loaded, Mapping):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    ids = ", ".join(f"'{hub['id']}:{hub['config'] or ''}:{split}'" for split in loaded)
    raise InputError(f"{name}: data set {source!r} has several splits; give one of {ids}")


# ---- what a row may be ----


def _check_row(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        shape = known_turns(raw)
        raise InputError(
            f"{where} is of type {type(raw).__name__}, not an object with 'question' and 'answer'"
            + (f"; {shape}" if shape else "")
        )
    row = dict(raw)
    if "input_ids" in row or "labels" in row:
        row.update(_check_tokens(row, where))
    else:
        for field in ("question", "answer"):
            _check_text(row, field, where, known_shape(row))
    if row.get("alternative") is not None:
        row["alternative"] = _check_alternatives(row["alternative"], "input_ids" in row, where)
    if row.get("weights") is None:
        row.pop("weights", None)
    else:
        row["weights"] = _check_weights(row, where)
    return row


def _check_alternatives(raw: Any, tokenised: bool, where: str) -> Any:
    """What a row gives in place of its answer: one, or a list of at least one."""
    if isinstance(raw, list | tuple):
        if not raw:
            raise InputError(f"{where}: 'alternative' is an empty list; fill it in or leave it out")
        return [_check_alternative(one, tokenised, where) for one in raw]
    return _check_alternative(raw, tokenised, where)


def _check_alternative(raw: Any, tokenised: bool, where: str) -> str | dict[str, list[int]]:
    if tokenised:
        return _check_tokens(raw, f"{where}, 'alternative'")
    return _check_text({"alternative": raw}, "alternative", where)


def _check_refusal(raw: Any, where: str) -> str | dict[str, list[int]]:
    if isinstance(raw, str):
        return _check_text({"refusal": raw}, "refusal", where)
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} is of type {type(raw).__name__}; a refusal is a sentence")
    if "input_ids" in raw or "labels" in raw:
        return _check_tokens(raw, where)
    return _check_text(raw, "refusal" if "refusal" in raw else "answer", where)


def _check_text(row: Mapping[str, Any], field: str, where: str, shape: str | None = None) -> str:
    """The text of a field; `shape` is what is known of a row that has none."""
    if field not in row:
        fields = ", ".join(sorted(_one_line(repr(key), 40) for key in row)[:6]) or "none"
        advice = shape or "add a non-empty string"
        raise InputError(f"{where} has no '{field}' (its fields: {fields}); {advice}")
    value = row[field]
    if not isinstance(value, str):
        advice = shape or "make it a string"
        raise InputError(f"{where}: '{field}' is of type {type(value).__name__}; {advice}")
    if not value.strip():
        raise InputError(f"{where}: '{field}' is empty; fill it in or leave the row out")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InputError(f"{where}: '{field}' holds half a surrogate pair; mend its encoding")
    return value


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
    """A field of numbers, be it a list, an array or a tensor, as a list of Python's own."""
    if field not in raw:
        raise InputError(f"{where} has no '{field}'; tokenised rows need 'input_ids' and 'labels'")
    value = raw[field]
    try:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple):
            return [item.item() if hasattr(item, "item") else item for item in value]
    except (RuntimeError, ValueError) as error:  # a tensor without numbers, or a list of vectors
        raise InputError(
            f"{where}: '{field}' cannot be read ({_one_line(error)}); give {wanted}"
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
                f"{where}: 'weights' holds {_one_line(item)}; give finite numbers of 0 or more, "
                "0 for a token to leave alone"
            )
    return list(map(float, value))


def _shown(source: Any) -> str:
    if not isinstance(source, str | os.PathLike):
        return "the data set"
    text = repr(os.fspath(source))
    return text if len(text) <= 200 else f"{text[:200]}..."


def _one_line(error: object, longest: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[:longest]}..."
