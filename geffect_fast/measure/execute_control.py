"""A run of `control` from its config to its folder: unlearned models are loaded one by one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.capture.compat import is_sharded
from geffect_fast.control_settings import ControlConfig, Controlling
from geffect_fast.errors import InputError
from geffect_fast.measure.by_config import load_by_config
from geffect_fast.measure.control import Control, check_save_names
from geffect_fast.measure.evaluation_run import (
    check_compared,
    check_out,
    compared_bytes,
    evaluation_folder,
    read_sets_of,
)
from geffect_fast.measure.evaluator import checked_probes
from geffect_fast.measure.models import resolve_device
from geffect_fast.metrics.base import FORGET, HOLDOUT, RETAIN
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.paths import user_path
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.storage.inputs import Inputs
from geffect_fast.storage.model_folder import check_model_source, check_new_folder, new_folder
from geffect_fast.storage.recorded_rows import check_recorded

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter


@on_all_ranks
def execute_control(
    config: ControlConfig,
    out: str | Path,
    *,
    save: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Control the unlearned models of a config and write the run folder.

    Args:
        config: the run.
        out: run folder.
        save: a new folder for the mixed models; None: the models are not saved.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        report: adds tables, plots and a page to the folder.
        inputs: files that are read beside those that the config names: the config's own file.

    Returns:
        The result, as `geffect_fast.control` returns it.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written then.
        UnfinishedError: the report failed; the numbers have been written.
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
    check_compared(config)
    check_out(config, out, overwrite, inputs)
    ranks = here()
    ranks.check_same({"models": ", ".join(map(str, (config.original, *methods.values())))})
    if not ranks.first:
        save = None
    if save is not None:
        check_save_names(check_new_folder(save, "--save"), methods)
    device = resolve_device(config.device)
    sources = {FORGET: config.forget, RETAIN: config.retain, HOLDOUT: config.holdout}
    sources |= checked_probes(config.probes)
    sets, tokenizer = read_sets_of(
        config, sources, config.original, "original", progress and ranks.first
    )

    with (
        evaluation_folder(config, out, overwrite, inputs, report) as folder,
        nullcontext() if save is None else new_folder(save, "--save") as saved,
    ):
        at_rest = torch.device("cpu")  # where whole models lie that are mixed
        beside = partial(compared_bytes, config)
        original: nn.Module = load_by_config(
            config.original, config, device, beside, what="original", whole_on=at_rest
        )
        decided = "fsdp" if is_sharded(original) else "none"
        held = decided if config.shard == "auto" else config.shard
        alike = config.model_copy(update={"shard": held})

        def load(name: str, source: str) -> Any:
            return load_by_config(source, alike, device, what=f"unlearned {name}", whole_on=at_rest)

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
        dataset = control.of(methods, load, saved, progress=progress)
        where = folder.machine(device, original)
        folder.save(dataset, where, control.token_budget, control.rows)
    return dataset


def _check_apart(out: str | Path, save: str | Path) -> None:
    """Raise `InputError` where the run folder and the models' folder are one, or nested."""
    run, models = (user_path(folder).resolve() for folder in (out, save))
    if run == models or run in models.parents or models in run.parents:
        raise InputError("--save and --out must be different folders, neither inside the other")
