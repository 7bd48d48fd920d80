"""Packed sequences laid side by side, so that attention sees no token of another sequence.

Sequences of like lengths are padded to the longest of them and run as one batch: a few calls a
layer, whatever the number of sequences, and no `T x T` matrix of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geffect_fast.engines.dual.tensor import Dual
from geffect_fast.transfer import on_device

SHORT = 64
"""Number of tokens up to which sequences form one group, whatever their lengths."""

SHARE = 0.5
"""Fraction of a group's longest sequence that others must have in length to join the group."""


@dataclass(frozen=True)
class Group:
    """Sequences that are padded to one length.

    Attributes:
        index: `(n, length)` int64, the token of the batch at each place; padding repeats the last.
        hidden: `(n, 1, 1, length)` bool, where there is padding; None where there is none.
    """

    index: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Packing:
    """The layout of a packed batch's sequences side by side.

    Attributes:
        groups: groups of sequences.
        place: `(total_tokens,)` int64, the place of each token in all groups one after another.
    """

    groups: tuple[Group, ...]
    place: Tensor
    _blocks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """The packing of a batch of sequences of `lengths`, one behind the other."""
        order = sorted(range(len(lengths)), key=lambda q: -lengths[q])
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        together: list[list[int]] = []
        for q in order:
            longest = lengths[together[-1][0]] if together else 0
            if longest and (longest <= SHORT or lengths[q] >= SHARE * longest):
                together[-1].append(q)
            else:
                together.append([q])
        place = torch.empty(starts[-1], dtype=torch.long)
        groups, before = [], 0
        for members in together:
            longest = lengths[members[0]]
            first = torch.tensor([starts[q] for q in members])[:, None]
            own = torch.tensor([lengths[q] for q in members])[:, None]
            at = torch.arange(longest)
            index = first + torch.minimum(at, own - 1)
            hidden = at >= own
            real = ~hidden
            place[index[real]] = before + torch.arange(index.numel()).view_as(index)[real]
            before += index.numel()
            ragged = lengths[members[-1]] < longest
            padding = on_device(hidden[:, None, None], device) if ragged else None
            groups.append(Group(on_device(index, device), padding))
        return cls(tuple(groups), on_device(place, device))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.groups[0].index.shape[1]

    def masks(self, mask: Any) -> bool:
        """Whether a mask is one between all tokens of the batch."""
        n = len(self.place)
        still = isinstance(mask, Tensor) and not isinstance(mask, Dual)
        return still and mask.shape[-2:] == (n, n) and mask.numel() == n * n

    def block(self, mask: Tensor, own: int) -> Tensor:
        """The mask of the `own`-th group, `(n, 1, length, length)`, cut from one of all tokens."""
        key = (id(mask), own)
        if key not in self._blocks:
            group = self.groups[own]
            index = group.index
            found = mask.view(mask.shape[-2:])[index[:, :, None], index[:, None, :]][:, None]
            if group.hidden is not None:
                seen = mask.dtype == torch.bool
                found.masked_fill_(group.hidden, False if seen else -torch.inf)
            self._blocks[key] = found
            self._blocks[id(mask), -1] = mask  # kept, so that no other mask takes its id
        return self._blocks[key]

    def apart(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attend: Callable[..., Any],
    ) -> Tensor:
        """Attention `(1, heads, total_tokens, d)` of each group by itself.

        Args:
            query, key, value: `(1, heads, total_tokens, d)`, all, some or none of them duals.
            attend: takes query, key and value of a group, `(n, heads, length, d)`, and the group's
                number, and returns the output of the same layout.
        """
        flat = [_tokens(x) for x in (query, key, value)]
        outputs = []
        for number, group in enumerate(self.groups):
            n, length = group.index.shape
            index = group.index.view(-1)
            own = [
                _like(x, t.index_select(1, index).view(len(t), n, length, *t.shape[2:]))
                for x, t in zip((query, key, value), flat, strict=True)
            ]
            out = attend(*own, number)
            outputs.append(_stack(out).transpose(2, 3).flatten(1, 2))
        every = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        whole = every.index_select(1, self.place)[:, None].transpose(2, 3)
        return Dual.of(whole) if isinstance(out, Dual) else whole[0]


def _stack(x: Tensor) -> Tensor:
    """The stack of a dual; a tensor that does not move, with a leading axis."""
    return x.stack if isinstance(x, Dual) else x[None]


def _tokens(x: Tensor) -> Tensor:
    """`(1, heads, n, d)` as `(1 + M, n, heads, d)`; M is 0 for a tensor that does not move."""
    return _stack(x)[:, 0].transpose(1, 2)


def _like(x: Tensor, tokens: Tensor) -> Tensor:
    """`(1 + M, n, length, heads, d)` as attention takes it, moving where `x` moves."""
    by_head = tokens.transpose(2, 3)
    return Dual.of(by_head) if isinstance(x, Dual) else by_head[0]


PACKING: ContextVar[Packing | None] = ContextVar("PACKING", default=None)
"""The packing of the batch under way."""


@contextmanager
def packing(of: Packing | None) -> Iterator[None]:
    """Inside, `of` is the packing of the batch under way (`PACKING`)."""
    token = PACKING.set(of)
    try:
        yield
    finally:
        PACKING.reset(token)
