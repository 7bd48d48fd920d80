"""A control from its config to its folder: unlearned models loaded one after another."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.control_settings import ControlConfig, Controlling
from geffect_fast.data.rows import read_rows
from geffect_fast.errors import InputError
from geffect_fast.measure.control import Control, check_save_names
from geffect_fast.measure.evaluate import checked_probes
from geffect_fast.measure.execute import machine, on_threads
from geffect_fast.measure.models import load_model, load_tokenizer, resolve_device
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.paths import user_path
from geffect_fast.storage.evaluation import save_evaluation
from geffect_fast.storage.inputs import Inputs, check_replayed, inputs_of, summed_beside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.model_folder import check_model_source, check_new_folder, new_folder
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.run_folder import check_free

if TYPE_CHECKING:
    import xarray as xr


def execute_control(
    config: ControlConfig,
    out: str | Path,
    *,
    save: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Control the unlearned models of a config and write the run folder.

    Args:
        config: the run.
        out: run folder.
        save: a new folder for the mixed models; None: they are not kept.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        inputs: what else is read, beside what the config names: its own file.

    Returns:
        The result, as `geffect_fast.control` returns it.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written then.
    """
    if save is not None:
        _check_apart(out, save)
    resolved_metrics(config.metric)
    resolved_metrics(config.metrics, config.suite)
    trusted = config.trust_remote_code
    methods = config.methods()
    check_model_source(config.original, "original", trusted)
    for name, source in methods.items():
        check_model_source(source, f"unlearned {name}", trusted)
    for what, other in (("reference", config.reference), ("retain_model", config.retain_model)):
        if other is not None and not (what == "retain_model" and config.is_log()):
            check_model_source(other, what, trusted)
    read = inputs_of(config) | dict(inputs)
    check_free(out, overwrite, read)
    if save is not None:
        check_save_names(check_new_folder(save, "--save"), methods)
    device = resolve_device(config.device)
    sources: dict[str, Any] = {"forget": config.forget, "retain": config.retain}
    sources |= {"holdout": config.holdout, **checked_probes(config.probes)}
    sets = {
        name: None
        if source is None
        else read_rows(source, name=name, data_format=config.data_format)
        for name, source in sources.items()
    }
    tokenizer = None
    if config.tokenizer is not None or any(s and "input_ids" not in s[0] for s in sets.values()):
        tokenizer = load_tokenizer(
            config.tokenizer or config.original,
            "tokenizer" if config.tokenizer else "original",
            trust_remote_code=trusted,
        )

    def load(source: str, what: str) -> nn.Module:
        return load_model(source, config.dtype, "cpu", what, trust_remote_code=trusted)

    with (
        locked(out),
        on_threads(config.threads) as threads,
        summed_beside(inputs_of(config)) as sums,
        nullcontext() if save is None else new_folder(save, "--save") as folder,
    ):
        original = load(config.original, "original")
        control = Control(
            original,
            tokenizer,
            Controlling(**config.fields(Controlling)),
            sets,
            config.reference,
            config.retain_model,
            device,
        )
        check_recorded(config.rows, control.rows)
        dataset = control.of(
            methods,
            lambda name, source: load(source, f"unlearned {name}"),
            folder,
            progress=progress,
        )
        check_replayed(inputs.get("--config"), config, sums())
        replay = config.model_copy(
            update={
                "metrics": tuple(map(str, config.metrics)),
                "token_budget": control.token_budget,
                "rows": control.rows,
                **machine(threads, device, original),
            }
        )
        save_evaluation(out, dataset, replay, overwrite, read, sums())
    return dataset


def _check_apart(out: str | Path, save: str | Path) -> None:
    """Raise `InputError` where the run folder and that of the models are not two."""
    run, models = (user_path(folder).resolve() for folder in (out, save))
    if run == models or run in models.parents or models in run.parents:
        raise InputError("--save and --out must be different folders, neither inside the other")
