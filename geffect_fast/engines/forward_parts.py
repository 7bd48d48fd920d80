"""Which parameters the forward engine moves together, in how many passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.data.memory import free_memory


@dataclass(frozen=True)
class Move:
    """Parameters that are moved together, along some of the directions, in one pass.

    Attributes:
        column: where on the result's axis of parameters or groups its effects are added.
        names: of the parameters.
        risks: the directions' numbers.
    """

    column: int
    names: tuple[str, ...]
    risks: tuple[int, ...]


def place_for_directions(plan: Plan, n_directions: int) -> torch.device | None:
    """Where the forward engine's directions are kept: on the CPU where a GPU has no room for them.

    Passes then bring over what they need. None: where the parameters are.
    """
    device = next(iter(plan.parameters.values())).device
    wanted = 4 * n_directions * sum(p.numel() for p in plan.parameters.values())  # in fp32
    full = device.type == "cuda" and wanted > free_memory(device) // 2
    return torch.device("cpu") if full else None


def moves_for(
    plan: Plan, columns: Sequence[int], n_directions: int, memory_bytes: int | None = None
) -> list[Move]:
    """One pass a column, or more where its directions do not fit on the device at once.

    All directions of a pass share the primal pass, so directions are kept together as long as
    they fit. An effect is the sum of the effects of its parameters, so those of one column are
    shared out over passes where even one direction does not fit.

    Args:
        plan: of the model.
        columns: for each parameter the number of its column.
        n_directions: M.
        memory_bytes: what the directions of one pass may take; None: half of what is free on a
            GPU, any number on a CPU, where the directions lie already.
    """
    device = next(iter(plan.parameters.values())).device
    if memory_bytes is None:
        memory_bytes = free_memory(device) // 2 if device.type == "cuda" else 2**62
    moves = []
    for column in range(max(columns) + 1):
        names = [name for name, c in zip(plan.parameters, columns, strict=True) if c == column]
        size = sum(_n_bytes(plan, name) for name in names)
        together = min(max(memory_bytes // max(size, 1), 1), n_directions)
        for first in range(0, n_directions, together):
            risks = tuple(range(first, min(first + together, n_directions)))
            for piece in _pieces(plan, names, memory_bytes):
                moves.append(Move(column, piece, risks))
    return moves


def _pieces(plan: Plan, names: Sequence[str], memory_bytes: int) -> Iterator[tuple[str, ...]]:
    """Neighbouring parameters whose sizes stay within the limit, where one alone does."""
    piece: list[str] = []
    used = 0
    for name in names:
        size = _n_bytes(plan, name)
        if piece and used + size > memory_bytes:
            yield tuple(piece)
            piece, used = [], 0
        piece.append(name)
        used += size
    yield tuple(piece)


def _n_bytes(plan: Plan, name: str) -> int:
    p = plan.parameters[name]
    return p.numel() * p.element_size()


def product_shares(plan: Plan, columns: Sequence[int]) -> list[float]:
    """Each column's share of a forward pass's products: of the elements that multiply a token."""
    multiplied = {
        name
        for own in plan.owners.values()
        if not isinstance(own.module, nn.Embedding)
        for name in own.names.values()
    }
    shares = torch.zeros(max(columns) + 1, dtype=torch.float64)
    for (name, p), column in zip(plan.parameters.items(), columns, strict=True):
        if p.dim() > 1 and name in multiplied:
            shares[column] += p.numel()
    return (shares / shares.sum().clamp(min=1)).tolist()
