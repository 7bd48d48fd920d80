"""A result file that takes effects while they are computed, so they need not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.errors import InputError
from geffect_fast.paths import user_path
from geffect_fast.results.axes import PARAMETER
from geffect_fast.storage.disk import DiskFile, unwritable
from geffect_fast.storage.results_file import COMPRESSION, store_in
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.seal import seal

if TYPE_CHECKING:
    import xarray as xr


class EffectFile:
    """A NetCDF file whose `g_effect` is written sample by sample, and everything else at the end.

    An instance is a context manager. The file appears, whole, once `finish` has been called;
    without that call nothing is left.

    Args:
        file: path that does not exist yet.
        dims: names of the axes, the last two `sample` and `position` or `token`.
        shape: `shape` of `geffect_fast.results.axes.Resolution`.
    """

    def __init__(self, file: str | Path, dims: Sequence[str], shape: tuple[int, ...]) -> None:
        self.file = user_path(file).absolute()
        self.dims = tuple(dims)
        self.shape = shape
        self._has_parameters = len(dims) == len(shape)
        self._part = self.file.with_name(f".{self.file.name}.part")
        if self.file.exists():
            raise InputError(f"out: {file} exists; choose another name")
        if not self.file.parent.is_dir():
            raise InputError(f"out: folder {self.file.parent} does not exist; make it first")

    def __enter__(self) -> EffectFile:
        from geffect_fast.storage.netcdf import open_netcdf

        sizes = [n for at, n in enumerate(self.shape) if at != PARAMETER or self._has_parameters]
        # Effects are written one sample at a time, and sums over positions read one at a time.
        chunks = (1, 1, *sizes[2:-2], 1, sizes[-1])
        try:
            self._disk = DiskFile(self._part)
        except OSError as error:
            raise unwritable(f"out: {self.file}", "file", error) from error
        self._h5 = open_netcdf(self._disk, "w")
        self._h5.dimensions = dict(zip(self.dims, sizes, strict=True))
        self._effect = self._h5.create_variable(
            "g_effect", self.dims, "f8", chunks=chunks, **COMPRESSION
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._h5.close()
        self._disk.close()
        self._part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(f"out: {self.file}", "file", error) from error

    # Callers index with all axes of `shape`; the stored variable may lack that of parameters.

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        found = self._effect[self._own(index)]
        return found if self._has_parameters else np.expand_dims(found, PARAMETER)

    def __setitem__(self, index: tuple[Any, ...], values: np.ndarray) -> None:
        self._effect[self._own(index)] = (
            values if self._has_parameters else values.squeeze(PARAMETER)
        )
        self._disk.check()

    def _own(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        return index if self._has_parameters else (*index[:PARAMETER], *index[PARAMETER + 1 :])

    def finish(self, rest: xr.Dataset) -> xr.Dataset:
        """Write everything but `g_effect`, put the file in its place, and open it.

        Args:
            rest: the result without `g_effect`.

        Returns:
            The result, whose numbers are read from the file on access; close it after use.
        """
        try:
            store_in(self._h5, rest)
            self._h5.close()
        finally:
            self._disk.check()  # also where HDF5 fails because an earlier write was lost
        self._disk.close()
        seal(self._part)
        self._part.rename(self.file)
        return open_run(self.file, lazy=True)
