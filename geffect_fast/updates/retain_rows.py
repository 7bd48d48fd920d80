"""Inner products of the retain rows' gradients, none of which is ever formed.

    gram[i, j] = <g_i, g_j>        products[i] = <g_i, direction>

Layer by layer as a backward reaches it (`ghost_dot`, `segment_bilinear`). Rows that do not fit one
batch are compared batch by batch: inputs and output gradients of a block of batches are kept, and
all later batches run against them. A block holds as much as there is room for, or else one batch.
Where there is room for all, weighted sums of the rows' gradients are made of what is kept.

Where ranks share the model out, all of them run all rows in step, and a direction is brought
together layer by layer when a backward is over. Nothing is kept for weighted sums: these are one
more backward, of which each rank runs its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geffect_fast.capture import Factor, Lookup, Outer, Plan, Recording, RowSum
from geffect_fast.capture.parts import whole_of
from geffect_fast.capture.per_sample import record_rows
from geffect_fast.capture.products import in_working_precision, inner, pairwise
from geffect_fast.data.memory import free_memory
from geffect_fast.errors import InputError, NonFiniteError, UnsupportedModelError
from geffect_fast.ops.reference import accumulation_dtype
from geffect_fast.updates.gradients import Gradients

if TYPE_CHECKING:
    from geffect_fast.updates.step import RetainBatch

_JOINED = Recording(joined=True, one_backward=True)
_MATRICES = 5
"""Matrices of the Gram's size at once: it, its correlations, and what their decomposition takes."""

Kept = dict[str, list[Factor]]
"""A batch's factors by parameter name."""


@dataclass(frozen=True)
class RowProducts:
    """What one update needs to know of n retain rows.

    Attributes:
        losses: `(n,)` fp64.
        gram: `(n, n)` fp64.
        products: `(n,)` fp64, with the direction.
        rounding: what eigenvalues of the rows' cosines are worth, relative to the largest.
        kept: the factors of every batch; None where there was no room for all, or ranks share the
            model out.
    """

    losses: Tensor
    gram: Tensor
    products: Tensor
    rounding: float
    kept: list[Kept] | None = None

    def coefficients(self, rank_tol: float) -> Tensor:
        """`c` of the projection `sum_i c_i g_i` of the direction onto the span of the rows.

        The least squares solution of `gram c = products`, by the eigenvectors of the rows' cosines
        `C_ij = gram_ij / (|g_i| |g_j|)`. Those whose eigenvalues are at most
        `max(rank_tol, rounding)` of the largest are left out: rows there repeat others.

        Args:
            rank_tol: relative to the largest eigenvalue.

        Returns:
            `(n,)` fp64.
        """
        sizes = self.gram.diagonal().clamp(min=0).sqrt()
        scale = torch.where(sizes > 0, 1 / sizes, 0.0)
        cosines = self.gram * scale * scale[:, None]
        values, vectors = torch.linalg.eigh((cosines + cosines.T) / 2)
        least = max(rank_tol, self.rounding) * values[-1].clamp(min=0)
        inverse = torch.where(values > least, 1 / values, 0.0)
        return scale * (vectors @ (inverse * (vectors.T @ (scale * self.products))))


def row_products(
    plan: Plan, batches: Sequence[RetainBatch], direction: Gradients, room: float, rule: str
) -> RowProducts:
    """All inner products of the rows of `batches` with each other and with `direction`.

    Every batch runs once where a block holds all of them; else, for `k` blocks, as often as there
    are blocks up to its own.

    Args:
        plan: of the model.
        batches: of retain rows.
        direction: by parameter name.
        room: bytes that a block may hold.
        rule: for messages.

    Raises:
        InputError: there are no rows, or more than memory holds a Gram matrix of.
        NonFiniteError: a product is not finite.
        UnsupportedModelError: rows cannot be told apart, or a module of which no inputs and output
            gradients can be kept has rows in several batches.
    """
    sums = _Sums(plan, batches, direction, room, rule)
    begin = 0
    while begin < len(batches):
        block: list[Kept] = []
        so_far, growing = 0, True
        sums.held = 0
        for at, batch in enumerate(batches[begin:], begin):
            # What the block's batches took, token by token, tells what this one would.
            growing = growing and (not block or sums.held * (1 + batch.n_tokens / so_far) <= room)
            kept = sums.run(at, begin, block, own=growing)
            if growing:
                block.append(kept)
                so_far += batch.n_tokens
        begin += len(block)
    everything = len(block) == len(batches) and sums.all_kept
    return sums.found(block if everything else None)


class _Sums:
    """What runs of the batches add up to.

    Args:
        plan, batches, direction, room, rule: as `row_products` takes them.

    Attributes:
        held: bytes that factors of the present block hold.
        all_kept: whether none was let go of for lack of room.
    """

    def __init__(
        self,
        plan: Plan,
        batches: Sequence[RetainBatch],
        direction: Gradients,
        room: float,
        rule: str,
    ) -> None:
        self.held, self.all_kept = 0, plan.shards is None
        self._room = room
        self._plan, self._batches, self._rule = plan, batches, rule
        ends = list(accumulate(batch.n_rows for batch in batches))
        self._rows = [slice(end - b.n_rows, end) for end, b in zip(ends, batches, strict=True)]
        n, first = sum(batch.n_rows for batch in batches), next(iter(plan.parameters.values()))
        check_rows(n, first.device, rule)
        self._rounding = n * torch.finfo(accumulation_dtype(first.dtype)).eps
        self._numbers = torch.zeros(n, n + 2, dtype=torch.float64, device=first.device)
        self._gram, self._products = self._numbers[:, :n], self._numbers[:, n]
        self._losses = self._numbers[:, n + 1]
        self._direction = {
            name: in_working_precision(g.to(accumulation_dtype(g.dtype)), plan.parameters[name])
            for name, g in direction.items()
        }

    def run(self, at: int, begin: int, block: Sequence[Kept], *, own: bool) -> Kept:
        """One forward and backward of batch `at`.

        Args:
            at: its number.
            begin: that of the block's first batch.
            block: factors of the block's batches before it, which it is compared with.
            own: whether it is of the block: its rows are compared with each other and with the
                direction too, and its factors returned, those of the last batch if there is room.
        """
        batch, mine, kept = self._batches[at], self._rows[at], Kept()
        last = at + 1 == len(self._batches)
        counted: set[tuple[int, int]] = set()
        waiting: dict[str, list[Factor]] = {}

        def take(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
            shape = self._plan.parameters[name].shape
            for earlier, others in enumerate(block, begin):
                if name in others:
                    self._gram[self._rows[earlier], mine] += pairwise(others[name], factors, shape)
            if own:
                self._gram[mine, mine] += pairwise(factors, factors, shape)
                self._note_rounding(factors)
                if self._plan.shards is not None:
                    waiting[name] = factors
                elif name in self._direction:
                    self._add_products(mine, factors, self._direction[name])
            if not own or (last and (begin > 0 or not self.all_kept)):
                return
            kept[name] = factors
            size = _bytes(factors, counted)
            self.held += size or 0
            if last and (size is None or self.held > self._room):
                self.all_kept = False  # nobody waits for them, so that they can go
                kept.clear()
            elif size is None:
                raise UnsupportedModelError(
                    f"update {self._rule}: parameter '{name}' takes the generic rule, which "
                    "compares rows of one batch alone; let the retain rows of an update fit one "
                    "(--token-budget, --retain-batch-size), or freeze it"
                )

        with batch.around():
            losses = record_rows(self._plan, batch.losses, batch, batch.axis, take, _JOINED)
            with self._plan.generic_at_hand():
                # In one order on all ranks, whose rows are the same and so their factors' names.
                for name in [name for name in self._direction if name in waiting]:
                    self._add_products(mine, waiting.pop(name), whole_of(self._direction[name]))
        self._losses[mine] = losses.double()
        return kept

    def _add_products(self, mine: slice, factors: Sequence[Factor], direction: Tensor) -> None:
        for factor in factors:
            self._products[mine] += inner(factor, direction[None])[0]

    def _note_rounding(self, factors: Sequence[Factor]) -> None:
        """Sums of 16 bits are exact, but what is added up was rounded: differences of rows are."""
        for factor in factors:
            if isinstance(factor, Outer | Lookup):
                self._rounding = max(self._rounding, torch.finfo(factor.g.dtype).eps)

    def found(self, kept: list[Kept] | None) -> RowProducts:
        """The sums, and what was kept; raise `NonFiniteError` where one is not finite."""
        if not bool(self._numbers.isfinite().all()):
            own = torch.stack((self._gram.diagonal(), self._products, self._losses))
            finite = own.isfinite().all(0).tolist()
            bad = finite.index(False)
            raise NonFiniteError(
                f"update {self._rule}: products with the gradient of retain row {bad} of the "
                "update are not finite; try a smaller learning rate, or fp32"
            )
        upper = self._gram.triu()
        gram = upper + upper.triu(1).T
        return RowProducts(self._losses, gram, self._products, self._rounding, kept)


def check_rows(n: int, device: torch.device, rule: str) -> None:
    """Raise `InputError` where there are no retain rows, or too many for their inner products."""
    if n == 0:
        raise InputError(
            f"update {rule}: the update has no retain rows, whose gradients it needs; give some"
        )
    needed, free = _MATRICES * 8 * n * n, free_memory(device)
    if needed > free:
        raise InputError(
            f"update {rule}: the inner products of {n:,} retain rows take "
            f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; give fewer retain rows "
            "an update (--retain-batch-size)"
        )


def _bytes(factors: Sequence[Factor], counted: set[tuple[int, int]]) -> int | None:
    """What factors of a parameter hold beside tensors that are counted; None where nobody knows.

    Args:
        counted: addresses and sizes of tensors, such as inputs that layers share; added to.
    """
    total = 0
    for factor in factors:
        if isinstance(factor, Outer):
            held: tuple[Tensor, ...] = (factor.a, factor.g)
        elif isinstance(factor, Lookup):
            held = (factor.ids, factor.g)
        elif isinstance(factor, RowSum):
            held = (factor.sums,)
        else:
            return None
        for x in held:
            if (x.data_ptr(), x.numel()) not in counted:
                counted.add((x.data_ptr(), x.numel()))
                total += x.numel() * x.element_size()
    return total
