"""Containers of rows: files of every format, folders, hub ids, tables and lists in memory.

A container gives raw rows one after the other, each with its place for messages, and names itself
in a few words. It does not know what a row may be. A file's format is found by its content; only
for text that could be of any format does the file's name decide.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from geffect_fast.data.files import DataFile, reading, shown
from geffect_fast.data.json_files import is_document, json_document, json_lines
from geffect_fast.data.row_kinds import FIELDS, MMLU_COLUMNS, makes_row, row_place
from geffect_fast.errors import InputError, in_one_line

Found = Iterator[tuple[str, Any]]
"""Raw rows, each with its place for messages."""

FORMATS = {
    "json": "a JSON document",
    "jsonl": "JSON lines",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "text": "plain text",
}
"""Formats that may be given for a file, with the words for each in messages."""

REMEDY = (
    "give a file of JSON lines, each with 'question' and 'answer', or another of the formats in "
    "docs/data.md"
)
_SEPARATORS = {"csv": ",;", "tsv": "\t"}
_ENDINGS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".txt": "text", ".text": "text"}
_FILE_ENDINGS = {".json", ".jsonl", ".ndjson", ".parquet", ".gz", ".zip", *_ENDINGS}
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(:(?P<config>[^:]*))?(:(?P<split>[^:]*))?")
_TABLE_CELLS = 2**31 - 1
"""Most characters of a cell; Python's own limit of 131,072 is less than a chapter."""


def open_rows(source: Any, name: str, data_format: str = "auto") -> tuple[str, Found]:
    """The name of a source's container (empty if in memory), and its raw rows.

    Args:
        source: a path, a hub id, a table or an iterable of rows.
        name: the argument's name, for messages.
        data_format: the format of a file: `auto`, or one of `FORMATS`.

    Raises:
        InputError: there is no such source, or it is damaged; also raised while rows are read.
    """
    if not isinstance(source, str | os.PathLike):
        return "", _numbered(_in_memory(source, name), name)
    if isinstance(source, str) and not os.path.lexists(source):
        hub = _HUB_ID.fullmatch(source)
        if hub and Path(source).suffix.lower() not in _FILE_ENDINGS:
            rows = _hub_rows(source, hub, name)
            return "a data set of the hub", _numbered(rows, name, f" of {source!r}")
    with reading(name, source, REMEDY):
        folder = Path(source).expanduser()
        is_folder = folder.is_dir()
    if is_folder:
        return "a folder saved by datasets", _saved_rows(folder, name)
    file = DataFile.found(source, name, REMEDY)
    found = _format_of(file) if data_format == "auto" else data_format
    called = FORMATS[found] + (", a gzip" if file.packed else "")
    if found == "parquet":
        return called, _parquet_rows(file)
    if found == "text":
        return called, _whole_text(file)
    if found in _SEPARATORS:
        return called, _table_rows(file, _separator(file, _SEPARATORS[found]))
    return called, json_document(file) if found == "json" else json_lines(file)


def refusals_of(source: Any) -> Found:
    """Raw refusals of a source: of each line, of each row of JSON or Parquet, or of a list.

    Raises:
        InputError: there is no such source, or it is damaged; also raised while refusals are read.
    """
    if not isinstance(source, str | os.PathLike):
        return _numbered(_in_memory(source, "refusals"), "refusals")
    file = DataFile.found(source, "refusals", "give a file with one refusal a line")
    if file.head[:4] == b"PAR1":
        return _parquet_rows(file)
    begins = file.head_text()[:1]
    if begins in ("[", "{"):
        return json_document(file) if begins == "[" else json_lines(file)
    return _lines(file)


# ---- files ----


def _format_of(file: DataFile) -> str:
    """The format of a file, one of `FORMATS`, found by its beginning and then by its name."""
    if file.head[:4] == b"PAR1":
        return "parquet"
    head, suffixes = file.head_text(), [s.lower() for s in file.path.suffixes[-2:]]
    ending = suffixes[0] if suffixes[1:] == [".gz"] else "".join(suffixes[-1:])
    if head[:1] in ("{", "["):
        return "json" if is_document(head) else "jsonl"
    for kind, separators in _SEPARATORS.items():
        if any(_is_table(head, separator) for separator in separators):
            return kind
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if head and ending in _FILE_ENDINGS:
        raise InputError(
            f"{file.place} begins with {in_one_line(repr(head[:20]), 40)}, so it is neither JSON "
            "nor a table with the columns of a row in its first line; mend it, or say what it is "
            f"with data_format (--data-format {'|'.join(FORMATS)})"
        )
    return "text"


def _records(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=separator, strict=True)


def _is_table(text: str, separator: str) -> bool:
    """Whether a text begins with names of columns that make a row, or with a row as in MMLU."""
    try:
        first = next(_records(text.split("\n"), separator), [])
    except csv.Error:
        return False
    return len(first) > 1 and (makes_row(map(str.strip, first)) or _is_headless(first))


def _is_headless(cells: list[str]) -> bool:
    """Whether this is a row of MMLU's files, which do not name their columns."""
    return len(cells) == len(MMLU_COLUMNS) and cells[-1].strip() in MMLU_COLUMNS[1:-1]


def _separator(file: DataFile, separators: str) -> str:
    head = file.head_text()
    return next((s for s in separators if _is_table(head, s)), separators[0])


def _table_rows(file: DataFile, separator: str) -> Found:
    """Rows of a table: its first line names the columns, unless the file is MMLU's."""
    columns: list[str] | None = None
    with file.text(newline="") as lines:
        for number, cells in _numbered_records(file, lines, separator):
            place = file.line(number)
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = list(MMLU_COLUMNS) if _is_headless(cells) else _columns(cells, place)
                if not _is_headless(cells):
                    continue
            if len(cells) != len(columns):
                raise InputError(
                    f"{place} has {len(cells)} cells, the first line {len(columns)}; put cells "
                    "that hold a separator in double quotes"
                )
            row: dict[str, Any] = dict(zip(columns, cells, strict=True))
            # A table writes an empty cell or NaN for a missing value.
            row |= {field: math.nan for field, cell in row.items() if cell in ("NaN", "nan")}
            yield place, {field: v for field, v in row.items() if field and (v or field in FIELDS)}


def _numbered_records(
    file: DataFile, lines: TextIO, separator: str
) -> Iterator[tuple[int, list[str]]]:
    """The cells of every row, with the number of the line at which the row begins."""
    records: Any = _records(_utf8_lines(file, lines), separator)
    while True:
        number = 1 + records.line_num
        limit = csv.field_size_limit(_TABLE_CELLS)  # for the whole process, so restored at once
        try:
            cells = next(records, None)
        except csv.Error as error:
            raise InputError(
                f"{file.line(number)} is no row of a table ({error}); put cells that hold quotes "
                "or separators in double quotes"
            ) from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield number, cells


def _utf8_lines(file: DataFile, lines: TextIO) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        yield file.check_utf8(line, number)


def _columns(names: Iterable[Any], place: str) -> list[str]:
    """Names of columns; raises `InputError` where a name comes twice."""
    columns = [str(name).strip() for name in names]
    for column in columns:
        if column and columns.count(column) > 1:
            raise InputError(
                f"{place} has the column {in_one_line(repr(column), 40)} twice; rename or drop one"
            )
    return columns


def _parquet_rows(file: DataFile) -> Found:
    if file.packed:
        raise InputError(f"{file.place} is Parquet in a gzip; unpack it")
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"{file.place} is Parquet; pip install 'geffect-fast[parquet]', or write its rows as "
            "JSON lines"
        ) from None
    with file.opened() as opened:
        try:
            table = parquet.ParquetFile(opened)
            _columns(table.schema_arrow.names, file.place)
            batches = table.iter_batches(batch_size=1024)
            yield from _numbered(
                (row for batch in batches for row in batch.to_pylist()), file.name, file.origin
            )
        except (OSError, ValueError, NotImplementedError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{file.place} is damaged Parquet ({in_one_line(error)}); fetch or write it again"
            ) from None


def _lines(file: DataFile) -> Found:
    with file.text() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield file.line(number), file.check_utf8(line, number).strip()


def _whole_text(file: DataFile) -> Found:
    """The one row of a file of plain text."""
    with file.text() as opened:
        text = file.check_utf8(opened.read(), 1)
    if text.strip():
        yield file.place, {"text": text}


# ---- folders and hub ids ----


def _datasets(what: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InputError(f"{what}: pip install 'geffect-fast[datasets]'") from None


def _saved_rows(folder: Path, name: str) -> Found:
    """Rows of a folder that `save_to_disk` made."""
    place = f"{name}: {shown(folder)}"
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise InputError(
            f"{place} holds the splits {', '.join(splits)}; give the folder of one, such as "
            f"{shown(folder / splits[0]) if splits else 'train'}"
        )
    if any(folder.glob("*.parquet")):
        raise InputError(f"{place} is a directory of Parquet files; give one of them")
    if not (folder / "dataset_info.json").is_file():
        raise InputError(f"{place} is a directory; {REMEDY}")
    datasets = _datasets(f"{place} was saved by datasets")
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # from pyarrow, json or datasets
        raise InputError(
            f"{place} is damaged ({type(error).__name__}: {in_one_line(error)}); save it again"
        ) from None
    yield from _numbered(rows, name, f" of {shown(folder)}")


def _hub_rows(source: str, hub: re.Match[str], name: str) -> Iterable[Any]:
    datasets = _datasets(f"{name}: no file {source!r}; if it is a Hugging Face data set")
    try:
        loaded = datasets.load_dataset(hub["id"], hub["config"] or None, split=hub["split"] or None)
    except Exception as error:  # the library lets through errors of several network packages
        raise InputError(
            f"{name}: no file {source!r}, and as a Hugging Face data set it cannot be loaded "
            f"({type(error).__name__}: {in_one_line(error)}); check the id and the network, or "
            "give a file"
        ) from None
    if not isinstance(loaded, Mapping):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    ids = ", ".join(f"'{hub['id']}:{hub['config'] or ''}:{split}'" for split in loaded)
    raise InputError(f"{name}: data set {source!r} has several splits; give one of {ids}")


# ---- in memory ----


def _numbered(rows: Iterable[Any], name: str, origin: str = "") -> Found:
    return ((row_place(name, i) + origin, row) for i, row in enumerate(rows))


def _in_memory(source: Any, name: str) -> Iterable[Any]:
    kind = type(source).__name__
    if hasattr(source, "itertuples") and hasattr(source, "columns"):  # of pandas
        columns = _columns(source.columns, f"{name}: the {kind}")
        cells = source.itertuples(index=False, name=None)
        return (dict(zip(columns, each, strict=True)) for each in cells)
    if hasattr(source, "to_pylist") and hasattr(source, "column_names"):  # of pyarrow
        _columns(source.column_names, f"{name}: the {kind}")
        return (row for batch in source.to_batches(1024) for row in batch.to_pylist())
    if isinstance(source, Mapping) and hasattr(source, "column_names"):  # of datasets
        splits = ", ".join(map(repr, source))
        raise InputError(f"{name}: the {kind} holds the splits {splits}; give one, as in data[...]")
    of_columns = hasattr(source, "columns") and hasattr(source, "to_dict")  # such as polars'
    if isinstance(source, Mapping | bytes) or of_columns:
        got = f"type {kind}"
        if isinstance(source, Mapping) and all(isinstance(key, str) for key in source):
            got += f" with keys {', '.join(map(repr, list(source)[:6]))}"
        raise InputError(f"{name}: got {got}; give a path or a list of rows")
    if hasattr(source, "__iter__"):
        return source
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return (source[i] for i in range(len(source)))
    raise InputError(f"{name}: got type {kind}; give a path or a list of rows")


# ---- writing ----


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write rows as JSON lines, completely or not at all; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
