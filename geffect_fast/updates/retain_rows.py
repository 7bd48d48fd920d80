"""Inner products of the retain rows' gradients, none of which is ever formed.

    gram[i, j] = <g_i, g_j>        products[i] = <g_i, direction>

Products of the rows of a batch with each other and with the direction are taken layer by layer, as
a backward reaches each layer (`ghost_dot`, `segment_bilinear`). Inputs and output gradients are
kept, on the device as far as there is room (`KeptRows`). From these the rows of any two batches are
compared and weighted sums of the rows' gradients are made, so that every row runs once.

Where ranks share the model out, all of them run all rows in step, and the direction is brought
together layer by layer when a backward is over. Nothing is kept for weighted sums then: a sum is
one more backward, of which each rank runs some batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from geffect_fast.capture import Factor, Lookup, Outer, Plan, Recording
from geffect_fast.capture.parts import whole_of
from geffect_fast.capture.per_sample import record_rows
from geffect_fast.capture.products import in_working_precision, inner, pairwise
from geffect_fast.data.memory import free_memory
from geffect_fast.errors import InputError, NonFiniteError, UnsupportedModelError
from geffect_fast.ops.reference import accumulation_dtype
from geffect_fast.updates.gradients import Gradients
from geffect_fast.updates.kept_rows import KeptFactor, KeptRows

if TYPE_CHECKING:
    from geffect_fast.updates.step import RetainBatch

_JOINED = Recording(joined=True, one_backward=True)
_MATRICES = 5
"""Matrices of the Gram matrix's size that exist at once: the Gram matrix, its cosines, and the
memory of their decomposition."""


@dataclass(frozen=True)
class RowProducts:
    """The losses of an update's n retain rows, and the inner products of their gradients.

    Attributes:
        losses: `(n,)` fp64.
        gram: products of the rows' gradients with each other, `(n, n)` fp64.
        products: products of the rows' gradients with the direction, `(n,)` fp64.
        rounding: the error of eigenvalues of the rows' cosines, relative to the largest one.
        kept: the factors of every batch; None where a module has factors that cannot be kept, or
            ranks share the model out.
    """

    losses: Tensor
    gram: Tensor
    products: Tensor
    rounding: float
    kept: KeptRows | None = None

    def coefficients(self, rank_tol: float) -> Tensor:
        """`c` of the projection `sum_i c_i g_i` of the direction onto the span of the rows.

        `c` is the least squares solution of `gram c = products`, by the eigenvectors of the rows'
        cosines `C_ij = gram_ij / (|g_i| |g_j|)`. Eigenvectors whose eigenvalues are at most
        `max(rank_tol, rounding)` of the largest are left out: along them rows repeat other rows.

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

    Args:
        plan: the plan of the model.
        batches: batches of retain rows, each of which runs once.
        direction: the direction, by parameter name.
        room: bytes of the device that kept inputs and output gradients of rows may take.
        rule: the update rule, for messages.

    Raises:
        InputError: there are no rows, or too many for memory to hold their Gram matrix; the disk of
            temporary files is full.
        NonFiniteError: a product is not finite.
        UnsupportedModelError: rows cannot be told apart, or a module whose inputs and output
            gradients cannot be kept has rows in several batches.
    """
    sums = _Sums(plan, batches, direction, room, rule)
    for at in range(len(batches)):
        sums.run(at)
    sums.compare_batches()
    return sums.found()


class _Sums:
    """The sums to which runs of the batches add: inner products, and losses.

    Args:
        plan, batches, direction, room, rule: as `row_products` takes them.
    """

    def __init__(
        self,
        plan: Plan,
        batches: Sequence[RetainBatch],
        direction: Gradients,
        room: float,
        rule: str,
    ) -> None:
        self._kept, self._all_kept = KeptRows(room, rule), plan.shards is None
        self._plan, self._batches, self._rule = plan, batches, rule
        ends = list(accumulate(batch.n_rows for batch in batches))
        self._rows = [slice(end - b.n_rows, end) for end, b in zip(ends, batches, strict=True)]
        n, first = sum(batch.n_rows for batch in batches), next(iter(plan.parameters.values()))
        check_rows(n, plan.device, rule)
        self._rounding = n * torch.finfo(accumulation_dtype(first.dtype)).eps
        self._numbers = torch.zeros(n, n + 2, dtype=torch.float64, device=plan.device)
        self._gram, self._products = self._numbers[:, :n], self._numbers[:, n]
        self._losses = self._numbers[:, n + 1]
        self._direction = {
            name: in_working_precision(g.to(accumulation_dtype(g.dtype)), plan.parameters[name])
            for name, g in direction.items()
        }

    def run(self, at: int) -> None:
        """Run one forward and backward of batch `at`."""
        batch, mine = self._batches[at], self._rows[at]
        waiting: dict[str, list[Factor]] = {}

        def take(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
            shape = self._plan.parameters[name].shape
            self._gram[mine, mine] += pairwise(factors, factors, shape)
            self._note_rounding(factors)
            if self._plan.shards is not None:
                waiting[name] = factors
            elif name in self._direction:
                self._add_products(mine, factors, self._direction[name])
            tensors = [f for f in factors if isinstance(f, KeptFactor)]
            if len(tensors) < len(factors):
                self._all_kept = False
                if len(self._batches) > 1:
                    raise UnsupportedModelError(
                        f"update {self._rule}: parameter '{name}' takes the generic rule, which "
                        "compares rows of one batch alone; let the retain rows of an update fit "
                        "one (--token-budget, --retain-batch-size), or freeze it"
                    )
            elif self._all_kept or len(self._batches) > 1:
                self._kept.keep(name, at, tensors)

        with batch.around():
            losses = record_rows(
                self._plan, batch.losses, batch, batch.axis, take, _JOINED, batch.key
            )
            with self._plan.generic_at_hand():
                # All ranks go in one order: their rows are the same, and so are the names of their
                # factors.
                for name in [name for name in self._direction if name in waiting]:
                    self._add_products(mine, waiting.pop(name), whole_of(self._direction[name]))
        self._losses[mine] = losses.double()

    def compare_batches(self) -> None:
        """Add the products between the rows of every two batches, parameter by parameter."""
        for name in self._kept.names():
            shape = self._plan.parameters[name].shape
            for earlier, factors, later, others in self._kept.pairs(name):
                found = pairwise(factors, others, shape)
                self._gram[self._rows[earlier], self._rows[later]] += found

    def _add_products(self, mine: slice, factors: Sequence[Factor], direction: Tensor) -> None:
        for factor in factors:
            self._products[mine] += inner(factor, direction[None])[0]

    def _note_rounding(self, factors: Sequence[Factor]) -> None:
        """Note the rounding of factors in 16 bits.

        Their products are added up exactly, but the factors were rounded before, and so are the
        differences between rows.
        """
        for factor in factors:
            if isinstance(factor, Outer | Lookup):
                self._rounding = max(self._rounding, torch.finfo(factor.g.dtype).eps)

    def found(self) -> RowProducts:
        """The sums and the kept factors; raise `NonFiniteError` where a sum is not finite."""
        if not bool(self._numbers.isfinite().all()):
            own = torch.stack((self._gram.diagonal(), self._products, self._losses))
            finite = own.isfinite().all(0).tolist()
            bad = finite.index(False)
            raise NonFiniteError(
                f"update {self._rule}: products with the gradient of retain row {bad} of the "
                "update are not finite",
                remedy="try a smaller learning rate, or fp32",
            )
        upper = self._gram.triu()
        gram = upper + upper.triu(1).T
        kept = self._kept if self._all_kept else None
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
            f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; use fewer retain rows "
            "per update (--retain-batch-size)"
        )
