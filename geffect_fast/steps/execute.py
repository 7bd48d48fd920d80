"""The execution of a profile of checkpoints, from its config to its run folder, new or resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from geffect_fast.measure.by_config import (
    gradient_bytes,
    load_by_config,
    on_threads,
    read_sources_of,
    recorded_machine,
)
from geffect_fast.ranks import here
from geffect_fast.results.dataset import digests
from geffect_fast.settings import Measuring, ProfileConfig
from geffect_fast.steps.profile_checkpoints import CheckpointRun
from geffect_fast.storage.inputs import Inputs, check_replayed, input_sums, inputs_of
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.step_folder import as_begun, check_resumed, check_start, working_folder

if TYPE_CHECKING:
    import torch
    import xarray as xr
    from transformers import PreTrainedModel

    from geffect_fast.storage.run_folder import Reporter

_CHOSEN = ("token_budget", "engine", "threads", "device", "dtype", "rows")
"""Fields that are chosen when a run begins, unless the user sets them, and kept in `run.yaml`."""


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
        config: the run's config. Its `model` is the first checkpoint, or is added before it as step
            0.
        out: run folder.
        resume: whether to resume the run in `out`.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show a bar.
        report: adds tables and plots to the folder.
        inputs: further inputs beside those that the config names, such as the config's own file.

    Returns:
        The result, as `geffect_fast.profile_checkpoints` returns it.

    Raises:
        As in `geffect_fast.profile_checkpoints`.
    """
    ranks, read = here(), inputs_of(config) | dict(inputs)
    first, progress = ranks.first, progress and ranks.first
    with (
        ranks.together(config.command),
        working_folder(
            out, ranks, partial(check_start, out, resume, overwrite, inputs=read)
        ) as folder,
    ):
        if resume:
            chosen = ranks.first_of(as_begun(config, folder, _CHOSEN) if first else {})
            config = config.model_copy(update=chosen)
        device, sources, tokenizer = read_sources_of(config, progress)
        sums = input_sums(inputs_of(config)) if first else {}
        if resume and first:
            check_resumed(folder, sums)
        with on_threads(config.threads) as threads:
            run = CheckpointRun(
                config.checkpoints,
                tokenizer,
                model=config.model,
                reference_model=config.reference,
                load=partial(_first, config, device, len(sources.sets)),
                options={
                    **sources.arguments(),
                    "objectives": list(config.objectives),
                    **config.fields(Measuring),
                    "second_order": config.second_order,
                },
            )
            rows = digests(run.profiler.sets)
            check_recorded(config.rows, rows, folder if resume else None)
            if first:
                check_replayed(inputs.get("--config"), config, sums)
            recorded = {
                "token_budget": run.profiler.token_budget,
                "engine": run.profiler.attributes["engine"],
                **recorded_machine(threads, device, run.model),
                "rows": rows,
            }
            settled = config.model_copy(update=recorded)
            return run.written(folder, settled, sums, report, resume=resume, progress=progress)


def _first(
    config: ProfileConfig, device: torch.device, n_risks: int, folder: Path
) -> PreTrainedModel:
    """Load the model of the first checkpoint, or this rank's part of it."""
    # Beside the risks' gradients a copy of the weights, hence `+ 1`, is kept for predictions.
    beside = partial(gradient_bytes, n_risks=n_risks + 1)
    model: PreTrainedModel = load_by_config(str(folder), config, device, beside, what="checkpoint")
    return model
