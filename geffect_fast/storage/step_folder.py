"""The run folder of a run of several steps: begun, gone on with, and in the end complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import (
    GEffectError,
    InputError,
    InterruptedRunError,
    NonFiniteError,
    UnfinishedError,
)
from geffect_fast.paths import is_there
from geffect_fast.ranks import Ranks
from geffect_fast.settings import RunConfig
from geffect_fast.storage.disk import (
    UNFINISHED,
    folder_for,
    recovered,
    remove,
    shared_folder,
    whole_file,
)
from geffect_fast.storage.inputs import Inputs, check_unchanged
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import (
    MANIFEST,
    Manifest,
    Sums,
    check_file,
    checksums,
    files_below,
)
from geffect_fast.storage.run_folder import (
    CONFIG,
    LOGS,
    NEXT,
    RESULTS,
    RUN_FILES,
    STEPS,
    check_free,
    check_inputs,
    held_files,
    is_step_name,
    own_files,
    put_in_place,
    write_dataset,
)
from geffect_fast.storage.run_yaml import dump_config, load_config
from geffect_fast.storage.save_run import add_report

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter


def check_start(
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    more: Collection[str] = (),
    inputs: Inputs | None = None,
) -> Path:
    """The folder in which a run works, if it may begin, or go on, in `out`.

    It is `out` itself, or, for a run that is to replace the one in `out`, a hidden folder in it: an
    earlier run stays in its place until the new one is whole. The caller holds the lock of `out`.

    Args:
        out: run folder.
        resume: go on with the run in it.
        overwrite: whether an earlier run in it may be replaced.
        more: files that such a run makes beside what all runs do, and that are there.
        inputs: what the run reads.

    Raises:
        InputError: it cannot be written to; it holds a run and neither `resume` nor `overwrite` is
            given, or what no run made where runs write; there is nothing to resume, the run is
            complete, or an input would be replaced.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run that --overwrite would remove; give one")
    folder = check_free(out, overwrite=True, inputs=inputs)
    if overwrite:
        check_inputs(folder, more, inputs or {})
    replacing = folder / NEXT
    if is_there(replacing):
        recovered(replacing)
    if resume and is_there(replacing / RESULTS):
        _promote(replacing, more)  # a kill came between its end and that
    elif resume and is_there(replacing):
        return replacing
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
        unfinished = is_there(replacing) or (RESULTS not in held and STEPS in held)
        advice = "go on with --resume, " if unfinished else ""
        raise InputError(
            f"run folder {out} already holds {held[0]}; {advice}choose another --out or use "
            "--overwrite"
        )
    return replacing if held and overwrite else folder


@contextmanager
def started(out: str | Path, ranks: Ranks, check: Callable[[], Path]) -> Iterator[Path]:
    """The folder in which ranks work, as a check tells the first of them, who holds its lock.

    Args:
        out: run folder.
        ranks: who work in it.
        check: such as `check_start`; called on the first rank.

    Raises:
        InputError: as `check`; or another process works in `out`, or a rank does not see it.
    """
    with locked(out) if ranks.first else nullcontext() as home:
        shared_folder(home, ranks)
        yield ranks.first_of(check() if ranks.first else Path())


@contextmanager
def begun(folder: Path, config: RunConfig | None, inputs: Mapping[str, Sums]) -> Iterator[None]:
    """The folder with the config of a run that begins, and with what it is made from.

    Where the block fails before there is a step, both go, and what was made of folders.

    Args:
        folder: as `check_start` returned it.
        config: of the run; None: of one that no config describes.
        inputs: checksums of what it reads.

    Raises:
        InputError: the disk refuses.
    """
    if folder.name == NEXT:
        remove(folder)
    with folder_for(f"run folder {folder}", folder):
        if config is not None:
            with whole_file(f"config {folder / CONFIG}", folder / CONFIG, "--out") as part:
                part.write_text(dump_config(config), encoding="utf-8")
        try:
            made = [CONFIG] if config is not None else []
            Manifest(checksums(folder, made), inputs).write(folder)
            yield
        except (GEffectError, OSError) as error:
            if not isinstance(error, InterruptedRunError) and not is_there(folder / STEPS):
                logs = [name for name in own_files(folder) if name.startswith(f"{LOGS}/")]
                for name in (*logs, CONFIG, MANIFEST):
                    remove(folder / name)
                with suppress(OSError):  # not empty, or not there
                    (folder / LOGS).rmdir()
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
    check_file(folder, CONFIG, "put back what was there, or begin another run in another --out")
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


def check_resumed(folder: Path, inputs: Mapping[str, Sums]) -> None:
    """Raise `InputError` where a run would go on with other inputs than it was begun with."""
    manifest = Manifest.read(folder)
    if manifest is not None:
        check_unchanged(_home(folder), manifest.inputs, inputs)


def finish(
    folder: Path,
    dataset: xr.Dataset,
    report: Reporter | None = None,
    more: Callable[[Path], None] = lambda staging: None,
    checkpoint_files: Callable[[Path], Collection[str]] = lambda folder: (),
    keep: bool = False,
) -> None:
    """Write the result and what else completes a run; then add a report.

    All but the report is written to a hidden folder and put in place together. Where that fails,
    the steps are there still. A run that was to replace another one then does.

    Args:
        folder: of the run, as `check_start` returned it.
        dataset: of all steps.
        report: writes tables and plots.
        more: writes what else the run ends with.
        checkpoint_files: what a folder holds of checkpoints.
        keep: whether checkpoints stay; else they go once the result is on the disk.

    Raises:
        UnfinishedError: the disk refuses; or the report fails, and the numbers are there.
    """
    try:
        staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        try:
            more(staging)
            write_dataset(dataset, staging / RESULTS)
            here = [
                name
                for name in own_files(folder)
                if name == CONFIG or name.startswith((f"{STEPS}/step-", f"{LOGS}/"))
            ]
            begun = Manifest.read(folder)
            stays = checkpoint_files(folder) if keep else ()
            sums = {
                **checksums(folder, sorted({*here, *stays})),
                **checksums(staging, files_below(staging)),
            }
            Manifest(sums, begun.inputs if begun is not None else {}).write(staging)
            put_in_place(folder, staging, own_files(folder) & {*files_below(staging)})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if not keep:
            for checkpoint in {Path(name).parts[0] for name in checkpoint_files(folder)}:
                remove(folder / checkpoint)
        if folder.name == NEXT:
            _promote(folder, checkpoint_files(folder.parent))
    except OSError as error:
        raise UnfinishedError(
            f"run folder {_home(folder)} cannot be completed: {error.strerror or error}; all steps "
            "are kept: free some space, and go on with --resume"
        ) from error
    add_report(_home(folder), dataset, report)


def _promote(folder: Path, more: Collection[str]) -> None:
    """Put a run that is whole in the place of the one around it."""
    home = folder.parent
    put_in_place(home, folder, {*own_files(home), *more} - {NEXT})
    remove(folder)


def _home(folder: Path) -> Path:
    """The run folder that is meant by who works in the folder of a run that is to replace it."""
    return folder.parent if folder.name == NEXT else folder


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Ctrl-C, and numbers that are none, are answered with what is kept, and how to go on.

    So is the end of another rank. A run that was to replace another one goes where its numbers did,
    and the other one stays.

    Raises:
        InterruptedRunError: Ctrl-C came.
        UnfinishedError: another rank has ended, or failed for no reason of ours.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; what was measured{_until(folder)} is kept: go on with --resume --out "
            f"{_home(folder)} (resume=True)"
        ) from None
    except GEffectError as error:
        until, more = _until(folder), ""
        kind = type(error)
        if isinstance(error, NonFiniteError) and folder.name == NEXT:
            remove(folder)
            more = f"the run that was to be replaced in {_home(folder)} is as it was"
        elif isinstance(error, NonFiniteError) and until:
            more = f"what was measured{until} is kept in {folder / STEPS}"
        elif kind is GEffectError and until:
            kind, more = UnfinishedError, f"what was measured{until} is kept: go on with --resume"
        if not more:
            raise
        said = kind(f"{error}; {more}")
        said.told = error.told
        raise said from error


def _until(folder: Path) -> str:
    """The last step that was measured, in words."""
    done = sorted((folder / STEPS).glob("step-*.nc"))
    return f" to step {int(done[-1].stem.removeprefix('step-'))}" if done else ""


def _held(folder: Path, more: Collection[str]) -> list[str]:
    """What a run made in its folder: its result first, its steps last."""
    held = held_files(folder, (*RUN_FILES, *more), own_files(folder))
    return [*held, STEPS] if is_there(folder / STEPS) else held
