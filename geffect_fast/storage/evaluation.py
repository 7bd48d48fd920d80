"""Run folders of `evaluate`, `control` and `relearn`, whose measures are in `evaluation.nc`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError
from geffect_fast.paths import is_there, user_path
from geffect_fast.results.form import check_size
from geffect_fast.storage.lock import restored
from geffect_fast.storage.manifest import check_file
from geffect_fast.storage.results_file import plain_attrs, torn
from geffect_fast.storage.run_folder import EVALUATION

if TYPE_CHECKING:
    import xarray as xr

_ADVICE = "give a folder made by evaluate, control or relearn"


def holds_evaluation(folder: str | Path) -> bool:
    """Whether a path is that of a run folder with measures, or of an `evaluation.nc`."""
    path = user_path(folder)
    try:
        return path.name == EVALUATION or is_there(path / EVALUATION)
    except OSError:  # the code that reads the path reports the error
        return False


def open_evaluation(folder: str | Path) -> xr.Dataset:
    """The measures in a run folder, loaded into memory with the file closed again.

    Args:
        folder: a run folder, or an `evaluation.nc` itself.

    Raises:
        InputError: the folder holds no measures, or the file is damaged.
    """
    from geffect_fast.storage.netcdf import read_dataset

    path = user_path(folder)
    try:
        restored(path)
        file = path / EVALUATION if path.is_dir() else path
        if not is_there(file):
            raise InputError(f"{folder} holds no {EVALUATION}; {_ADVICE}")
        if file.name == EVALUATION:
            check_file(file.parent, EVALUATION)
        check_size(file)
        with read_dataset(file) as dataset:
            loaded = dataset.load()
        loaded.attrs = plain_attrs(loaded.attrs)
    except InputError:
        raise
    except Exception as error:  # a torn file fails in many ways, deep in HDF5
        raise torn(folder, error) from error
    if not {"value", "sample_value"} <= set(loaded.data_vars):
        raise InputError(f"{folder} holds no measures; {_ADVICE}")
    return loaded
