"""A relearning from its config to its folder: models loaded and trained one after another."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.data.rows import read_rows
from geffect_fast.measure.execute import machine, on_threads
from geffect_fast.measure.models import load_model, load_tokenizer, resolve_device
from geffect_fast.relearn_settings import RelearnConfig, Relearning
from geffect_fast.storage.evaluation import save_evaluation
from geffect_fast.storage.inputs import Inputs, check_replayed, inputs_of, summed_beside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.storage.run_folder import check_free
from geffect_fast.training.relearn import Relearner

if TYPE_CHECKING:
    import xarray as xr


def execute_relearn(
    config: RelearnConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Relearn with the models of a config and write the run folder; no model is kept.

    Args:
        config: the run.
        out: run folder.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        inputs: what else is read, beside what the config names: its own file.

    Returns:
        The result, as `geffect_fast.relearn` returns it.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written then.
    """
    trusted = config.trust_remote_code
    models = config.models()
    for name, source in models.items():
        check_model_source(source, f"{name} model", trusted)
    read = inputs_of(config) | dict(inputs)
    check_free(out, overwrite, read)
    device = resolve_device(config.device)
    forget, holdout = (
        None if source is None else read_rows(source, name=name, data_format=config.data_format)
        for name, source in (("forget", config.forget), ("holdout", config.holdout))
    )
    tokenizer = None
    if config.tokenizer is not None or any(
        s and "input_ids" not in s[0] for s in (forget, holdout)
    ):
        tokenizer = load_tokenizer(
            config.tokenizer or config.model,
            "tokenizer" if config.tokenizer else "model",
            trust_remote_code=trusted,
        )
    settings = Relearning(**config.fields(Relearning))
    relearner = Relearner(tokenizer, settings, forget, holdout, config.retrained)
    chosen: dict[str, Any] = {}
    with (
        locked(out),
        on_threads(config.threads) as threads,
        summed_beside(inputs_of(config)) as sums,
    ):

        def load(name: str, source: str) -> nn.Module:
            what = f"{name} model"
            model = load_model(source, config.dtype, str(device), what, trust_remote_code=trusted)
            chosen.setdefault("machine", machine(threads, device, model))
            return model

        dataset = relearner.of(models, load, recorded=config.rows, progress=progress)
        check_replayed(inputs.get("--config"), config, sums())
        replay = config.model_copy(
            update={
                "metrics": tuple(map(str, config.metrics)),
                "token_budget": relearner.token_budget,
                "rows": relearner.rows,
                **chosen["machine"],
            }
        )
        save_evaluation(out, dataset, replay, overwrite, read, sums())
    return dataset
