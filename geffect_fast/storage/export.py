"""A result as one long table, in CSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError
from geffect_fast.paths import user_path
from geffect_fast.storage.csv_cells import write_csv
from geffect_fast.storage.disk import unwritable, whole_file
from geffect_fast.storage.tables import effect_tables, measure_tables

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def export(dataset: xr.Dataset, path: str | Path, overwrite: bool = False) -> Path:
    """Write a result as one long table: a row for each G-effect or measure, with its coordinates.

    Args:
        dataset: result of `geffect_fast.profile`, `evaluate`, `open_run` or `open_evaluation`.
        path: ends in `.parquet` or `.csv`.
        overwrite: whether an existing file may be replaced.

    Returns:
        The path of the file, with `~` expanded.

    Raises:
        InputError: the name has another ending, the file exists and `overwrite` is False, pyarrow
            is missing for Parquet, or the disk refuses.
    """
    file = user_path(path)
    suffix = file.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise InputError(f"export {path}: the name must end in .parquet or .csv")
    try:
        taken = not overwrite and file.is_file()
    except OSError as error:
        raise unwritable(f"export {path}", "--to", error) from None
    if taken:
        raise InputError(f"export {path} is there already; choose another --to or use --overwrite")
    with whole_file(f"export {path}", path, "--to") as part:
        tables = measure_tables if "sample_value" in dataset else effect_tables
        pieces = tables(dataset)
        if suffix == ".csv":
            for i, table in enumerate(pieces):
                write_csv(table, part, header=i == 0, mode="a" if i else "w")
        else:
            try:
                _write_parquet(pieces, part)
            except ImportError:
                raise InputError(
                    f"export {path}: Parquet needs pyarrow; pip install pyarrow, or export to .csv"
                ) from None
    return file


def _write_parquet(pieces: Iterable[pd.DataFrame], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for piece in pieces:
            table = pa.Table.from_pandas(piece, preserve_index=False)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
