"""Inner products with directions of which every rank holds a part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from geffect_fast.capture import Plan
from geffect_fast.capture.factors import Factor
from geffect_fast.capture.products import InnerProducts, inner
from geffect_fast.capture.shards import gathered


class ShardedProducts(InnerProducts):
    """`InnerProducts` of a model whose parameters, and so directions too, are shared out.

    A direction is brought together when the backward is over, one parameter after the other and in
    the same order on every rank, whether or not the rank has factors of it: which modules a
    backward passes, and when, is the rows' affair.

    Args:
        plan: of the model.
        direction_of: this rank's part `(M, *own shape)` of a parameter's directions, by its name.
    """

    def __init__(self, plan: Plan, direction_of: Callable[[str], Tensor]) -> None:
        super().__init__(direction_of)
        self._plan, self._part_of = plan, direction_of
        self._waiting: dict[str, list[Factor]] = {}

    def __call__(self, name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        self._waiting.setdefault(name, []).extend(factors)

    def finish(self) -> None:
        """Find the products of what has arrived; all ranks call it after every backward."""
        assert self._plan.shards is not None
        for name, whole in self._plan.parameters.items():
            direction = gathered(self._part_of(name), self._plan.shards.own(whole))
            for factor in self._waiting.pop(name, []):
                self.found.append((name, inner(factor, direction)))


def inner_products(plan: Plan, direction_of: Callable[[str], Tensor]) -> InnerProducts:
    """What finds inner products with directions, `(M, *shape)` or a rank's part of it."""
    if plan.shards is None:
        return InnerProducts(direction_of)
    return ShardedProducts(plan, direction_of)
