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

from geffect_fast.data import SampleSet
from geffect_fast.errors import UnsupportedModelError


def still_up_to(model: nn.Module) -> float:
    """Tokens of the longest sequence with which no frequency of `model` changes; inf: of any."""
    limits = [math.inf]
    modules: Iterator[Any] = model.modules()
    for module in modules:
        for kind, prefix in _kinds(module):
            if "dynamic" in kind:
                limits.append(module.original_max_seq_len)
            elif kind == "longrope":
                settings = module.config.rope_parameters
                settings = settings[prefix.removesuffix("_")] if prefix else settings
                limits.append(settings["original_max_position_embeddings"])
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


def check_pairs(model: nn.Module, sample_set: SampleSet) -> None:
    """Refuse sequences of a sample that have frequencies of their own, as objectives read them.

    They share a forward, in which the shorter ones are extended to the longest.

    Raises:
        UnsupportedModelError: naming the first row.
    """
    still = still_up_to(model)
    for sample in sample_set.samples if still < math.inf else ():
        lengths = {len(q) for sequences in sample.sequences().values() for q in sequences}
        if len(lengths) > 1 and max(lengths) > still:
            raise UnsupportedModelError(
                f"{sample.place(sample_set.name)}: its answer and alternatives have "
                f"{min(lengths)} to {max(lengths)} tokens, and beyond {still:.0f} the model's "
                f"rotary frequencies follow the length; give max_length={still:.0f}, or leave out "
                "objectives that read alternatives"
            )


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
