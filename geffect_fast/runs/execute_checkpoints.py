"""A profile of checkpoints from its config to its folder, begun or gone on with."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from geffect_fast.runs.config import ProfileConfig
from geffect_fast.runs.dataset import digests
from geffect_fast.runs.execute import measuring, on_threads, read_sources, reading
from geffect_fast.runs.inputs import Inputs, check_replayed, input_sums, inputs_of
from geffect_fast.runs.lock import locked
from geffect_fast.runs.profile_checkpoints import CheckpointRun
from geffect_fast.runs.recorded_rows import check_recorded
from geffect_fast.runs.step_folder import (
    as_begun,
    begun,
    check_resumed,
    check_start,
    finish,
    kept,
)

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.runs.store import Reporter

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
    with locked(out):
        folder = check_start(out, resume, overwrite, inputs=inputs_of(config) | dict(inputs))
        if resume:
            config = config.model_copy(update=as_begun(config, folder, _CHOSEN))
        device, data, tokenizer = read_sources(config, config.objectives)
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
                trust_remote_code=config.trust_remote_code,
                options={
                    **data,
                    "objectives": list(config.objectives),
                    **measuring(config),
                    **reading(config),
                },
            )
            rows = digests(run.profiler.sets)
            check_recorded(config.rows, rows, folder if resume else None)
            check_replayed(inputs.get("--config"), config, sums)
            chosen = {
                "token_budget": run.profiler.token_budget,
                "engine": run.profiler.settings["engine"],
                "threads": threads,
                "device": str(device),
                "dtype": str(run.model.dtype).removeprefix("torch."),
                "rows": rows,
            }
            settled = config.model_copy(update=chosen)
            with nullcontext() if resume else begun(folder, settled, sums), kept(folder):
                dataset = run.measure(folder, progress=progress)
                finish(folder, dataset, report)
    return dataset
