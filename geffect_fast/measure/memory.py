"""Checks that a profile fits in memory, and advice for the user where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from geffect_fast.data.memory import free_memory
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.errors import GEffectError, GEffectWarning, InputError, OutOfMemoryError
from geffect_fast.trying import no_memory


@contextmanager
def within_budget(token_budget: TokenBudget, *, one_sample: bool = False) -> Iterator[None]:
    """Run batches inside; where memory runs out all the same, say what to try.

    Args:
        token_budget: of the batches; it may have been halved by the time memory runs out.
        one_sample: whether every batch inside is one sample, which no budget divides.

    Raises:
        OutOfMemoryError: memory ran out; one line, in place of the allocator's many.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, GEffectError) or not no_memory(error):
            raise
        if not one_sample and not token_budget.exhausted:
            half = token_budget.tokens // 2
            raise OutOfMemoryError(
                f"out of memory with a token budget of {token_budget.tokens}; give a smaller one, "
                f"such as --token-budget {half} (token_budget={half})"
            ) from error
        raise OutOfMemoryError(
            f"out of memory with a token budget of {token_budget.tokens}, which is one sample a "
            "batch; shorten the longest samples (--max-length finds them), give fewer objectives, "
            "or use --dtype bfloat16"
        ) from error


def check_memory(
    n_gradients: int,
    n_elements: int,
    device: torch.device,
    shape: tuple[int, ...],
    out: str | Path | None,
) -> None:
    """Raise `InputError` where whole gradients, or the result itself, do not fit in memory.

    Args:
        n_gradients, n_elements: number of whole gradients, and of elements in each.
        device: where the gradients are kept.
        shape: of the effects, held as fp64.
        out: the file that effects are written to; None: they stay in memory.
    """
    needed, free = 4 * n_gradients * n_elements, free_memory(device)
    if needed > free:
        raise InputError(
            f"objectives: the whole gradients of {n_gradients} take {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; profile fewer at once, or resolve by sample with "
            "norms=False (--no-norms)"
        )
    needed, free = 8 * prod(shape), free_memory(torch.device("cpu"))
    if out is None and needed > free:
        raise InputError(
            f"resolve: the result takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free; resolve by 'group' in place of 'parameter', profile fewer objectives, or give "
            "out=FILE with 'sample' and 'position' or 'token' (a run folder is written that way)"
        )


def tell_of_copies(n_gradients: int, n_risks: int, n_elements: int, device: torch.device) -> None:
    """Warn that whole gradients are kept in the CPU's memory, and of the cost.

    Args:
        n_gradients: number of whole gradients that are kept.
        n_risks: number of them that every batch reads.
        n_elements: number of elements in each.
        device: the GPU that lacks the memory.
    """
    of_one, free = 4 * n_elements / 2**30, free_memory(device) / 2**30
    warnings.warn(
        f"{n_gradients} whole gradients take {n_gradients * of_one:.1f} GiB, and {free:.1f} GiB "
        f"are free on {device}: they stay in the CPU's memory, and every batch copies "
        f"{n_risks * of_one:.1f} GiB to the GPU; a larger token budget means fewer batches, so "
        "give the largest that fits",
        GEffectWarning,
        stacklevel=3,
    )


def check_place_memory(shape: tuple[int, ...]) -> None:
    """Raise `InputError` where masses by place do not fit in memory.

    Unlike effects, they are not written to a file while they are computed.

    Args:
        shape: of all arrays by place in one, held as fp64: masses, opposed masses and shares.
    """
    needed, free = 8 * prod(shape), free_memory(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"conflicts: by position they take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free; resolve by 'group' in place of 'parameter', or profile fewer objectives or "
            "rows"
        )
