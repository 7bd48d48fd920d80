"""A run of `profile` or `sweep` from its config to its folder: check first, load, measure, save.

Loading of models and tokenizers by a config, `execute_check`, and helpers that other commands use
too stand here as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.capture.parts import mesh_over
from geffect_fast.data import read_refusals, read_rows
from geffect_fast.data.memory import free_memory
from geffect_fast.errors import InputError
from geffect_fast.measure.check import Check, check
from geffect_fast.measure.models import load_model, load_parts, load_tokenizer, resolve_device
from geffect_fast.measure.precision import WIDER, coarsest_dtype, widened_bytes
from geffect_fast.measure.profile import profile
from geffect_fast.measure.sources import Sources, read_sources
from geffect_fast.measure.sweep import sweep
from geffect_fast.objectives.ranges import expand_list
from geffect_fast.ranks import here
from geffect_fast.settings import Measuring, ProfileConfig, Reading, RunConfig
from geffect_fast.storage.disk import shared_folder
from geffect_fast.storage.inputs import Inputs, check_replayed, inputs_of, summed_beside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.model_folder import check_model_source
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

PART_FOR_MODEL = 0.8
"""Part of a device's free memory that a model and the gradients beside it may take; batches need
the rest."""


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
        if _streams(config):
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
        if _streams(config):
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
                **machine(threads, device, model),
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


def _streams(config: ProfileConfig) -> bool:
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
    model = loaded(config.model, config, device, beside)
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
        out=folder / RESULTS if _streams(config) else None,
        progress=progress,
    )


def loaded(
    source: str,
    config: Any,
    device: torch.device,
    beside: Callable[[nn.Module], int] = lambda model: 0,
    adapted: Callable[[nn.Module], nn.Module] = lambda model: model,
    what: str = "model",
    whole_on: torch.device | None = None,
) -> Any:
    """Load a model as a config says: the whole model, or this rank's part of it.

    Args:
        source: folder or hub id of the model.
        config: of a run; says whether ranks share out the model.
        device: of this rank.
        beside: gives, for the model, the bytes that are needed beside its weights on a rank that
            holds the whole model.
        adapted: changes the whole model before ranks share it out, for instance adds an adapter.
        what: the model's name in messages.
        whole_on: device of a model that is not shared out; None: this rank's device.

    Raises:
        InputError: the model is to be shared out, and this process is alone.
    """
    alone, trusted = here().size == 1, config.trust_remote_code
    if alone and config.shard in ("fsdp", "hsdp"):
        raise InputError(
            f"shard: {config.shard} shares a model out among ranks, and this process is alone; "
            "start several by torchrun --nproc-per-node, or leave it out"
        )
    whole = alone or config.shard == "none"
    if whole or (config.shard == "auto" and _fits(source, config, device, beside, what)):
        where = str(whole_on or device)
        return load_model(source, config.dtype, where, what, trust_remote_code=trusted)
    mesh = mesh_over(here(), device, by_host=config.shard == "hsdp")
    return load_parts(source, config.dtype, device, what, trusted, adapted, mesh)


def gradient_bytes(model: nn.Module, n_risks: int) -> int:
    """Bytes that the gradients of the risks take in fp32."""
    return 4 * n_risks * sum(p.numel() for p in model.parameters() if p.requires_grad)


def _fits(
    source: str,
    config: Any,
    device: torch.device,
    beside: Callable[[nn.Module], int],
    what: str,
) -> bool:
    """Whether a model and the bytes `beside` it leave room for batches on every rank's device.

    The answer comes from the model's sizes, before any rank reads the weights.
    """

    def needed() -> int:
        trusted = config.trust_remote_code
        model = load_model(source, config.dtype, "meta", what, trust_remote_code=trusted)
        return sum(p.nbytes for p in model.parameters()) + beside(model)

    ranks, room = here(), PART_FOR_MODEL * free_memory(device)
    n_bytes = ranks.by_first(needed)
    if device.type == "cpu":  # the ranks of one machine share its memory
        room /= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    return all(ranks.meet(n_bytes <= room))


def checked_bytes(model: nn.Module) -> int:
    """Bytes that a check takes beside a model: gradients, and a copy in a wider precision.

    The copy is of a 16-bit model in fp32. For fp32 and fp64 the model's own precision is counted.
    """
    dtype = coarsest_dtype(model)
    wide = WIDER[dtype] if dtype.itemsize < 4 else dtype
    return gradient_bytes(model, 1) + widened_bytes(model, wide)


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
            loaded(config.model, config, device, checked_bytes),
            tokenizer,
            data=data,
            objectives=list(config.objectives),
            samples=samples,
            refusals=refusals,
            reference_model=config.reference,
            progress=progress,
            **config.fields(Reading),
        )


def read_sources_of(config: RunConfig, progress: bool) -> tuple[torch.device, Sources, Any]:
    """Find the device and read data sets and tokenizer, so that errors show before a model loads.

    Args:
        config: the run.
        progress: whether to print in a line what the data sets were found to be.
    """
    device = check_sources(config)
    named = Sources.of(config.forget, config.retain, config.probes, config.refusals)
    objectives = [each.members[0].objective for each in expand_list(config.measured)]
    found: list[str] = []
    sources = read_sources(named, objectives, config.data_format, found.append)
    if progress:
        print_notice(*found)
    return device, sources, tokenizer_of(config, sources.has_text, config.model, "model")


def check_sources(config: RunConfig) -> torch.device:
    """The device of a config, after a check that its model and reference are there.

    Raises:
        InputError: a model is missing, as far as can be known before loading, or the device is not
            there, or is one GPU for several ranks.
    """
    check_model_source(config.model, trust_remote_code=config.trust_remote_code)
    if config.reference is not None:
        check_model_source(config.reference, "reference", config.trust_remote_code)
    device = resolve_device(config.device)
    if device.index is not None and here().size > 1:
        raise InputError(
            f"device: {config.device} is one GPU, and each rank has its own; give cuda, or leave "
            "it out"
        )
    return device


def tokenizer_of(config: Any, has_text: bool, own: str, what: str) -> Any:
    """The tokenizer that a config names; else that of the model `own`, or None without text."""
    trusted = config.trust_remote_code
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, trust_remote_code=trusted)
    if not has_text:
        return None
    return load_tokenizer(own, what, trust_remote_code=trusted)


def machine(threads: int, device: torch.device, model: Any) -> dict[str, Any]:
    """Threads, device and precision of a run, as its config records them."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"threads": threads, "device": str(device), "dtype": dtype}


@contextmanager
def on_threads(wanted: int | None) -> Iterator[int]:
    """Have torch use `wanted` CPU threads for the time of a run; yields the number in use."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
