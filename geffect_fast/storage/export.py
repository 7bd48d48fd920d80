"""A result as one long table, in CSV or Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError
from geffect_fast.paths import user_path
from geffect_fast.results.by_rows import CELLS
from geffect_fast.storage.csv_cells import write_csv
from geffect_fast.storage.disk import unwritable, whole_file
from geffect_fast.storage.evaluation import assessed
from geffect_fast.storage.run_folder import reading

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
        pieces = measures(dataset) if "sample_value" in dataset else tables(dataset)
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


def tables(dataset: xr.Dataset) -> Iterator[pd.DataFrame]:
    """The long table of effects that `export` writes, piece by piece: coordinates, then `g_effect`.

    Rows go objective by objective, then in the order of the other axes. With an axis of tokens or
    positions they go sample by sample within an objective, without the places beyond a sample's
    end.
    """
    whole = dataset["g_effect"]
    names = [str(name) for name in whole.dims]
    names += [str(name) for name in whole.coords if name not in whole.dims]
    by_token = "token_id" in whole.coords
    order = ["objective", *(["sample"] if by_token else [])]
    order += [str(name) for name in whole.dims if name not in order]
    for place in _pieces({name: whole.sizes[name] for name in order}):
        with reading(dataset.encoding.get("source", "the result")):
            table = whole.isel(place).to_dataframe(dim_order=order).reset_index()
        if by_token:
            table = table[table["token_id"] >= 0]
        yield table[[*names, "g_effect"]]


def _pieces(sizes: dict[str, int]) -> Iterator[dict[str, slice]]:
    """Slices that cut an array into pieces of at most `CELLS` cells, the last axis fastest.

    Args:
        sizes: lengths of the axes, by name.
    """
    steps: dict[str, int] = {}
    inner = 1
    for name, n in reversed(sizes.items()):
        steps[name] = max(1, min(n, CELLS // inner))
        inner *= n
    for starts in product(*(range(0, n, steps[name]) for name, n in sizes.items())):
        yield {
            name: slice(at, at + step)
            for (name, step), at in zip(reversed(steps.items()), starts, strict=True)
        }


def measures(dataset: xr.Dataset) -> Iterator[pd.DataFrame]:
    """The long table of measures, one piece for each metric: of data sets, then of their rows.

    For a row of data `statistic` is `row`, and the bounds are empty; for a data set `sample` and
    `question` are empty. The survey's assessment follows as a last piece, where there is one.
    """
    import pandas as pd

    bounds = ["value_low", "value_high"]
    axes = [str(dim) for dim in dataset["value"].dims if dim in ("model", "step")]
    columns = [*axes, "metric", "set", "statistic", "sample", "question", "value", *bounds]
    for at in range(dataset.sizes["metric"]):
        of = dataset.isel(metric=at)
        sets = of[["value", *bounds]].to_dataframe().reset_index().dropna(subset=["value"])
        names = {"sample_set": "set", "sample_value": "value"}
        rows = of["sample_value"].to_dataframe().reset_index().rename(columns=names)
        rows = rows.dropna(subset=["value"]).assign(statistic="row")
        table = pd.concat([sets, rows]).reindex(columns=columns)
        yield table.astype({"sample": "Int64", "question": "string", "value_low": "float64"})
    if "touched" in dataset:
        table = assessed(dataset).reindex(columns=columns)
        yield table.astype({"sample": "Int64", "question": "string"})


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
