"""Exchanges between ranks that hold one copy of a model in parts.

Either parts are sent to the ranks that have the rows, or rows to the ranks that have the parts. A
transfer runs while this rank goes on, until its result is asked for (`arrived`).
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
    """A whole tensor, gathered from the parts of it that ranks hold.

    Args:
        parts: this rank's, `(M, *own shape)`; behind the first axis they are cut as `of` is.
        of: the parameter, a `DTensor`, of which this rank has its part.
    """

    def __init__(self, parts: Tensor, of: nn.Parameter) -> None:
        self._lengths = [rows.stop - rows.start for rows in parts_of(of)]
        self._came = _EqualParts(parts, 1, self._lengths, holders(of))

    def arrived(self) -> Tensor:
        """The whole tensor, `(M, *shape)`."""
        return torch.cat(self._came.arrived(), 1)


class WholeRows:
    """Rows of all holders of a parameter, where each holder needs all columns of all rows.

    Args:
        own: `(rows, ...)` of this rank.
        lengths: how many rows each holder has.
        group: the holders.
    """

    def __init__(self, own: Tensor, lengths: Sequence[int], group: ProcessGroup) -> None:
        self._came = _EqualParts(own, 0, lengths, group)

    def arrived(self) -> Tensor:
        """All rows, `(all rows, ...)`, in the order of the holders."""
        return torch.cat(self._came.arrived())


class OwnColumns:
    """Rows of all holders of a parameter, where each holder needs the columns of its part.

    Args:
        own: `(rows, d)` of this rank.
        lengths: how many rows each holder has.
        parts: the columns that each holder needs.
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
        """All rows, `(all rows, own columns)`, in the order of the holders."""
        self._held[1].wait()
        return self._into.view(self._shape)


class _EqualParts:
    """Tensors of all holders, whose shapes differ along one axis only.

    They are padded along that axis, because collectives take equal shapes.
    """

    def __init__(self, own: Tensor, axis: int, lengths: Sequence[int], group: ProcessGroup) -> None:
        self._axis, self._lengths = axis, lengths
        missing = max(lengths) - own.shape[axis]
        sent = pad(own, [*[0, 0] * (own.dim() - 1 - axis), 0, missing]).contiguous()
        self._into = sent.new_empty(len(lengths), *sent.shape)
        # Some versions of torch know the first name only, others the second only.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._held = sent, gather(self._into.flatten(0, 1), sent, group=group, async_op=True)

    def arrived(self) -> list[Tensor]:
        self._held[1].wait()
        return [
            each.narrow(self._axis, 0, n) for each, n in zip(self._into, self._lengths, strict=True)
        ]


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items, each after the next one is made, whose exchange has then begun."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def rows_of_holder(own: int, lengths: Sequence[int]) -> slice:
    """The place of the rows of holder `own` among all holders' rows."""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))][own]
