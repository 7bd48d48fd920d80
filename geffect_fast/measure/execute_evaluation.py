"""An evaluation from its config to its folder: models loaded one after another, never two kept."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from geffect_fast.data.rows import read_rows
from geffect_fast.evaluation_settings import EvaluateConfig, Evaluating
from geffect_fast.measure.evaluate import Evaluator, checked_probes
from geffect_fast.measure.execute import machine, on_threads
from geffect_fast.measure.models import load_model, load_tokenizer, resolve_device
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.paths import find_checkpoints, is_there, short_names, user_path
from geffect_fast.settings import UnlearnConfig
from geffect_fast.storage.evaluation import save_evaluation
from geffect_fast.storage.inputs import Inputs, check_replayed, inputs_of, summed_beside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.run_folder import CONFIG, check_free
from geffect_fast.storage.run_yaml import load_config

if TYPE_CHECKING:
    import xarray as xr


def execute_evaluation(
    config: EvaluateConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Evaluate the models of a config and write the run folder.

    Args:
        config: the run.
        out: run folder.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        inputs: what else is read, beside what the config names: its own file.

    Returns:
        The result of one model as `geffect_fast.evaluate` returns it; those of several along
        `model`, or along `step` for the checkpoints of a run.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written then.
    """
    import xarray as xr

    resolved_metrics(config.metrics, config.suite)
    dimension, models, own_tokenizer = models_of(config)
    trusted = config.trust_remote_code
    for name, source in models.items():
        check_model_source(source, f"model {name}", trusted)
    for what, other in (("reference", config.reference), ("retain_model", config.retain_model)):
        if other is not None and not (what == "retain_model" and config.is_log()):
            check_model_source(other, what, trusted)
    read = inputs_of(config) | dict(inputs)
    check_free(out, overwrite, read)
    device = resolve_device(config.device)
    sources: dict[str, Any] = {"forget": config.forget, "retain": config.retain}
    sources |= {} if config.holdout is None else {"holdout": config.holdout}
    sources |= checked_probes(config.probes)
    sets = {
        name: read_rows(source, name=name, data_format=config.data_format)
        for name, source in sources.items()
    }
    has_text = any("input_ids" not in rows[0] for rows in sets.values())
    tokenizer = None
    if config.tokenizer is not None or has_text:
        tokenizer = load_tokenizer(
            config.tokenizer or own_tokenizer,
            "tokenizer" if config.tokenizer else "model",
            trust_remote_code=trusted,
        )
    with (
        locked(out),
        on_threads(config.threads) as threads,
        summed_beside(inputs_of(config)) as sums,
    ):
        evaluator, results = None, []
        for name, source in models.items():
            what = f"model {name}" if len(models) > 1 else "model"
            model = load_model(source, config.dtype, str(device), what, trust_remote_code=trusted)
            if evaluator is None:
                chosen = machine(threads, device, model)
                evaluator = Evaluator(
                    model,
                    tokenizer,
                    Evaluating(**config.fields(Evaluating)),
                    sets,
                    config.reference,
                    config.retain_model,
                )
                check_recorded(config.rows, evaluator.rows)
            results.append(evaluator.measure(model, progress=progress, what=what))
            del model  # before the next one is loaded
        assert evaluator is not None
        dataset = results[0]
        if len(models) > 1 or dimension == "step":
            along = xr.DataArray(list(models), dims=dimension, name=dimension)
            dataset = xr.concat(results, along, combine_attrs="override")
        check_replayed(inputs.get("--config"), config, sums())
        replay = config.model_copy(
            update={
                "metrics": tuple(map(str, config.metrics)),
                "token_budget": evaluator.token_budget,
                "rows": evaluator.rows,
                **chosen,
            }
        )
        save_evaluation(out, dataset, replay, overwrite, read, sums())
    return dataset


def models_of(config: EvaluateConfig) -> tuple[str, dict[str | int, str], str]:
    """The dimension that models lie along, the models by place on it, and where a tokenizer lies.

    Raises:
        InputError: a run holds no model.
    """
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
