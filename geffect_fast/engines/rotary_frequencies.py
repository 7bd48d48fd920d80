"""Rotary positions whose frequencies follow the longest sequence of a forward.

Of two of transformers' kinds, `dynamic` and `longrope`, a sequence longer than the model was first
trained on changes the frequencies of whatever shares its forward; `dynamic` keeps them for later
forwards too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def still_up_to(model: nn.Module) -> float:
    """Tokens of the longest sequence with which no frequency of `model` changes; inf: of any."""
    limits = [math.inf]
    for module in model.modules():
        for kind, prefix in _kinds(module):
            if "dynamic" in kind:
                limits.append(module.original_max_seq_len)  # type: ignore[arg-type]
            elif kind == "longrope":
                of = module.config.rope_parameters  # type: ignore[union-attr]
                of = of[prefix.removesuffix("_")] if prefix else of
                limits.append(of["original_max_position_embeddings"])
    return min(limits)


@contextmanager
def frequencies_at_first(model: nn.Module) -> Iterator[None]:
    """Inside, no frequency is left over from a longer sequence before; afterwards it is again.

    For one forward, of sequences of one length or of none longer than `still_up_to`.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    for module in model.modules():
        for kind, prefix in _kinds(module):
            if "dynamic" in kind:
                found.append((module, _start_again(module, prefix)))
    try:
        yield
    finally:
        for module, before in reversed(found):
            for name, value in before.items():
                setattr(module, name, value)


def _start_again(module: Any, prefix: str) -> dict[str, Any]:
    """Give a rotary module its first frequencies; what was there, by the attribute's name."""
    inv_freq, longest = f"{prefix}inv_freq", f"{prefix}max_seq_len_cached"
    before = {inv_freq: getattr(module, inv_freq)}
    before[longest] = getattr(module, longest, module.max_seq_len_cached)
    if hasattr(module, "attention_scaling"):
        before["attention_scaling"] = module.attention_scaling
    first = getattr(module, f"{prefix}original_inv_freq")
    setattr(module, inv_freq, first.to(before[inv_freq].device))
    setattr(module, longest, module.original_max_seq_len)
    return before


def _kinds(module: nn.Module) -> list[tuple[str, str]]:
    """The kinds of rotary positions that a module makes, each with what its buffers' names begin
    with: nothing, or a kind of layer."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return [(str(kind), f"{layer}_") for layer, kind in kinds.items()]
    return [] if kinds is None or not hasattr(module, "original_inv_freq") else [(str(kinds), "")]
