"""The run folder of a run of several steps: begun, gone on with, and in the end complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import (
    GEffectError,
    InputError,
    InterruptedRunError,
    UnfinishedError,
)
from geffect_fast.runs.config import RunConfig, dump_config, load_config
from geffect_fast.runs.disk import (
    UNFINISHED,
    folder_for,
    is_there,
    remove,
    remove_unfinished,
    whole_file,
)
from geffect_fast.runs.steps import is_step_name
from geffect_fast.runs.store import CONFIG, RESULTS, RUN_FILES, STEPS, check_free, write_dataset

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.runs.store import Reporter


def check_start(
    out: str | Path, resume: bool = False, overwrite: bool = False, more: Collection[str] = ()
) -> Path:
    """The folder of a run, if it may begin, or go on, there; touches nothing.

    Args:
        out: run folder.
        resume: go on with the run in it.
        overwrite: whether an earlier run in it may be replaced.
        more: names of what such a run makes beside what all runs do.

    Raises:
        InputError: it cannot be written to; it holds a run and neither `resume` nor `overwrite` is
            given, or steps that no run made; there is nothing to resume, or the run is complete.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run that --overwrite would remove; give one")
    folder = check_free(out, overwrite=True)
    held = _held(folder, more)
    odd = [path.name for path in (folder / STEPS).glob("*") if not is_step_name(path.name)]
    if odd and not resume:
        raise InputError(
            f"run folder {out} holds {STEPS}/{min(odd)}, which no run made; choose another --out"
        )
    if resume and RESULTS in held:
        raise InputError(
            f"run folder {out} is complete, there is nothing to resume; choose another --out or "
            "use --overwrite"
        )
    if resume and not {STEPS, CONFIG} & set(held):
        raise InputError(f"run folder {out} holds no run to resume; leave out --resume")
    if held and not (resume or overwrite):
        advice = "go on with --resume, " if RESULTS not in held and STEPS in held else ""
        raise InputError(
            f"run folder {out} already holds {held[0]}; {advice}choose another --out or use "
            "--overwrite"
        )
    return folder


def clear(folder: Path, more: Collection[str] = ()) -> None:
    """Remove an earlier run, its result first, so that what is left is no complete run."""
    for name in _held(folder, more):
        remove(folder / name)
    remove_unfinished(folder)


@contextmanager
def begun(folder: Path, config: RunConfig, more: Collection[str] = ()) -> Iterator[None]:
    """The folder, without an earlier run, with the config of this one.

    Where the block fails before there is a step, the config goes, and what was made of folders.

    Raises:
        InputError: the disk refuses.
    """
    with folder_for(f"run folder {folder}", folder):
        clear(folder, more)
        with whole_file(f"config {folder / CONFIG}", folder / CONFIG, "--out") as part:
            part.write_text(dump_config(config), encoding="utf-8")
        try:
            yield
        except GEffectError as error:
            if not isinstance(error, InterruptedRunError) and not is_there(folder / STEPS):
                remove(folder / CONFIG)
            raise


def as_begun(
    config: RunConfig, folder: Path, chosen: Collection[str], same_numbers: Collection[str] = ()
) -> dict[str, Any]:
    """What was chosen when the run in a folder began, for a config that is to go on with it.

    Args:
        config: what the command says now.
        folder: of the run.
        chosen: fields that are decided when a run begins, where nobody says.
        same_numbers: fields that decide no numbers.

    Returns:
        Values of those fields of `chosen` that `config` leaves open.

    Raises:
        InputError: there is no run, or it differs in a field that decides numbers.
    """
    if not is_there(folder / CONFIG):
        raise InputError(f"run folder {folder} holds no {CONFIG} to resume; leave out --resume")
    begun = load_config(folder / CONFIG)
    if type(begun) is not type(config) or begun.command != config.command:
        raise InputError(
            f"run folder {folder} holds a run of {begun.command}; resume it with that command"
        )
    taken: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        here, there = getattr(config, name), getattr(begun, name)
        if name in chosen and here == field.default:
            taken[name] = there
        elif here != there and name not in same_numbers:
            raise InputError(
                f"resume: {name} is {here}, and the run in {folder} was begun with {there}; give "
                "that, or begin another run in another --out"
            )
    return taken


def finish(
    folder: Path,
    dataset: xr.Dataset,
    report: Reporter | None = None,
    more: Callable[[Path], None] = lambda staging: None,
) -> None:
    """Write the result and a report, and what else completes a run.

    All is written to a hidden folder and renamed, `results.nc` last. Where that fails, the steps
    are there still.

    Args:
        folder: of the run.
        dataset: of all steps.
        report: writes tables and plots.
        more: writes what else the run ends with.

    Raises:
        UnfinishedError: the disk refuses.
    """
    try:
        remove_unfinished(folder)
        staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        try:
            more(staging)
            write_dataset(dataset, staging / RESULTS)
            if report is not None:
                report(dataset, staging)
            for item in sorted(staging.iterdir(), key=lambda path: path.name == RESULTS):
                remove(folder / item.name)
                item.rename(folder / item.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UnfinishedError(
            f"run folder {folder} cannot be completed: {error.strerror or error}; all steps are "
            "kept: free some space, and go on with --resume"
        ) from error


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Ctrl-C in the block is answered with what is kept, and how to go on.

    Raises:
        InterruptedRunError: it came.
    """
    try:
        yield
    except KeyboardInterrupt:
        done = sorted((folder / STEPS).glob("step-*.nc"))
        until = f" to step {int(done[-1].stem.removeprefix('step-'))}" if done else ""
        raise InterruptedRunError(
            f"interrupted; what was measured{until} is kept: go on with --resume --out {folder} "
            "(resume=True)"
        ) from None


def _held(folder: Path, more: Collection[str]) -> list[str]:
    """What a run made in its folder: its result first, its steps last."""
    return [name for name in (*RUN_FILES, *more, STEPS) if is_there(folder / name)]
