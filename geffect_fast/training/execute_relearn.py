"""Execution of a relearning, from its config to its folder; models are trained one by one."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.measure.by_config import load_by_config
from geffect_fast.measure.evaluation_run import check_out, evaluation_folder, read_sets_of
from geffect_fast.measure.models import resolve_device
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.relearn_settings import RelearnConfig, Relearning
from geffect_fast.storage.inputs import Inputs
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.training.relearn import Relearner

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter


@on_all_ranks
def execute_relearn(
    config: RelearnConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Relearn with the models of a config and write the run folder; no model is kept.

    Args:
        config: the run.
        out: run folder.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        report: adds tables, plots and a page to the folder.
        inputs: files that are read beside those that the config names, such as the config's own
            file, by option.

    Returns:
        The result, as `geffect_fast.relearn` returns it.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written.
        UnfinishedError: the report failed; the numbers are written.
    """
    models = config.models()
    ranks = here()
    ranks.check_same({"models": ", ".join(map(str, models.values()))})
    for name, source in models.items():
        check_model_source(source, f"{name} model", config.trust_remote_code)
    check_out(config, out, overwrite, inputs)
    device = resolve_device(config.device)
    sources = {"forget": config.forget, "holdout": config.holdout}
    sets, tokenizer = read_sets_of(config, sources, config.model, "model", progress and ranks.first)
    settings = Relearning(**config.fields(Relearning))
    relearner = Relearner(tokenizer, settings, sets["forget"], sets["holdout"], config.retrained)
    where: dict[str, Any] = {}
    with evaluation_folder(config, out, overwrite, inputs, report) as folder:

        def load(name: str, source: str) -> nn.Module:
            what = f"{name} model"
            model: nn.Module = load_by_config(source, config, device, relearner.beside, what=what)
            where.update(where or folder.machine(device, model))
            return model

        dataset = relearner.run(models, load, recorded=config.rows, progress=progress)
        folder.save(dataset, where, relearner.token_budget, relearner.rows)
    return dataset
