"""Writing of a whole run, and then of its report, whose failure leaves the run's numbers intact."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InterruptedRunError, UnfinishedError, reason_of
from geffect_fast.storage.disk import UNFINISHED
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import MANIFEST, Manifest, Sums, checksums, files_below
from geffect_fast.storage.results_file import write_dataset
from geffect_fast.storage.run_folder import (
    NEXT,
    RESULTS,
    own_files,
    put_in_place,
    staged_run,
    write_config,
)

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter
    from geffect_fast.storage.run_yaml import AnyConfig


def save_run(
    folder: str | Path,
    dataset: xr.Dataset,
    config: AnyConfig,
    overwrite: bool = False,
    report: Reporter | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    sums: Mapping[str, Sums] | None = None,
    *,
    file: str = RESULTS,
) -> Path:
    """Write a result, `run.yaml` and a report into a run folder.

    The result and `run.yaml` are written in full to a hidden folder inside the run folder and then
    renamed, the result last. So a run folder with a result has all its numbers, and an earlier
    failure leaves the folder as it was, with the run that was to be replaced. The report is added
    afterwards.

    Args:
        folder: made where it does not exist; other files in it stay.
        dataset: result of `geffect_fast.profile`, `evaluate`, `control` or `relearn`.
        config: the settings that replay the run.
        overwrite: whether to replace a run that is there.
        report: adds files such as `summary.csv` and `plots/`.
        inputs: as in `check_free`.
        sums: checksums of the files that the run was made from, by option.
        file: name of the result's file, `results.nc` or `evaluation.nc`.

    Returns:
        The absolute path of the folder.

    Raises:
        InputError: as in `check_free`, or the disk refuses.
        UnfinishedError: the report fails; the numbers are written.
    """
    with locked(folder) as path:
        with staged_run(folder, overwrite, inputs, lambda: sums or {}) as staging:
            write_dataset(dataset, staging / file)
            write_config(config, staging)
        add_report(path, dataset, report)
    return path


def add_report(folder: Path, dataset: Any, report: Reporter | None, again: str = "") -> None:
    """Write tables, plots and pages of a run into its folder, and note them in its manifest.

    Args:
        folder: the folder of a run that is whole.
        dataset: the run's result.
        report: writes files into a folder; files that were written before a failure are kept.
        again: the command that writes the report again; empty for `geffect-fast report`.

    Raises:
        UnfinishedError: the report failed. The message gives the reason and the command that writes
            the report again.
        InterruptedRunError: Ctrl-C came.
    """
    if report is None:
        return
    again = again or f"geffect-fast report {folder}"
    try:
        with locked(folder):
            staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
            failure = None
            try:
                try:
                    report(dataset, staging)
                except Exception as error:
                    failure = error
                _put_beside(folder, staging)
                if failure is not None:
                    raise failure
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; the numbers of run folder {folder} are whole, its report is not: "
            f"{again} writes it"
        ) from None
    except Exception as error:  # not only of the disk: no failed report may cost the numbers
        raise UnfinishedError(
            f"the numbers of run folder {folder} are whole, but {reason_of(error)}; {again} writes "
            "that again"
        ) from error


def _put_beside(folder: Path, staging: Path) -> None:
    """Move the files of a report from `staging` into a run folder, and update its manifest."""
    held = Manifest.read(folder)
    if held is None:  # a run of an earlier version: its files are summed as they are now
        files = own_files(folder) - {NEXT, MANIFEST}
        held = Manifest(checksums(folder, sorted(files)))
    written = files_below(staging)
    if written:
        sums = {**held.files, **checksums(staging, written)}
        Manifest(sums, held.inputs).write(staging)
        put_in_place(folder, staging, own_files(folder) & {*files_below(staging)})
