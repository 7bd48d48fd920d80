"""Runs by a config: `profile` and `sweep` write a folder, `check` writes nothing."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.data import read_refusals, read_rows
from geffect_fast.measure.by_config import (
    check_sources,
    gradient_bytes,
    load_by_config,
    on_threads,
    read_sources_of,
    recorded_machine,
    tokenizer_of,
)
from geffect_fast.measure.check import Check, check
from geffect_fast.measure.precision import WIDER, coarsest_dtype, widened_bytes
from geffect_fast.measure.profile import profile
from geffect_fast.measure.sources import Sources
from geffect_fast.measure.sweep import sweep
from geffect_fast.ranks import here
from geffect_fast.settings import Measuring, ProfileConfig, Reading
from geffect_fast.storage.disk import shared_folder
from geffect_fast.storage.inputs import Inputs, check_replayed, inputs_of, summed_beside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.storage.run_folder import (
    RESULTS,
    Reporter,
    check_free,
    open_run,
    staged_run,
    write_config,
)
from geffect_fast.storage.save_run import add_report, save_run
from geffect_fast.terminal import print_notice

if TYPE_CHECKING:
    import xarray as xr


def execute(
    config: ProfileConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    inputs: Inputs = MappingProxyType({}),
) -> xr.Dataset:
    """Profile or sweep as a config says and write the run folder.

    The config saved beside the results holds what was chosen on the way (token budget, engine,
    threads, device, precision), so a replay on the same machine gives bitwise the same numbers.

    Args:
        config: the run.
        out: run folder.
        overwrite: whether a run in `out` may be replaced.
        progress: whether to show progress bars.
        report: adds tables and plots to the folder, such as `geffect_fast.report.write_report`.
        inputs: files that are read beside those that the config names: the config's own file.

    Returns:
        The result, as `geffect_fast.profile` or `sweep` returns it, on every rank. By sample and
        position or token the Dataset reads from the run folder when values are used.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: nothing has been written then.
    """
    ranks = here()
    with ranks.together(config.command):
        if ranks.first:
            dataset = _executed(config, out, overwrite, progress, report, inputs)
            ranks.meet()
            return dataset
        device, sources, tokenizer = read_sources_of(config, progress=False)
        with on_threads(config.threads):
            _, dataset = _measured(config, device, sources, tokenizer, None, progress=False)
        ranks.meet()  # from here on the folder is complete
        if _writes_straight_to_folder(config):
            dataset.close()
            dataset = open_run(out, lazy=True)
        return dataset


def _executed(
    config: ProfileConfig,
    out: str | Path,
    overwrite: bool,
    progress: bool,
    report: Reporter | None,
    inputs: Inputs,
) -> xr.Dataset:
    """Do the work of `execute` on the rank that writes."""
    read = inputs_of(config) | dict(inputs)
    check_free(out, overwrite, read)
    device, sources, tokenizer = read_sources_of(config, progress)
    with (
        locked(out) as folder,
        on_threads(config.threads) as threads,
        summed_beside(inputs_of(config)) as sums,
        ExitStack() as stack,
    ):
        staging = None
        if _writes_straight_to_folder(config):
            staging = stack.enter_context(staged_run(out, overwrite, read, sums))
        model, dataset = _measured(
            config, device, sources, tokenizer, staging or folder, progress=progress
        )
        rows = json.loads(dataset.attrs["digests"])
        check_recorded(config.rows, rows)
        check_replayed(inputs.get("--config"), config, sums())
        replay = config.model_copy(
            update={
                "token_budget": int(dataset.attrs["token_budget"]),
                "engine": dataset.attrs["engine"],
                **recorded_machine(threads, device, model),
                "rows": rows,
            }
        )
        if staging is None:
            save_run(out, dataset, replay, overwrite, report, read, sums())
            return dataset
        dataset.close()
        write_config(replay, staging)
        stack.pop_all().close()
        dataset = open_run(out, lazy=True)
        try:
            add_report(folder, dataset, report)
        except BaseException:
            dataset.close()
            raise
    return dataset


def _writes_straight_to_folder(config: ProfileConfig) -> bool:
    """Whether effects are written straight to the folder.

    By sample and position or token they may be larger than memory. A sweep's effects are not
    written straight, since its result gets coordinates first.
    """
    large = config.resolve[-2:] in (("sample", "position"), ("sample", "token"))
    return large and config.command == "profile"


def _measured(
    config: ProfileConfig,
    device: torch.device,
    sources: Sources,
    tokenizer: Any,
    folder: Path | None,
    *,
    progress: bool,
) -> tuple[Any, xr.Dataset]:
    """Load the model of a config and measure it; the model and the result.

    Args:
        config: of the run.
        device, sources, tokenizer: of `read_sources_of`.
        folder: the folder that the first rank writes to; None on every other rank.
        progress: whether to show progress bars.

    Raises:
        InputError: this rank does not see the folder.
    """
    folder = shared_folder(folder, here())
    beside = partial(gradient_bytes, n_risks=len(sources.sets))
    model = load_by_config(config.model, config, device, beside)
    run: Any = sweep
    step: dict[str, Any] = {}
    if config.command == "profile":
        run = profile
        step = {"metric": config.metric, "step_of": config.step_of}
        step |= {"optimizer": config.optimizer_state, "second_order": config.second_order}
        step["conflicts"] = config.conflicts
    return model, run(
        model,
        tokenizer,
        **sources.arguments(),
        objectives=list(config.objectives),
        reference_model=config.reference,
        **config.fields(Measuring),
        **step,
        out=folder / RESULTS if _writes_straight_to_folder(config) else None,
        progress=progress,
    )


def execute_check(config: ProfileConfig, samples: int, *, progress: bool = False) -> Check:
    """Check the model of a config on the first rows of its forget data; nothing is written.

    Args:
        config: the config of a profile; its retain data is not read.
        samples: number of rows.
        progress: whether to show progress bars.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: as `geffect_fast.check` raises them.
    """
    device = check_sources(config)
    tell = print_notice if progress else None
    data = read_rows(config.forget, name="data", data_format=config.data_format, tell=tell)
    refusals = None if config.refusals is None else read_refusals(config.refusals)
    tokenizer = tokenizer_of(config, "input_ids" not in data[0], config.model, "model")
    with on_threads(config.threads):
        return check(
            load_by_config(config.model, config, device, checked_bytes),
            tokenizer,
            data=data,
            objectives=list(config.objectives),
            samples=samples,
            refusals=refusals,
            reference_model=config.reference,
            progress=progress,
            **config.fields(Reading),
        )


def checked_bytes(model: nn.Module) -> int:
    """Bytes that a check takes beside a model: gradients, and a copy in a wider precision.

    No copy is made of an fp64 model; one in fp64 is counted all the same.
    """
    dtype = coarsest_dtype(model)
    return gradient_bytes(model, 1) + widened_bytes(model, WIDER.get(dtype, dtype))
