"""A run of `evaluate` from its config to its folder: one model at a time is loaded and measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from geffect_fast.evaluation_settings import EvaluateConfig, Evaluating
from geffect_fast.measure.against_effects import against_effects, effects_of, models_of_runs
from geffect_fast.measure.by_config import load_by_config, tokenizer_of
from geffect_fast.measure.evaluation_run import (
    check_compared,
    check_out,
    compared_bytes,
    evaluation_folder,
    read_sets_of,
)
from geffect_fast.measure.evaluator import Evaluator, checked_probes
from geffect_fast.measure.harness import Harness
from geffect_fast.measure.models import resolve_device
from geffect_fast.metrics.base import FORGET, HOLDOUT, RETAIN
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.paths import find_checkpoints, is_there, short_names, user_path
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.storage.inputs import Inputs
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.run_folder import CONFIG
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter


@dataclass(frozen=True)
class Evaluated:
    """The models and rows of an evaluation, for further measurements by `Assess`.

    Attributes:
        dimension: the axis of the models, `model` or `step`.
        models: folder or hub id of each model, by its coordinate on the axis.
        sets: rows by name, None for a set that was not given.
        tokenizer: None for rows that are tokenised.
        device: this rank's device, on which models are measured.
        token_budget: tokens a batch.
    """

    dimension: str
    models: Mapping[str | int, str]
    sets: Mapping[str, Any]
    tokenizer: Any
    device: torch.device
    token_budget: int


Assess = Callable[["xr.Dataset", Evaluated], "xr.Dataset"]
"""Adds further measurements of the models to their measures."""


@on_all_ranks
def execute_evaluation(
    config: EvaluateConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    inputs: Inputs = MappingProxyType({}),
    assess: Assess | None = None,
) -> xr.Dataset:
    """Evaluate the models of a config and write the run folder.

    Args:
        config: the run.
        out: run folder.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        report: adds tables, plots and a page to the folder.
        inputs: files that are read beside those that the config names: the config's own file.
        assess: adds further measurements of the models to the measures.

    Returns:
        For one model the result as `geffect_fast.evaluate` returns it; for several models their
        results along `model`, or along `step` for the checkpoints of a run; for runs that are set
        against effects the result as `geffect_fast.against_effects` returns it.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written then.
        UnfinishedError: the report failed; the numbers have been written.
    """
    import xarray as xr

    resolved_metrics(config.metrics, config.suite)
    dimension, models, own_tokenizer = models_of(config)
    ranks = here()
    ranks.check_same({"models": ", ".join(models.values())})
    progress = progress and ranks.first
    if config.against_effects:
        effects_of(config.against_effects)  # checks the runs before any model is loaded
    trusted = config.trust_remote_code
    for name, source in models.items():
        check_model_source(source, f"model {name}", trusted)
    check_compared(config)
    check_out(config, out, overwrite, inputs)
    device = resolve_device(config.device)
    sources = {FORGET: config.forget, RETAIN: config.retain, HOLDOUT: config.holdout}
    sources |= checked_probes(config.probes)
    sets, tokenizer = read_sets_of(config, sources, own_tokenizer, "model", progress)
    harness = None
    if config.lm_eval_tasks:
        reads = tokenizer or tokenizer_of(config, True, own_tokenizer, "model")
        harness = Harness(config, reads, sources)
    with evaluation_folder(config, out, overwrite, inputs, report) as folder:
        evaluator: Evaluator | None = None
        where: dict[str, Any] = {}

        def measured(source: str, what: str) -> xr.Dataset:
            """The measures of one model, which is freed at the end of this call.

            The loop itself must not hold the model. Up to Python 3.12, a frame whose variables
            something has read keeps what they held, and torch reads those of all frames.
            """
            nonlocal evaluator, where
            model = load_by_config(
                source, config, device, partial(compared_bytes, config), what=what
            )
            if evaluator is None:
                where = folder.machine(device, model)
                evaluator = Evaluator(
                    model,
                    tokenizer,
                    Evaluating(**config.fields(Evaluating)),
                    sets,
                    config.reference,
                    config.retain_model,
                )
                check_recorded(config.rows, evaluator.rows)
            measures = evaluator.measure(model, progress=progress, what=what)
            if harness is None:
                return measures
            return harness.beside(measures, model, progress=progress, what=what)

        results = []
        for name, source in models.items():
            results.append(measured(source, f"model {name}" if len(models) > 1 else "model"))
            if ranks.size > 1:
                gc.collect()  # FSDP's modules hold each other
        assert evaluator is not None
        dataset = results[0]
        if len(models) > 1 or dimension == "step":
            along = xr.DataArray(list(models), dims=dimension, name=dimension)
            dataset = xr.concat(results, along, combine_attrs="override")
        if config.against_effects:
            dataset = against_effects(config.against_effects, dataset)
        if assess is not None:
            found = Evaluated(dimension, models, sets, tokenizer, device, evaluator.token_budget)
            dataset = assess(dataset, found)
        folder.save(dataset, where, evaluator.token_budget, evaluator.rows)
    return dataset


def models_of(config: EvaluateConfig) -> tuple[str, dict[str | int, str], str]:
    """The axis of the models, the models by their coordinate on it, and the tokenizer's place.

    For runs that are set against effects the original model comes first.

    Raises:
        InputError: a run holds no model.
    """
    if config.against_effects:
        models, own_tokenizer, _ = models_of_runs(config.against_effects)
        return "model", models, own_tokenizer
    if config.run is None:
        return "model", dict(short_names(config.models).items()), config.models[0]
    folder = user_path(config.run)
    begun = load_config(folder / CONFIG) if is_there(folder / CONFIG) else None
    found: dict[str | int, str] = {}
    if isinstance(begun, UnlearnConfig):
        found[0] = begun.model
    if not found or any(folder.glob("checkpoint-*")):
        checkpoints = find_checkpoints(f"{folder}/checkpoint-*")
        found |= {step: str(path) for step, path in checkpoints.items()}
    if isinstance(begun, UnlearnConfig):
        if is_there(folder / "model"):
            found[begun.steps] = str(folder / "model")
        return "step", dict(sorted(found.items())), begun.tokenizer or begun.model
    return "step", found, next(iter(found.values()))
