"""NetCDF-4 files through h5netcdf, with each object of a file opened only once.

h5netcdf looks up an object of a small file a hundred times, and HDF5 opens the object anew each
time, which took most of the time that a small result takes. h5netcdf works on any open file of
h5py, so this module gives it a file that opens an object once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import h5netcdf
import h5py

if TYPE_CHECKING:
    import xarray as xr


class _OpenedOnce(h5py.File):
    """An HDF5 file that keeps every object open once it has been looked up."""

    def __init__(self, file: Path | BinaryIO, mode: str, **more: Any) -> None:
        super().__init__(file, mode, **more)
        self._opened: dict[str, Any] = {}

    def __getitem__(self, name: Any) -> Any:
        if not isinstance(name, str):  # a reference
            return super().__getitem__(name)
        if name == "/":
            return self
        name = name.lstrip("/")
        if name not in self._opened:
            self._opened[name] = super().__getitem__(name)
        return self._opened[name]

    def __delitem__(self, name: str) -> None:
        self._opened.pop(name.lstrip("/"), None)
        super().__delitem__(name)


class _NetCDF(h5netcdf.File):
    """An h5netcdf file that also closes the h5py file it was made from."""

    def __init__(self, hdf5: h5py.File, mode: str, **more: Any) -> None:
        super().__init__(hdf5, mode, **more)
        self._hdf5 = hdf5

    def close(self) -> None:
        super().close()
        self._hdf5.close()


def open_netcdf(file: Path | BinaryIO, mode: Literal["r", "w"]) -> h5netcdf.File:
    """Open a file to read, or to write anew, with h5netcdf's own options; close it after use."""
    if mode == "w":
        return _NetCDF(_OpenedOnce(file, mode, track_order=True), mode)
    more = {"decode_vlen_strings": True, "phony_dims": "access"}
    return _NetCDF(_OpenedOnce(file, mode), mode, **more)


def read_dataset(file: Path, **how: Any) -> xr.Dataset:
    """The dataset in a file, whose numbers are read on access, until `.close()`.

    Args:
        file: NetCDF-4.
        how: options of `xarray.open_dataset`.

    Raises:
        Exception: of many kinds, from deep in HDF5, where the file is torn.
    """
    import xarray as xr

    # The dataset can be pickled: the process that unpickles it opens the file again.
    opened = xr.backends.CachingFileManager(open_netcdf, file, mode="r")
    return xr.open_dataset(xr.backends.H5NetCDFStore(opened), **how)
