"""Inner products of samples' gradients with directions, where ranks hold parts of both.

For each parameter, either the whole direction is brought to every rank's rows, or the rows' inputs
and output gradients are sent to the ranks that hold parts of the direction, whichever is fewer
bytes. Rows are sent where a batch has few tokens, and for tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.capture.exchange import (
    Gathered,
    OwnColumns,
    WholeRows,
    one_ahead,
    rows_of_holder,
)
from geffect_fast.capture.factors import Factor, Lookup, Outer
from geffect_fast.capture.parts import holders, parts_of
from geffect_fast.capture.products import InnerProducts, inner
from geffect_fast.capture.segments import Offsets


class ShardedProducts(InnerProducts):
    """`InnerProducts` of a model whose parameters, and so directions too, are shared out.

    The products are formed when a backward is over, one parameter after the other and in the same
    order on every rank, whether or not the rank has factors of the parameter: the modules that a
    backward passes, and their order, depend on the rank's rows. While the products of one parameter
    are formed, the tensors for the next one are on their way.

    Args:
        plan: the model's plan.
        direction_of: this rank's part `(M, *own shape)` of a parameter's directions, by its name.
    """

    def __init__(self, plan: Plan, direction_of: Callable[[str], Tensor]) -> None:
        super().__init__(direction_of)
        self._plan, self._part_of = plan, direction_of
        self._waiting: dict[str, list[Factor]] = {}

    def __call__(self, name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        self._waiting.setdefault(name, []).extend(factors)

    def finish(self) -> None:
        """Form the products of all factors received. All ranks call this after every backward."""
        shards, waiting = self._plan.shards, self._waiting
        assert shards is not None
        self._waiting = {}
        told = shards.ranks.meet({k: [*map(_Described.of, some)] for k, some in waiting.items()})
        told = [told[rank] for rank in shards.copy]
        sums: list[tuple[str, Tensor, slice]] = []
        for name, each in one_ahead(self._under_way(waiting, told)):
            if isinstance(each, _DirectionToRows):
                self.found += [(name, score) for score in each.products()]
            else:
                sums += [(name, *some) for some in each.products()]
            del each  # before the exchange after the next one begins
        if sums:
            flat = torch.cat([of_part.flatten() for _, of_part, _ in sums])
            dist.all_reduce(flat, group=shards.holders)
            sizes = [of_part.numel() for _, of_part, _ in sums]
            for (name, of_part, own), score in zip(sums, flat.split(sizes), strict=True):
                if own.stop > own.start:
                    self.found.append((name, score.view(of_part.shape)[:, own]))

    def _under_way(
        self, waiting: dict[str, list[Factor]], told: Sequence[Mapping[str, list[_Described]]]
    ) -> Iterator[tuple[str, _DirectionToRows | _RowsToParts]]:
        """Begin the exchange of each parameter that any rank has factors of.

        The factors are taken out of `waiting`, so that they take no memory once they are used.
        """
        shards = self._plan.shards
        assert shards is not None
        for name, whole in self._plan.parameters.items():
            described = [of.get(name, []) for of in told]
            if not any(described):
                continue
            own, part = shards.own(whole), self._part_of(name)
            factors = waiting.pop(name, [])
            of_rows = _bytes_of_rows(described, own.shape)
            of_direction = len(part) * own.numel() * part.element_size()
            if of_rows < of_direction:
                shards.came["rows"] += int(of_rows)
                yield name, _RowsToParts(factors, described, part, own)
            else:
                shards.came["directions"] += of_direction
                yield name, _DirectionToRows(factors, part, own)


@dataclass(frozen=True)
class _Described:
    """The description of a factor that other ranks need.

    Attributes:
        kind: `Outer`, `Outer.T` for a transposed one, `Lookup`; empty for any other factor, whose
            rows are never sent.
        dtypes: dtypes of the two sides of its rows, in the order of `_sides`.
        lengths: number of rows of each sample.
    """

    kind: str
    dtypes: tuple[torch.dtype, ...] = ()
    lengths: Sequence[int] = ()

    @classmethod
    def of(cls, factor: Factor) -> _Described:
        if not isinstance(factor, Outer | Lookup):
            return cls("")
        kind = type(factor).__name__
        if isinstance(factor, Outer) and factor.transposed:
            kind = "Outer.T"
        cut, uncut = _sides(factor)
        return cls(kind, (cut.dtype, uncut.dtype), factor.cu.lengths)

    @property
    def form(self) -> tuple[object, ...]:
        return self.kind, self.dtypes


def _sides(factor: Outer | Lookup) -> tuple[Tensor, Tensor]:
    """The two sides of a factor's rows, `(rows, d)` each: that of the first axis, then the other.

    The first axis is the one along which the parameter is cut. A table has ids, `(rows,)`, as its
    first side.
    """
    if isinstance(factor, Lookup):
        return factor.ids, factor.g
    return (factor.a, factor.g) if factor.transposed else (factor.g, factor.a)


def _bytes_of_rows(described: Sequence[Sequence[_Described]], shape: torch.Size) -> float:
    """Bytes that a rank receives if rows go to parts, its own included; inf where rows cannot go.

    Args:
        described: the factors of each rank.
        shape: the shape of the whole parameter.
    """
    longest = max(described, key=len)
    forms = [each.form for each in longest]
    # A rank may have no factors, for example of an expert.
    alike = all([each.form for each in some] == forms for some in described if some)
    if not alike or len(shape) != 2 or any(not each.kind for each in longest):
        return float("inf")
    found = 0.0
    for number, each in enumerate(longest):
        rows = [sum(some[number].lengths) if some else 0 for some in described]
        all_rows = max(rows) * len(rows)
        cut, uncut = (dtype.itemsize for dtype in each.dtypes)
        found += all_rows * shape[1] * uncut
        found += all_rows * cut if each.kind == "Lookup" else sum(rows) * shape[0] * cut / len(rows)
    return found


class _DirectionToRows:
    """Products of a rank's own rows with whole directions."""

    def __init__(self, factors: list[Factor], part: Tensor, own: nn.Parameter) -> None:
        self._factors, self._direction = factors, Gathered(part, own)

    def products(self) -> list[Tensor]:
        """The products of each factor, `(M, n_samples)` fp64."""
        direction = self._direction.arrived()
        return [inner(factor, direction).double() for factor in self._factors]


class _RowsToParts:
    """Products of all ranks' rows with a rank's own part of directions."""

    def __init__(
        self,
        factors: list[Factor],
        described: Sequence[Sequence[_Described]],
        part: Tensor,
        own: nn.Parameter,
    ) -> None:
        group, parts = holders(own), parts_of(own)
        self._part, self._own_rank = part, group.rank()
        self._entries = parts[self._own_rank]
        self._coming: list[tuple[str, list[Sequence[int]], OwnColumns | WholeRows, WholeRows]] = []
        longest: Sequence[_Described] = max(described, key=len)
        for number, of in enumerate(longest):
            lengths = [some[number].lengths if some else () for some in described]
            n_rows = [sum(each) for each in lengths]
            if factors:
                factor = factors[number]
                assert isinstance(factor, Outer | Lookup)
                cut, uncut = _sides(factor)
            else:
                width = () if of.kind == "Lookup" else (own.shape[0],)
                cut = part.new_empty(0, *width, dtype=of.dtypes[0])
                uncut = part.new_empty(0, own.shape[1], dtype=of.dtypes[1])
            first = (
                WholeRows(cut, n_rows, group)
                if of.kind == "Lookup"
                else OwnColumns(cut, n_rows, parts, group)
            )
            self._coming.append((of.kind, lengths, first, WholeRows(uncut, n_rows, group)))

    def products(self) -> list[tuple[Tensor, slice]]:
        """For each factor the share of this part in all ranks' products, and the own samples.

        The share is `(M, n_samples)` fp64. The own samples are a slice of its last axis: the
        samples of this rank.
        """
        found = []
        for kind, lengths, first, second in self._coming:
            cut, uncut = first.arrived(), second.arrived()
            cu = Offsets.of([n for some in lengths for n in some])
            own = rows_of_holder(self._own_rank, [len(some) for some in lengths])
            found.append((self._of_part(kind, cut, uncut, cu), own))
        return found

    def _of_part(self, kind: str, cut: Tensor, uncut: Tensor, cu: Offsets) -> Tensor:
        part = self._part
        if not part.shape[1]:  # there are more ranks than the parameter has rows
            return torch.zeros(len(part), len(cu), dtype=torch.float64, device=part.device)
        if kind != "Lookup":
            transposed = kind == "Outer.T"
            a, g = (cut, uncut) if transposed else (uncut, cut)
            return inner(Outer(a, g, cu, transposed), part).double()
        here = (cut >= self._entries.start) & (cut < self._entries.stop)
        ids = torch.where(here, cut - self._entries.start, 0)
        g = torch.where(here[:, None], uncut, 0)
        return inner(Lookup(ids, g, cu, part.shape[1]), part).double()
