"""What ranks that hold one copy of a model in parts send each other: parts to where rows are, or
rows to where parts are. Everything is on its way while this rank goes on, until it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from geffect_fast.capture.parts import holders, parts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Gathered:
    """A tensor that comes from the parts of it that ranks hold.

    Args:
        parts: `(M, *own shape)`, of a parameter's layout behind the first axis.
        of: the parameter that a rank has its part of.
    """

    def __init__(self, parts: Tensor, of: nn.Parameter) -> None:
        self._lengths = [rows.stop - rows.start for rows in parts_of(of)]
        self._came = _EqualParts(parts, 1, self._lengths, holders(of))

    def arrived(self) -> Tensor:
        """`(M, *shape)`."""
        return torch.cat(self._came.arrived(), 1)


class WholeRows:
    """Rows of all holders of a parameter, each of whom needs all of their columns.

    Args:
        own: `(rows, ...)` of this rank.
        lengths: how many rows each holder has.
        group: the holders.
    """

    def __init__(self, own: Tensor, lengths: Sequence[int], group: ProcessGroup) -> None:
        self._came = _EqualParts(own, 0, lengths, group)

    def arrived(self) -> Tensor:
        """`(all rows, ...)`, in the order of the holders."""
        return torch.cat(self._came.arrived())


class OwnColumns:
    """Rows of all holders of a parameter, of which each needs the columns of its part.

    Args:
        own: `(rows, d)` of this rank.
        lengths: how many rows each holder has.
        parts: which columns each of them needs.
        group: the holders.
    """

    def __init__(
        self, own: Tensor, lengths: Sequence[int], parts: Sequence[slice], group: ProcessGroup
    ) -> None:
        width = (parts[group.rank()].stop - parts[group.rank()].start,)
        self._shape = (sum(lengths), *width)
        sent = torch.cat([own[:, part].reshape(-1) for part in parts])
        self._into = own.new_empty(sum(lengths) * width[0])
        self._held = (
            sent,
            dist.all_to_all_single(
                self._into,
                sent,
                [n * width[0] for n in lengths],
                [len(own) * (part.stop - part.start) for part in parts],
                group=group,
                async_op=True,
            ),
        )

    def arrived(self) -> Tensor:
        """`(all rows, own columns)`, in the order of the holders."""
        self._held[1].wait()
        return self._into.view(self._shape)


class _EqualParts:
    """Tensors of one shape but for an axis, along which they are filled up: collectives take equal
    ones."""

    def __init__(self, own: Tensor, axis: int, lengths: Sequence[int], group: ProcessGroup) -> None:
        self._axis, self._lengths = axis, lengths
        missing = max(lengths) - own.shape[axis]
        sent = pad(own, [*[0, 0] * (own.dim() - 1 - axis), 0, missing]).contiguous()
        self._into = sent.new_empty(len(lengths), *sent.shape)
        # The name that some versions know alone, and the one that others do.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._held = sent, gather(self._into.flatten(0, 1), sent, group=group, async_op=True)

    def arrived(self) -> list[Tensor]:
        self._held[1].wait()
        return [
            each.narrow(self._axis, 0, n) for each, n in zip(self._into, self._lengths, strict=True)
        ]


def next_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same ones, each when the next one, which begins an exchange, has been made."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def share_of(own: int, lengths: Sequence[int]) -> slice:
    """Which of all holders' rows are those of holder `own`."""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))][own]
