"""The folder of an unlearning run: checks before a run begins in it, and the files at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from geffect_fast.errors import InputError
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.paths import is_there
from geffect_fast.storage import step_folder
from geffect_fast.storage.disk import remove
from geffect_fast.storage.inputs import Inputs
from geffect_fast.storage.manifest import files_below
from geffect_fast.storage.run_folder import CONFIG, COST, RESULTS, check_free, own_files
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training.resume import checkpoints
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.manifest import Sums
    from geffect_fast.storage.run_folder import Reporter
    from geffect_fast.training.run import Unlearning
    from geffect_fast.training.watch import OnProbe

MODEL = "model"


def checkpoint_files(folder: Path) -> list[str]:
    """The files of all complete checkpoints in a run folder, relative to the folder."""
    return [
        f"{checkpoint.name}/{name}"
        for checkpoint in checkpoints(folder).values()
        for name in files_below(checkpoint)
    ]


def check_start(out: str | Path, resume: bool, overwrite: bool, inputs: Inputs) -> Path:
    """Check that a run may begin or resume in `out`, and return its folder; the caller locks it.

    The check removes one thing only: the checkpoints that a process left beside a complete result
    because it was killed just before it removed them.

    Raises:
        InputError: `out` cannot be written to; `out` holds a run, and neither `resume` nor
            `overwrite` is given; `out` holds something that no run made under a name that a run
            uses; there is nothing to resume; the run to resume is complete; or an input would be
            replaced.
    """
    folder = check_free(out, overwrite=True)
    theirs = {path.name for path in folder.glob("checkpoint-*")}
    theirs -= {path.name for path in checkpoints(folder).values()}
    if is_there(folder / MODEL) and not any(n.startswith(f"{MODEL}/") for n in own_files(folder)):
        theirs.add(MODEL)
    if theirs:
        raise InputError(
            f"run folder {out} holds {min(theirs)}, which no unlearning run made, or one that kept "
            "no list of its files; move it away, or choose another --out"
        )
    if resume and is_there(folder / RESULTS) and is_there(folder / CONFIG):
        begun = load_config(folder / CONFIG)
        if isinstance(begun, UnlearnConfig) and not begun.keep_checkpoints:
            _remove_checkpoints(folder)
    return step_folder.check_start(out, resume, overwrite, checkpoint_files(folder), inputs)


def carried_out(
    run: Unlearning,
    folder: Path,
    config: UnlearnConfig | None,
    sums: Mapping[str, Sums],
    report: Reporter | None,
    *,
    resume: bool,
    progress: bool,
    on_probe: OnProbe | None = None,
) -> xr.Dataset:
    """Train, and complete the run's folder, which the first rank writes.

    Args:
        run: the prepared run.
        folder: folder of the run.
        config, sums: config and input sums of a run that begins, as `step_folder.new_run` takes
            them.
        report: writes tables and plots.
        resume: whether the run is resumed.
        progress, on_probe: as `Unlearning.train` takes them.

    Raises:
        The errors of `geffect_fast.unlearn`.
    """
    if not run.ranks.first:
        return run.train(folder, progress=progress, on_probe=on_probe)
    with (
        nullcontext() if resume else step_folder.new_run(folder, config, sums),
        step_folder.telling_what_is_kept(folder),
    ):
        dataset = run.train(folder, progress=progress, on_probe=on_probe)
        _finish(folder, dataset, run, report)
    return dataset


def _finish(folder: Path, dataset: xr.Dataset, run: Unlearning, report: Reporter | None) -> None:
    """Write the model, the report and the result, and then remove the checkpoints.

    Where writing fails, the steps and the last checkpoint stay.

    Args:
        folder: folder of the run.
        dataset: the result of all steps.
        run: the run, whose model is saved as it is now.
        report: writes tables and plots.

    Raises:
        UnfinishedError: the disk refuses.
    """

    def save_model(staging: Path) -> None:
        try:
            with quiet_transformers():
                run.model.save_pretrained(staging / MODEL, state_dict=run.whole_weights)
                if run.tokenizer is not None:
                    run.tokenizer.save_pretrained(staging / MODEL)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        spent = {"seconds": run.cost.seconds, "peak_memory": run.cost.peak_memory}
        (staging / COST).write_text(
            json.dumps(spent | {"device": run.device.type}), encoding="utf-8"
        )

    step_folder.finish(
        folder, dataset, report, save_model, checkpoint_files, run.training.keep_checkpoints
    )


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in checkpoints(folder).values():
        remove(checkpoint)
