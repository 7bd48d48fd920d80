"""A profile of checkpoints from its config to its folder, begun or gone on with."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError
from geffect_fast.measure.execute import machine, on_threads, read_sources_of
from geffect_fast.ranks import here
from geffect_fast.results.dataset import digests
from geffect_fast.settings import Measuring, ProfileConfig
from geffect_fast.steps.profile_checkpoints import CheckpointRun
from geffect_fast.storage.inputs import Inputs, check_replayed, input_sums, inputs_of
from geffect_fast.storage.lock import locked
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.step_folder import (
    as_begun,
    begun,
    check_resumed,
    check_start,
    finish,
    kept,
)

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter

_CHOSEN = ("token_budget", "engine", "threads", "device", "dtype", "rows")
"""Fields that are decided when a run begins, where nobody says, and recorded in its `run.yaml`."""


def execute_checkpoints(
    config: ProfileConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Profile the checkpoints of a config, and write the run folder step by step.

    Args:
        config: the run; its `model` is the first checkpoint or stands before it, as step 0.
        out: run folder.
        resume: go on with the run in it.
        overwrite: whether a run in it may be replaced.
        progress: whether to show a bar.
        report: adds tables and plots to the folder.
        inputs: what else is read, beside what the config names: its own file.

    Returns:
        The result, as `geffect_fast.profile_checkpoints` returns it.

    Raises:
        As `geffect_fast.profile_checkpoints`.
    """
    if here().size > 1:
        raise InputError(
            "--checkpoints: one process goes through them; start it without torchrun, or profile "
            "each checkpoint by itself"
        )
    with locked(out):
        folder = check_start(out, resume, overwrite, inputs=inputs_of(config) | dict(inputs))
        if resume:
            config = config.model_copy(update=as_begun(config, folder, _CHOSEN))
        device, sources, tokenizer = read_sources_of(config, progress)
        sums = input_sums(inputs_of(config))
        if resume:
            check_resumed(folder, sums)
        with on_threads(config.threads) as threads:
            run = CheckpointRun(
                config.checkpoints,
                tokenizer,
                model=config.model,
                reference_model=config.reference,
                dtype=config.dtype,
                device=str(device),
                options={
                    **sources.arguments(),
                    "objectives": list(config.objectives),
                    **config.fields(Measuring),
                    "second_order": config.second_order,
                },
            )
            rows = digests(run.profiler.sets)
            check_recorded(config.rows, rows, folder if resume else None)
            check_replayed(inputs.get("--config"), config, sums)
            chosen = {
                "token_budget": run.profiler.token_budget,
                "engine": run.profiler.attributes["engine"],
                **machine(threads, device, run.model),
                "rows": rows,
            }
            settled = config.model_copy(update=chosen)
            with nullcontext() if resume else begun(folder, settled, sums), kept(folder):
                dataset = run.measure(folder, progress=progress)
                finish(folder, dataset, report)
    return dataset
