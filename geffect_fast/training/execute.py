"""Execution of an unlearning run, from its config to its folder; begins a run or resumes one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.capture.compat import is_sharded
from geffect_fast.measure.by_config import (
    gradient_bytes,
    load_by_config,
    on_threads,
    read_sources_of,
    recorded_machine,
)
from geffect_fast.measure.sources import needs_of, parts_of, resolved_list
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.ranks import here
from geffect_fast.results.dataset import digests
from geffect_fast.settings import LiveMetrics, Measuring
from geffect_fast.storage.inputs import Inputs, check_replayed, input_sums, inputs_of
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.step_folder import as_begun, check_resumed, working_folder
from geffect_fast.training.adapters import with_adapter
from geffect_fast.training.folder import carried_out, check_start
from geffect_fast.training.run import SAME_NUMBERS, TRAINING_TENSORS, Unlearning
from geffect_fast.unlearn_settings import Training, UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter
    from geffect_fast.training.watch import OnProbe

CHOSEN = ("token_budget", "threads", "device", "dtype", "batch_size", "probe_rows", "rows")
"""Fields that a run chooses when it begins, where they are not given, and records in `run.yaml`."""


def execute_unlearn(
    config: UnlearnConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    on_decision: Callable[[str], None] = lambda line: None,
    on_probe: OnProbe | None = None,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Unlearn as a config says, and write the run folder step by step.

    The saved config also holds the values that were chosen when the run began (token budget,
    threads, batch size ...). A replay or a resumed run therefore gives bitwise the same numbers on
    the same machine.

    Args:
        config: the run.
        out: run folder.
        resume: whether to resume the run in `out`.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show a bar.
        report: adds tables and plots to the folder.
        on_decision: called with every decision, one sentence each.
        on_probe: called after every probe.
        inputs: files that are read beside those that the config names, such as the config's own
            file, by option.

    Returns:
        The result, as `geffect_fast.unlearn` returns it.

    Raises:
        The errors of `geffect_fast.unlearn`.
    """
    if config.evaluates:
        resolved_metrics(config.metrics, config.suite)
    ranks, read = here(), inputs_of(config) | dict(inputs)
    with (
        ranks.together(config.command),
        working_folder(out, ranks, partial(check_start, out, resume, overwrite, read)) as folder,
    ):
        if resume:
            begun = as_begun(config, folder, CHOSEN, SAME_NUMBERS) if ranks.first else {}
            config = config.model_copy(update=ranks.first_of(begun))
        device, sources, tokenizer = read_sources_of(config, progress and ranks.first)
        sums = input_sums(inputs_of(config)) if ranks.first else {}
        if resume and ranks.first:
            check_resumed(folder, sums)
        with on_threads(config.threads) as n_threads:
            training = Training(**config.fields(Training))
            model, reference = _models(config, training, device, len(sources.sets))
            run = Unlearning(
                model,
                tokenizer,
                training,
                objectives=config.measured,
                sources=sources,
                settings=Measuring(**config.fields(Measuring)),
                reference_model=reference,
                live=LiveMetrics(**config.fields(LiveMetrics)),
                holdout=config.holdout,
                retain_model=config.retain_model,
            )
            on_decision(run.rows.sentence(run.sets))
            rows = digests(run.sets)
            check_recorded(config.rows, rows, folder if resume else None)
            if ranks.first:
                check_replayed(inputs.get("--config"), config, sums)
            chosen: dict[str, Any] = {
                "token_budget": run.profiler.token_budget,
                **recorded_machine(n_threads, device, model),
                "rows": rows,
                "batch_size": run.training.batch_size,
                "probe_rows": config.probe_rows or max(map(len, run.rows.rows.values())),
            }
            settled = config.model_copy(update=chosen)
            return carried_out(
                run,
                folder,
                settled,
                sums,
                report,
                resume=resume,
                progress=progress,
                on_probe=on_probe,
            )


def _models(
    config: UnlearnConfig, training: Training, device: torch.device, n_risks: int
) -> tuple[nn.Module, str | None]:
    """The model to train, or this rank's part of that model, and the place of its reference.

    A whole model gets its adapter later, and is copied later where objectives need a reference.
    The place is then None.
    """

    def beside(model: nn.Module) -> int:
        weights = sum(p.nbytes for p in model.parameters())
        if training.lora_rank is not None:  # an adapter is small, and the reference shares its base
            return weights if config.reference else 0
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        compares = needs_of(parts_of(resolved_list(config.measured))) & REFERENCE_NEEDS
        reference = weights if compares else 0
        kept = (TRAINING_TENSORS + 1) * trained  # also the weights as they were at the last probe
        return gradient_bytes(model, n_risks) + kept + reference

    def adapted(model: nn.Module) -> nn.Module:
        return model if training.lora_rank is None else with_adapter(model, training)

    model = load_by_config(config.model, config, device, beside, adapted)
    return model, config.reference or (config.model if is_sharded(model) else None)
