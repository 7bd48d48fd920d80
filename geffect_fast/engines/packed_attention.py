"""Attention of packed sequences on a CPU: each by itself, without a mask between all tokens.

Under one mask, a packed batch of `n` sequences costs attention `n` times what its sequences cost
alone, and on a CPU most of that is not even arithmetic. Here every sequence is handed to
transformers' own sdpa function, exactly as it is when the model runs on that sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.data.batch import Batch
from geffect_fast.errors import UnsupportedModelError

NAME = "geffect_fast_packed"
"""Under which transformers knows the function below."""

_LENGTHS: ContextVar[tuple[int, ...]] = ContextVar("_LENGTHS")

_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings that cut attention short: sequences that reach no further than these do not notice."""


@contextmanager
def packed_attention(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Attention by sequence inside, for models that take their attention from transformers' table.

    To be left only after everything that runs the model's modules once more (a vjp, a jvp). A model
    with attention of its own, with another one chosen, on another device, or with sequences longer
    than its window runs as it is.

    Args:
        model: of transformers; its configs are restored at the end.
        batch: on the model's device.
    """
    configs = _served(model, batch)
    if not configs:
        yield
        return
    lengths = tuple(batch.sequence_lengths)
    _register()
    token = _LENGTHS.set(lengths)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
        _LENGTHS.reset(token)


def splits_attention(model: nn.Module, batch: Batch) -> bool:
    """Whether `packed_attention` changes how `model` runs on `batch`."""
    return bool(_served(model, batch))


def _served(model: nn.Module, batch: Batch) -> list[Any]:
    """The configs to change for `batch`; empty where the model runs as it is."""
    if not batch.packed or len(batch.roles) == 1 or batch.input_ids.device.type != "cpu":
        return []
    configs = _configs(model)
    return configs if max(batch.sequence_lengths) <= reach(configs) else []


def _configs(model: nn.Module) -> list[Any]:
    """The configs that say which attention runs; empty unless all of them say sdpa."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if not getattr(module, "_supports_attention_backend", True):
            return []  # a model with attention of its own
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    chosen = {config._attn_implementation for config in configs.values()}
    return list(configs.values()) if chosen == {"sdpa"} else []


def reach(configs: list[Any]) -> float:
    """Tokens of the longest sequence whose attention no window cuts short."""
    windows = [getattr(config, name, None) for config in configs for name in _WINDOWS]
    return min((window for window in windows if isinstance(window, int)), default=float("inf"))


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A name that the table of masks does not know makes transformers build none.
    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `(1, heads, total_tokens, d)` as transformers' own, sequence by sequence."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lengths = _LENGTHS.get()
    total = sum(lengths)
    if attention_mask is not None or any(x.shape[2] != total for x in (query, key, value)):
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention over other tokens than the batch's; run it one "
            "sample at a time"
        )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    # Neighbours of one length are one call.
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *qkv in zip(
        runs, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True
    ):
        q, k, v = (x.unflatten(2, (count, length))[0].transpose(0, 1) for x in qkv)
        outputs.append(sdpa(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None], None
