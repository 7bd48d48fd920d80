"""A report is added to a run whose numbers are in place: whatever fails in it costs only itself."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InterruptedRunError, UnfinishedError, reason_of
from geffect_fast.storage.disk import UNFINISHED
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import MANIFEST, Manifest, checksums, files_below
from geffect_fast.storage.run_folder import NEXT, own_files, put_in_place

if TYPE_CHECKING:
    from geffect_fast.storage.run_folder import Reporter


def add_report(folder: Path, dataset: Any, report: Reporter | None, again: str = "") -> None:
    """Write tables, plots and pages of a run into its folder, and note them in its manifest.

    Args:
        folder: of a run that is whole.
        dataset: its result.
        report: writes files into a folder; those that it has written when it fails are kept.
        again: the command that writes them once more; empty: `geffect-fast report`.

    Raises:
        UnfinishedError: something could not be written; the line names it and says how to get it.
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
    except Exception as error:  # also what is no fault of a disk: nothing here may cost numbers
        raise UnfinishedError(
            f"the numbers of run folder {folder} are whole, but {reason_of(error)}; {again} writes "
            "that again"
        ) from error


def _put_beside(folder: Path, staging: Path) -> None:
    """Put the files of a report beside those of the run."""
    held = Manifest.read(folder)
    if held is None:  # of an earlier version: what is there is taken as it is
        files = own_files(folder) - {NEXT, MANIFEST}
        held = Manifest(checksums(folder, sorted(files)))
    written = files_below(staging)
    if written:
        sums = {**held.files, **checksums(staging, written)}
        Manifest(sums, held.inputs).write(staging)
        put_in_place(folder, staging, own_files(folder) & {*files_below(staging)})
