"""The folder of an unlearning run: what may be written there, and how it becomes complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from geffect_fast.errors import InputError, InterruptedRunError, UnfinishedError
from geffect_fast.runs.disk import is_there, remove
from geffect_fast.runs.models import quiet_transformers
from geffect_fast.runs.steps import STEPS
from geffect_fast.runs.store import CONFIG, RESULTS, RUN_FILES, check_free, write_dataset
from geffect_fast.unlearning.checkpoints import checkpoints

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.runs.store import Reporter
    from geffect_fast.unlearning.run import Unlearning

MODEL = "model"


def check_start(out: str | Path, resume: bool, overwrite: bool) -> Path:
    """The folder of a run, if it may begin, or go on, there; touches nothing.

    Raises:
        InputError: it cannot be written to; it holds a run and neither `resume` nor `overwrite` is
            given; there is nothing to resume, or the run is complete.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run that --overwrite would remove; give one")
    folder = check_free(out, overwrite=True)
    held = _held(folder)
    steps = [path.name for path in (folder / STEPS).glob("*")]
    theirs = set(folder.glob("checkpoint-*")) - set(checkpoints(folder).values())
    if any(not name.lstrip(".").startswith("step-") for name in steps):
        theirs.add(folder / STEPS)
    if not steps and is_there(folder / MODEL):
        theirs.add(folder / MODEL)
    if theirs:
        raise InputError(
            f"run folder {out} holds {min(theirs).name}, which no unlearning run made; choose "
            "another --out"
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


def clear(folder: Path) -> None:
    """Remove an earlier run, its result first, so that what is left is no complete run."""
    for name in _held(folder):
        remove(folder / name)


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


def finish(folder: Path, dataset: xr.Dataset, run: Unlearning, report: Reporter | None) -> None:
    """Write the model, the report and the result; then checkpoints go.

    All is written to a hidden folder and renamed, `results.nc` last. Where that fails, the steps
    and the last checkpoint are there still.

    Args:
        folder: of the run.
        dataset: of all steps.
        run: whose model, as it is now, is saved.
        report: writes tables and plots.

    Raises:
        UnfinishedError: the disk refuses.
    """
    for left in folder.glob(".writing-*"):  # of a killed process
        remove(left)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        with quiet_transformers():
            run.model.save_pretrained(staging / MODEL)
            if run.tokenizer is not None:
                run.tokenizer.save_pretrained(staging / MODEL)
        write_dataset(dataset, staging / RESULTS)
        if report is not None:
            report(dataset, staging)
        for item in sorted(staging.iterdir(), key=lambda path: path.name == RESULTS):
            remove(folder / item.name)
            item.rename(folder / item.name)
    except (OSError, SafetensorError) as error:
        raise UnfinishedError(
            f"run folder {folder} cannot be completed: {getattr(error, 'strerror', None) or error}"
            "; free some space and go on with --resume"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if not run.training.keep_checkpoints:
        for checkpoint in checkpoints(folder).values():
            remove(checkpoint)


def _held(folder: Path) -> list[str]:
    """What a run made in its folder: its result first, its steps last."""
    saved = [path.name for path in checkpoints(folder).values()]
    names = dict.fromkeys([*RUN_FILES, *saved, MODEL])
    return [name for name in [*(n for n in names if n != STEPS), STEPS] if is_there(folder / name)]
