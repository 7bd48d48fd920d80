"""The run folder of a run of several steps, from its beginning, through resuming, to its end."""

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
from geffect_fast.storage.results_file import write_dataset
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
    """Check that a run may begin, or be resumed, in `out`, and return the folder in which it works.

    The folder is `out` itself, or, for a run that is to replace the one in `out`, a hidden folder
    in `out`: an earlier run stays in its place until the new one is whole. The caller holds the
    lock of `out`.

    Args:
        out: run folder.
        resume: whether to resume the run in `out`.
        overwrite: whether an earlier run in `out` may be replaced.
        more: existing files that runs of this kind make beyond those that all runs make.
        inputs: paths or hub ids that the run reads, by option.

    Raises:
        InputError: `out` cannot be written to; `out` holds a run and neither `resume` nor
            `overwrite` is given, or both are; `out` holds a file that no run made under a name that
            runs use; there is nothing to resume; the run to resume is complete; or an input would
            be replaced.
    """
    if resume and overwrite:
        raise InputError(
            "--resume goes on with a run that --overwrite would remove; give only one of them"
        )
    folder = check_free(out, overwrite=True, inputs=inputs)
    if overwrite:
        check_inputs(folder, more, inputs or {})
    replacing = folder / NEXT
    if is_there(replacing):
        recovered(replacing)
    if resume and is_there(replacing / RESULTS):
        _promote(replacing, more)  # a kill came after the run was complete, before this step
    elif resume and is_there(replacing):
        return replacing
    held = _made_names(folder, more)
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
def working_folder(out: str | Path, ranks: Ranks, check: Callable[[], Path]) -> Iterator[Path]:
    """Lock a run folder on the first rank, check it there, and give all ranks the folder to use.

    Args:
        out: run folder.
        ranks: the ranks that work in the folder.
        check: returns the folder in which to work, like `check_start`; called on the first rank.

    Yields:
        The folder that `check` returned.

    Raises:
        InputError: as in `check`; or another process works in `out`, or a rank does not see it.
    """
    with locked(out) if ranks.first else nullcontext() as home:
        shared_folder(home, ranks)
        yield ranks.first_of(check() if ranks.first else Path())


@contextmanager
def new_run(folder: Path, config: RunConfig | None, inputs: Mapping[str, Sums]) -> Iterator[None]:
    """Write the config of a run that begins, and a manifest with its inputs, into its folder.

    If the block fails before there is a step, both files are removed, with logs and with folders
    that were made. After Ctrl-C they stay.

    Args:
        folder: the folder that `check_start` returned.
        config: the run's config; None for a run that no config describes.
        inputs: checksums of the run's inputs, by option.

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
    """Choices made when the run in a folder began, for a config that is to resume that run.

    Args:
        config: the config of the command that resumes the run.
        folder: the run's folder.
        chosen: fields that are chosen when a run begins, where the user gives no value.
        same_numbers: fields that do not change any number.

    Returns:
        Values of those fields of `chosen` that `config` leaves at their defaults.

    Raises:
        InputError: there is no run, its config is damaged, or the run is of another command or
            differs in a field that changes numbers.
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
    """Raise `InputError` where the inputs of a run that is resumed have changed since it began."""
    manifest = Manifest.read(folder)
    if manifest is not None:
        check_unchanged(_run_folder_of(folder), manifest.inputs, inputs)


def finish(
    folder: Path,
    dataset: xr.Dataset,
    report: Reporter | None = None,
    more: Callable[[Path], None] = lambda staging: None,
    checkpoint_files: Callable[[Path], Collection[str]] = lambda folder: (),
    keep: bool = False,
) -> None:
    """Write the result and the other files that complete a run, then add a report.

    All files but the report are written to a hidden folder and put in place together. If this
    fails, the steps are kept. A run in a hidden folder of its own then replaces the run around it.

    Args:
        folder: the run's folder, as `check_start` returned it.
        dataset: the result of all steps.
        report: writes tables and plots.
        more: writes other files that complete the run into the folder given.
        checkpoint_files: returns the files of checkpoints in a folder.
        keep: whether checkpoints stay; else they are removed once the result is on the disk.

    Raises:
        UnfinishedError: the disk refuses; or the report fails, and the numbers are written.
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
            f"run folder {_run_folder_of(folder)} cannot be completed: {error.strerror or error}",
            remedy="all steps are kept: free some space, and go on with --resume",
        ) from error
    add_report(_run_folder_of(folder), dataset, report)


def _promote(folder: Path, more: Collection[str]) -> None:
    """Put a whole run, in a hidden folder, in the place of the run around it."""
    home = folder.parent
    put_in_place(home, folder, {*own_files(home), *more} - {NEXT})
    remove(folder)


def _run_folder_of(folder: Path) -> Path:
    """The run folder that the user gave: `folder`, or its parent where `folder` is hidden in it."""
    return folder.parent if folder.name == NEXT else folder


@contextmanager
def telling_what_is_kept(folder: Path) -> Iterator[None]:
    """Add to the error of a run that stops early which steps are kept, and how to go on.

    Such a run ends by Ctrl-C, by numbers that are not finite, or because another rank ended. With
    numbers that are not finite, a run that was to replace another one is removed, and the other
    one stays.

    Raises:
        InterruptedRunError: Ctrl-C came.
        NonFiniteError: numbers are not finite.
        UnfinishedError: there are steps, and another rank ended, or failed for a reason outside
            this package.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted; what was measured{_until(folder)} is kept: go on with --resume --out "
            f"{_run_folder_of(folder)} (resume=True)"
        ) from None
    except GEffectError as error:
        until, more = _until(folder), ""
        kind = type(error)
        if isinstance(error, NonFiniteError) and folder.name == NEXT:
            remove(folder)
            more = f"the run that was to be replaced in {_run_folder_of(folder)} is as it was"
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
    """The last step that was measured, in words; empty where there is none."""
    done = sorted((folder / STEPS).glob("step-*.nc"))
    return f" to step {int(done[-1].stem.removeprefix('step-'))}" if done else ""


def _made_names(folder: Path, more: Collection[str]) -> list[str]:
    """Names of what a run made in its folder: its result first, its steps last."""
    held = held_files(folder, (*RUN_FILES, *more), own_files(folder))
    return [*held, STEPS] if is_there(folder / STEPS) else held
