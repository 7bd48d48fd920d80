"""Run folders: results, the config that replays them and a report, never half-written.

The module names the files of a run, tells them from files that no run made, puts a new run in the
place of an earlier one, and finds and opens its result.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.data.files import check_regular
from geffect_fast.errors import InputError
from geffect_fast.paths import is_there, short_names, user_path
from geffect_fast.storage.disk import (
    UNFINISHED,
    check_usable,
    folder_for,
    set_aside,
    synced,
)
from geffect_fast.storage.lock import locked, restored
from geffect_fast.storage.manifest import (
    MANIFEST,
    Manifest,
    Sums,
    check_file,
    checksums,
    files_below,
)
from geffect_fast.storage.results_file import read_result, torn
from geffect_fast.storage.run_yaml import CONFIG_BEGINS, AnyConfig, dump_config
from geffect_fast.storage.seal import seal_holds
from geffect_fast.visible import one_line

if TYPE_CHECKING:
    import xarray as xr

RESULTS = "results.nc"
EVALUATION = "evaluation.nc"
"""The measures of `evaluate`, in place of effects."""
CONFIG = "run.yaml"
COST = "cost.json"
"""The cost of the updates of `unlearn`: seconds, bytes of memory, and the device."""
SUMMARY = "summary.csv"
COMPARISON = "compare.csv"
"""The table that `compare` writes, with a row for each run and step."""
PLOTS = "plots"
TOKENS = "tokens.html"
REPORT = "report.html"
STEPS = "steps"
"""The folder of step files in the run folder of a run of several steps."""
LOGS = "logs"
"""The folder of TensorBoard's events in the run folder of `unlearn`."""
LOG_SUFFIX = ".geffect"
"""Suffix of the names of event files, which TensorBoard itself would not give."""
_LOG_NAME = re.compile(rf"events\.out\.tfevents\..+{re.escape(LOG_SUFFIX)}")
_STEP_NAME = re.compile(r"step-\d{8,}\.nc|\.step-\d{8,}\.nc\.part")
NEXT = ".next"
"""The folder of a run of several steps that is to replace the one around it, until it is whole."""
RUN_FILES = (RESULTS, EVALUATION, CONFIG, SUMMARY, PLOTS, TOKENS, REPORT)
_FIGURES = (
    *("layers", "instances", "sweep", "pareto", "effects", "risks", "groups", "prediction"),
    *("cosines", "norms", "token_weights", "trade_off", "measures", "retention", "relearned"),
    "against_effects",
)
PLAIN_FILES = (
    *(RESULTS, EVALUATION, CONFIG, COST, SUMMARY, TOKENS, REPORT, MANIFEST),
    *(f"{PLOTS}/{name}.{kind}" for name in _FIGURES for kind in ("png", "svg")),
)
"""Files of runs whose names do not show that a run wrote them."""

Reporter = Callable[["xr.Dataset", Path], None]
"""A function that writes tables and plots of a result into a folder, for a run that is whole."""


def check_free(
    folder: str | Path, overwrite: bool = False, inputs: Mapping[str, str | Path] | None = None
) -> Path:
    """Check that results may be written to a run folder, and return its absolute path.

    Nothing is changed, except that the files which a killed process set aside are put back.

    Args:
        folder: path of the run folder.
        overwrite: whether an earlier run in the folder may be replaced.
        inputs: paths or hub ids that the new run reads, by option.

    Raises:
        InputError: the folder is a file, cannot be written to, holds a file that no run made under
            a name that runs use, holds a run and `overwrite` is False, or holds an input that would
            be replaced.
    """
    path = check_usable(folder)
    restored(path)
    own = own_files(path)
    theirs = [name for name in PLAIN_FILES if is_there(path / name) and name not in own]
    if theirs:
        raise InputError(
            f"run folder {folder} holds {theirs[0]}, which no run made; choose another --out"
        )
    held = held_files(path, RUN_FILES, own)
    if held and not overwrite:
        raise InputError(
            f"run folder {folder} already holds {held[0]}; choose another --out or use --overwrite"
        )
    check_inputs(path, own, inputs or {})
    return path


def held_files(folder: Path, names: Iterable[str], own: Collection[str]) -> list[str]:
    """The run's files and folders that exist. A folder that holds nothing of a run is left out.

    Args:
        folder: the run folder.
        names: files and folders to look for, by path in `folder`.
        own: the run's own files, as `own_files` returns them.
    """
    return [
        name
        for name in names
        if (is_there(folder / name) and not (folder / name).is_dir())
        or any(each.startswith(f"{name}/") for each in own)
    ]


def own_files(folder: Path) -> set[str]:
    """The files of the run in a folder, by path in it, which another run may replace.

    These are the files that the manifest names. A run of an earlier version, or one that is not
    complete, may have no manifest. There the files are those with names that runs write, if a
    config, a result or steps show that the folder holds a run. Step files, logs and the manifest
    itself count in both cases.

    Raises:
        InputError: the manifest is damaged.
    """
    manifest = Manifest.read(folder)
    names = {MANIFEST, NEXT}
    if manifest is not None:
        names |= manifest.files.keys()
    elif _was_a_run(folder):
        names |= {*PLAIN_FILES, COMPARISON}
    if (folder / STEPS).is_dir():
        found = (path.name for path in (folder / STEPS).iterdir())
        names |= {f"{STEPS}/{name}" for name in found if is_step_name(name)}
    if (folder / LOGS).is_dir():
        found = (path.name for path in (folder / LOGS).iterdir())
        names |= {f"{LOGS}/{name}" for name in found if _LOG_NAME.fullmatch(name)}
    return {name for name in names if is_there(folder / name)}


def _was_a_run(folder: Path) -> bool:
    """Whether a folder without a manifest holds a run's config, step, result or table."""
    try:
        if (folder / CONFIG).read_text(encoding="utf-8").startswith(CONFIG_BEGINS):
            return True
    except (OSError, ValueError):
        pass
    if any((folder / STEPS).glob("step-*.nc")) or is_there(folder / COMPARISON):
        return True
    try:
        with open_run(folder / RESULTS, lazy=True):
            return True
    except InputError:
        return False


def check_inputs(folder: Path, own: Collection[str], inputs: Mapping[str, str | Path]) -> None:
    """Raise `InputError` where a run would replace one of its own inputs.

    Args:
        folder: the run folder.
        own: paths in `folder` of the files that are to be replaced.
        inputs: paths or hub ids, by option.
    """
    replaced = {os.path.realpath(folder / name) for name in own}
    for option, source in inputs.items():
        place = user_path(source)
        try:
            within = [*place.iterdir()] if place.is_dir() else [place]
            real = {os.path.realpath(each) for each in within}
        except OSError:
            continue  # not a readable path: the code that reads the input reports the error
        if taken := sorted(real & replaced):
            raise InputError(
                f"{option} {source} is of the run in {folder} ({Path(taken[0]).name}), which "
                "--overwrite would replace; choose another --out"
            )


def write_config(config: AnyConfig, staging: Path) -> None:
    """Write a config as the `run.yaml` in the folder `staging`."""
    (staging / CONFIG).write_text(dump_config(config), encoding="utf-8")


def is_step_name(name: str) -> bool:
    """Whether `name` is one that a run gives to files in its folder of steps."""
    return bool(_STEP_NAME.fullmatch(name))


@contextmanager
def staged_run(
    folder: str | Path,
    overwrite: bool = False,
    inputs: Mapping[str, str | Path] | None = None,
    sums: Callable[[], Mapping[str, Sums]] = dict,
) -> Iterator[Path]:
    """A hidden folder in a run folder; files written to it appear when the block ends well.

    Args:
        folder, overwrite, inputs: as in `save_run`.
        sums: returns checksums of the files that the run was made from, for its manifest.

    Yields:
        The path of the hidden folder.

    Raises:
        InputError: as in `save_run`; or another process works in the folder.
    """
    with locked(folder) as path:
        check_free(folder, overwrite, inputs)
        with folder_for(f"run folder {folder}", path):
            staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path))
            try:
                yield staging
                Manifest(checksums(staging, files_below(staging)), sums()).write(staging)
                put_in_place(path, staging, own_files(path))
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def put_in_place(folder: Path, staging: Path, own: Collection[str]) -> None:
    """Put the files of a new run in the place of an earlier run's files, `results.nc` last.

    The exchange happens as a whole or not at all: the next command undoes an exchange that a kill
    left half done (`set_aside`). Every new file is on the disk before it counts.

    Args:
        folder: the run folder.
        staging: holds the new files, and a manifest that lists them.
        own: paths in `folder` of the earlier run's files, all of which are removed.

    Raises:
        InputError: a file that no run made is in the place of a new file.
        OSError: the disk refuses.
    """
    manifest = Manifest.read(staging)
    assert manifest is not None
    made = [name for name in files_below(staging) if name in {MANIFEST, *manifest.files}]
    names = sorted(made, key=lambda name: name in (RESULTS, EVALUATION))
    for name in names:
        if is_there(folder / name) and name not in own:
            raise InputError(
                f"run folder {folder} holds {name}, which no run made; choose another --out"
            )
        synced(staging / name)
    with set_aside(folder, {*own, *names}, staging):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).rename(folder / name)
        for parent in {(folder / name).parent for name in names}:
            synced(parent)


def run_names(runs: Sequence[str | Path]) -> list[str]:
    """Short distinct names of runs in a comparison, from the paths of their folders or files.

    Args:
        runs: run folders, their result files, or other files, each only once.
    """
    places = [user_path(run).absolute() for run in runs]
    places = [p.parent if p.name in (RESULTS, EVALUATION) else p for p in places]
    named = short_names([str(p.with_suffix("") if p.suffix == ".nc" else p) for p in places])
    return [one_line(name) for name in named]


def open_run(folder: str | Path, *, lazy: bool = False) -> xr.Dataset:
    """The result of a run, loaded into memory with the file closed again.

    Args:
        folder: a run folder, or a `.nc` file itself.
        lazy: whether numbers are read from the file on access, until `.close()`, for results by
            position that do not fit in memory.

    Raises:
        InputError: there is no complete result, or the file is not a result of this package.
    """
    file = _result_of(folder)
    _check_whole(file)
    return read_result(file, lazy=lazy)


def _check_whole(file: Path) -> None:
    """Raise `InputError` where a result differs from its checksum; the file is read once."""
    try:
        if file.name == RESULTS and check_file(file.parent, RESULTS):
            return
        whole = not file.is_file() or seal_holds(file)
    except OSError as error:
        raise torn(file, error) from error
    if not whole:
        raise InputError(
            f"{file} is damaged: its checksum is not that of what was written",
            remedy="repeat the run",
        )


def _result_of(folder: str | Path) -> Path:
    """The path of the result in a run folder, or of the file given.

    Raises:
        InputError: there is no result. The message says why, and what to do.
    """
    path = user_path(folder)
    try:
        restored(path)
        file = path / RESULTS if path.is_dir() else path
        if is_there(file):
            check_regular(file, f"result {file}")
            return file
        if not is_there(path):
            raise InputError(f"run folder {folder} does not exist; give a run folder")
    except OSError as error:
        raise InputError(
            f"run folder {folder} cannot be read: {error.strerror}; give a run folder"
        ) from None
    if is_there(path / EVALUATION):
        raise InputError(
            f"run folder {folder} holds measures of evaluate, and no effects; open it with "
            "geffect_fast.open_evaluation, or show it with geffect-fast show"
        )
    begun = any(path.glob(f"{UNFINISHED}*")) or (path / CONFIG).exists()
    reason = "its run did not finish" if begun else "it is not a run folder"
    advice = "repeat the run" if begun else "give a run folder"
    if (path / STEPS).is_dir():
        advice = "go on with --resume"
    raise InputError(f"run folder {folder} holds no {RESULTS}: {reason}; {advice}")
