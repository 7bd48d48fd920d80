"""Result files: one result as compressed, sealed NetCDF-4, in memory or read on access.

The module knows nothing of run folders: `geffect_fast.storage.run_folder` finds a run's file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError, in_one_line
from geffect_fast.results.form import check_form, check_size
from geffect_fast.storage.disk import DiskFile, whole_file
from geffect_fast.storage.seal import seal

if TYPE_CHECKING:
    import xarray as xr

COMPRESSION = {"compression": "gzip", "compression_opts": 4, "shuffle": True}

_JSON_ATTRS = "json_attrs"


def read_result(file: Path, *, lazy: bool = False) -> xr.Dataset:
    """The result in a file, loaded into memory with the file closed again.

    Args:
        file: an existing file, whose checksum the caller has checked.
        lazy: whether numbers are read from the file on access, until `.close()`.

    Raises:
        InputError: the file is torn, or is not a result of this package.
    """
    import xarray as xr

    from geffect_fast.storage.netcdf import read_dataset

    try:
        check_size(file)
        dataset = read_dataset(file, decode_cf=not lazy)
        if lazy:
            dataset = xr.decode_cf(_with_lazy_texts(dataset))
    except InputError:
        raise
    except Exception as error:  # a torn file fails in many ways, deep in HDF5
        raise torn(file, error) from error
    try:
        dataset.attrs = plain_attrs(dataset.attrs)
        ours = {"g_effect", "risk_value", "loss"} <= set(dataset.data_vars)
        dims = [dim for dim in dataset["g_effect"].dims if dim != "step"] if ours else []
        ours = dims[:2] == ["objective", "risk"]
    except (ValueError, TypeError, KeyError, RecursionError):  # from attributes of no known form
        ours = False
    if not ours:
        dataset.close()
        raise InputError(f"{file} holds no G-effect", remedy="give a file written by geffect_fast")
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
        raise torn(file, error) from error


def _with_lazy_texts(raw: xr.Dataset) -> xr.Dataset:
    """The dataset before decoding, changed so that decoding leaves its texts in the file.

    By default xarray reads all texts when it decodes them, and gives each the room of the longest.
    Texts that are dimension coordinates stay as they are.
    """
    for name, variable in raw.variables.items():
        if variable.dtype == object and name not in raw.dims:
            variable.encoding.pop("dtype", None)
    return raw


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Context for reads from a lazily opened result, where a file torn in the middle shows late.

    Raises:
        InputError: the file is torn.
    """
    try:
        yield
    except OSError as error:
        raise torn(file, error) from error


def torn(file: str | Path, error: Exception) -> InputError:
    """The error for a file that cannot be read to its end."""
    reason = in_one_line(error, 120)
    return InputError(f"{file} is torn or not NetCDF ({reason})", remedy="repeat the run")


def save_result(dataset: xr.Dataset, file: Path) -> None:
    """Write a result as a single file, which replaces an existing one.

    Raises:
        InputError: the disk refuses; an existing file is unchanged.
    """
    with whole_file(f"result {file}", file, "folder") as part:
        write_dataset(dataset, part)


def write_dataset(dataset: xr.Dataset, file: Path) -> None:
    """Write a result as compressed, sealed NetCDF-4; raise `OSError` where the disk refuses."""
    from geffect_fast.storage.netcdf import open_netcdf

    with DiskFile(file) as disk:
        try:
            with open_netcdf(disk, "w") as h5:
                store_in(h5, dataset)
        finally:
            disk.check()  # also where HDF5 fails because an earlier write was lost
    seal(file)


def store_in(h5: Any, dataset: xr.Dataset) -> None:
    """Write a dataset into an open h5netcdf file, with compression."""
    import xarray as xr

    encoding = {name: COMPRESSION for name in dataset.data_vars if dataset[name].ndim}
    _encoded(dataset).dump_to_store(xr.backends.H5NetCDFStore(h5), encoding=encoding)


def _encoded(dataset: xr.Dataset) -> xr.Dataset:
    """A copy of the dataset in which attributes without a NetCDF type are JSON texts."""
    encoded = dataset.copy()
    as_json = [k for k, v in dataset.attrs.items() if type(v) not in (str, int, float)]
    for key in as_json:
        encoded.attrs[key] = json.dumps(dataset.attrs[key])
    encoded.attrs[_JSON_ATTRS] = json.dumps(as_json)
    return encoded


def plain_attrs(attrs: dict[Any, Any]) -> dict[Any, Any]:
    """Attributes as they were before writing: Python numbers for numpy scalars, values for JSON."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in attrs.items()}
    for key in json.loads(plain.pop(_JSON_ATTRS, "[]")):
        plain[key] = json.loads(plain[key])
    return plain
