"""The model, data, tokenizer, device and threads that a config names: checked, loaded, recorded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from geffect_fast.capture.parts import mesh_over
from geffect_fast.data.memory import free_memory
from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model, load_parts, load_tokenizer, resolve_device
from geffect_fast.measure.precision import dtype_name
from geffect_fast.measure.sources import Sources, read_sources
from geffect_fast.objectives.ranges import expand_list
from geffect_fast.ranks import here
from geffect_fast.settings import RunConfig
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.terminal import print_notice

PART_FOR_MODEL = 0.8
"""Part of a device's free memory that a model and the gradients beside it may take. The rest is for
batches."""


def load_by_config(
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


def recorded_machine(threads: int, device: torch.device, model: Any) -> dict[str, Any]:
    """Threads, device and precision of a run, as its config records them."""
    return {"threads": threads, "device": str(device), "dtype": dtype_name(model.dtype)}


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
