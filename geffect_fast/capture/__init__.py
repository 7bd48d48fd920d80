"""Capture of layer inputs and output gradients, by parameter and by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from geffect_fast.capture.compat import eagerly
from geffect_fast.capture.factors import Explicit, Factor, GramOuter, Lookup, Outer, RowSum
from geffect_fast.capture.leaves import leaves_of
from geffect_fast.capture.outside_use import OutsideUse
from geffect_fast.capture.plan import Plan
from geffect_fast.capture.recorder import Recorder, Recording
from geffect_fast.capture.segments import Segments, checked_offsets
from geffect_fast.errors import UnsupportedModelError

__all__ = [
    "Explicit",
    "Factor",
    "GramOuter",
    "Lookup",
    "Outer",
    "OutsideUse",
    "Plan",
    "Recorder",
    "Recording",
    "RowSum",
    "Segments",
    "leaves_of",
]


@contextmanager
def capture(
    model: nn.Module, cu_seqlens: Tensor | None = None
) -> Iterator[dict[str, list[Factor]]]:
    """Record the layer inputs and output gradients of every backward inside the `with` block.

    Nothing is left on the model afterwards, also after an exception. The model computes the same
    outputs and gradients as without `capture`. Inside the block nothing of the model runs compiled,
    and no activations are computed a second time (gradient checkpointing).

    Rows are assigned to samples by their place alone, because the losses of single samples are not
    known here. A model that swaps axes or reorders samples goes unnoticed; `gf.functional` notices.

    Args:
        model: any `nn.Module` in eval mode, or without dropout; frozen parameters are skipped.
        cu_seqlens: `(n_samples + 1,)` offsets where samples are packed into one row. Without
            offsets the first axis of the model's input (`input_ids`, or its first tensor) is the
            sample axis.

    Yields:
        The factors of every trainable parameter that took part, by the parameter's name in
        `model.named_parameters()`, one factor for each call of its module: `Outer` (inputs `a`,
        output gradients `g`), `Lookup`, `RowSum` or `Explicit`. `factor.gradient(i)` is the
        gradient of sample `i`.

    Raises:
        InputError: no model, active dropout, nothing trainable, or offsets that do not fit.
        UnsupportedModelError: the rows of a module cannot be told apart by sample; or, at the end
            of the block, a parameter was used outside its own module.

    Examples:
        >>> with gf.capture(model) as records:
        ...     model(input_ids=ids, labels=ids).loss.backward()
        >>> records["model.layers.0.mlp.up_proj.weight"][0].a.shape  # (total_tokens, d_in)
    """
    records: dict[str, list[Factor]] = {}

    def keep(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        records.setdefault(name, []).extend(factors)

    plan = Plan.of(model)
    recorder = Recorder(plan, keep)

    def see_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        first = kwargs.get("input_ids", tensors[0] if tensors else None)
        if cu_seqlens is not None:
            n_tokens = None if first is None else prod(first.shape[:2])
            recorder.segments = Segments.packed(checked_offsets(cu_seqlens, n_tokens))
        elif first is not None:
            recorder.segments = Segments.rectangular(first.shape)

    handle = plan.model.register_forward_pre_hook(see_input, with_kwargs=True, prepend=True)
    try:
        with recorder, eagerly(model), OutsideUse(plan, recorder.running) as outside:
            yield records
            recorder.finish()
        for name in outside.found:
            raise UnsupportedModelError(
                f"parameter '{name}' is used outside its own module's forward, which `capture` "
                "does not see; freeze it, or use gf.functional, which does"
            )
    finally:
        handle.remove()
