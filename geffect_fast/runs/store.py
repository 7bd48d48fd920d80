"""Run folders: results, the config that replays them, a report; never half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.data.files import check_regular
from geffect_fast.errors import InputError
from geffect_fast.runs.config import ProfileConfig, dump_config
from geffect_fast.runs.csv_cells import write_csv
from geffect_fast.runs.disk import (
    UNFINISHED,
    DiskFile,
    folder_for,
    is_there,
    set_aside,
    unwritable,
    user_path,
    whole_file,
)
from geffect_fast.runs.result_form import check_form, check_size

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

RESULTS = "results.nc"
CONFIG = "run.yaml"
SUMMARY = "summary.csv"
PLOTS = "plots"
TOKENS = "tokens.html"
REPORT = "report.html"
STEPS = "steps"
"""The folder of step files in the run folder of a run of several steps."""
RUN_FILES = (RESULTS, CONFIG, SUMMARY, PLOTS, TOKENS, REPORT)

_JSON_ATTRS = "json_attrs"

COMPRESSION = {"compression": "gzip", "compression_opts": 4, "shuffle": True}

Reporter = Callable[["xr.Dataset", Path], None]
"""Writes what people look at (tables, plots) into a folder."""


def check_free(folder: str | Path, overwrite: bool = False) -> Path:
    """The run folder, if results may be written there; touches nothing.

    Raises:
        InputError: it is a file, cannot be written to, or holds a run and `overwrite` is False.
    """
    path = user_path(folder).absolute()
    try:
        existing = next(p for p in (path, *path.parents) if is_there(p))
    except OSError as error:
        raise unwritable(f"run folder {folder}", "--out", error) from None
    if not existing.is_dir():
        raise InputError(f"run folder {folder}: {existing} is a file; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"run folder {folder}: {existing} is not writable; choose another --out")
    held = [name for name in RUN_FILES if is_there(path / name)]
    if held and not overwrite:
        raise InputError(
            f"run folder {folder} already holds {held[0]}; choose another --out or use --overwrite"
        )
    return path


def save_run(
    folder: str | Path,
    dataset: xr.Dataset,
    config: ProfileConfig,
    overwrite: bool = False,
    report: Reporter | None = None,
) -> Path:
    """Write `results.nc`, `run.yaml` and a report into a run folder.

    Everything is written in full to a hidden folder inside and then renamed, `results.nc` last: a
    run folder with `results.nc` is complete, and a failure at any point leaves what was there
    before, a run that was to be replaced included.

    Args:
        folder: made where it does not exist; other files in it stay.
        dataset: result of `geffect_fast.profile`.
        config: what replays it.
        overwrite: whether to replace a run that is there.
        report: adds files such as `summary.csv` and `plots/`.

    Returns:
        The absolute path of the folder.

    Raises:
        InputError: as `check_free`, or the disk refuses.
    """
    with staged_run(folder, overwrite) as staging:
        write_dataset(dataset, staging / RESULTS)
        write_rest(staging, dataset, config, report)
    return user_path(folder).absolute()


def write_rest(
    staging: Path, dataset: xr.Dataset, config: ProfileConfig, report: Reporter | None
) -> None:
    """Write all of a run but its result: `run.yaml` and the report."""
    (staging / CONFIG).write_text(dump_config(config), encoding="utf-8")
    if report is not None:
        report(dataset, staging)


@contextmanager
def staged_run(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder in a run folder; what is written to it appears when the block ends well.

    Raises:
        InputError: as `save_run`.
    """
    path = check_free(folder, overwrite)
    with folder_for(f"run folder {folder}", path):
        staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path))
        try:
            yield staging
            items = sorted(staging.iterdir(), key=lambda p: p.name == RESULTS)
            with set_aside(path, {*RUN_FILES, *(item.name for item in items)}):
                for item in items:
                    item.rename(path / item.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def open_run(folder: str | Path, *, lazy: bool = False) -> xr.Dataset:
    """The result of a run, loaded into memory with the file closed again.

    Args:
        folder: a run folder, or a `.nc` file itself.
        lazy: read from the file what is asked for when it is asked for, until `.close()`: for
            results by position that do not fit in memory.

    Raises:
        InputError: there is no complete result there, or it is not one of this package.
    """
    import xarray as xr

    file = _result_of(folder)
    try:
        check_size(file)
        dataset = xr.open_dataset(file, engine="h5netcdf")
    except InputError:
        raise
    except Exception as error:  # a torn file fails in many ways, deep in HDF5
        raise _torn(file, error) from error
    try:
        dataset.attrs = _plain_attrs(dataset.attrs)
        ours = {"g_effect", "risk_value", "loss"} <= set(dataset.data_vars)
        dims = [dim for dim in dataset["g_effect"].dims if dim != "step"] if ours else []
        ours = dims[:2] == ["objective", "risk"]
    except ValueError:
        ours = False
    if not ours:
        dataset.close()
        raise InputError(f"{file} holds no G-effect; give a file written by geffect_fast")
    try:
        check_form(dataset, file)
        if lazy:
            return dataset
        with dataset:
            return dataset.load()
    except Exception as error:  # as above
        dataset.close()
        if isinstance(error, InputError):
            raise
        raise _torn(file, error) from error


def _result_of(folder: str | Path) -> Path:
    """The result's file in a run folder, or the file itself; raise `InputError` without one."""
    path = user_path(folder)
    try:
        file = path / RESULTS if path.is_dir() else path
        if is_there(file):
            check_regular(file, f"result {file}")
            return file
        if not is_there(path):
            raise InputError(f"run folder {folder} does not exist; give a folder made by profile")
    except OSError as error:
        raise InputError(
            f"run folder {folder} cannot be read: {error.strerror}; give a folder made by profile"
        ) from None
    torn = any(path.glob(f"{UNFINISHED}*")) or (path / CONFIG).exists()
    reason = "its run did not finish" if torn else "it is not a run folder"
    advice = "go on with --resume" if (path / STEPS).is_dir() else "run profile again"
    raise InputError(f"run folder {folder} holds no {RESULTS}: {reason}; {advice}")


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Reads from a result opened lazily; a file torn in the middle shows only then.

    Raises:
        InputError: it is.
    """
    try:
        yield
    except OSError as error:
        raise _torn(file, error) from error


def _torn(file: str | Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return InputError(f"{file} is torn or not NetCDF ({reason}); run profile again")


def export(dataset: xr.Dataset, path: str | Path) -> Path:
    """Write a result as one long table: a row a G-effect, its coordinates beside it.

    Args:
        dataset: result of `geffect_fast.profile` or `open_run`.
        path: ends in `.parquet` or `.csv`.

    Raises:
        InputError: another ending, no pyarrow for Parquet, or the disk refuses.
    """
    file = user_path(path)
    suffix = file.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise InputError(f"export {path}: the name must end in .parquet or .csv")
    with whole_file(f"export {path}", path, "--to") as part:
        if suffix == ".csv":
            for i, table in enumerate(tables(dataset)):
                write_csv(table, part, header=i == 0, mode="a" if i else "w")
        else:
            try:
                _write_parquet(tables(dataset), part)
            except ImportError:
                raise InputError(
                    f"export {path}: Parquet needs pyarrow; pip install pyarrow, or export to .csv"
                ) from None
    return file


def tables(dataset: xr.Dataset) -> Iterator[pd.DataFrame]:
    """The long table that `export` writes, piece by piece: coordinates, then `g_effect`.

    An objective a piece; by sample and position a sample of an objective, without the positions
    beyond its end.
    """
    whole = dataset["g_effect"]
    names = [str(name) for name in whole.dims]
    names += [str(name) for name in whole.coords if name not in whole.dims]
    by_token = "token_id" in whole.coords
    samples = [[row] for row in range(whole.sizes["sample"])] if by_token else [slice(None)]
    for at in range(whole.sizes["objective"]):
        for sample in samples:
            effect = whole.isel(objective=[at])
            effect = effect.isel(sample=sample) if by_token else effect
            with reading(dataset.encoding.get("source", "the result")):
                table = effect.to_dataframe().reset_index()
            if by_token:
                table = table[table["token_id"] >= 0]
            yield table[[*names, "g_effect"]]


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


def save_result(dataset: xr.Dataset, file: Path) -> None:
    """Write a result alone, in place of a file that is there.

    Raises:
        InputError: the disk refuses, and the file is as it was.
    """
    with whole_file(f"result {file}", file, "folder") as part:
        write_dataset(dataset, part)


def write_dataset(dataset: xr.Dataset, file: Path) -> None:
    """Write a result as NetCDF-4 with compression; raises `OSError` where the disk refuses."""
    import h5netcdf

    encoding = {name: COMPRESSION for name in dataset.data_vars if dataset[name].ndim}
    with DiskFile(file) as disk:
        try:
            with h5netcdf.File(disk, "w") as h5:
                store_in(h5, dataset, encoding)
        finally:
            disk.check()  # also where HDF5 misses what it could not write


def store_in(h5: Any, dataset: xr.Dataset, encoding: dict[Any, Any] | None = None) -> None:
    """Write a dataset into an open file of h5netcdf."""
    import xarray as xr

    _encoded(dataset).dump_to_store(xr.backends.H5NetCDFStore(h5), encoding=encoding)


def _encoded(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with attributes that NetCDF has no type for written as JSON."""
    encoded = dataset.copy()
    as_json = [k for k, v in dataset.attrs.items() if type(v) not in (str, int, float)]
    for key in as_json:
        encoded.attrs[key] = json.dumps(dataset.attrs[key])
    encoded.attrs[_JSON_ATTRS] = json.dumps(as_json)
    return encoded


def _plain_attrs(attrs: dict[Any, Any]) -> dict[Any, Any]:
    """Attributes as they were before writing: numpy scalars to Python's, JSON to values."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in attrs.items()}
    for key in json.loads(plain.pop(_JSON_ATTRS, "[]")):
        plain[key] = json.loads(plain[key])
    return plain
