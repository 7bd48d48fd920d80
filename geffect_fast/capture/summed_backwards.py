"""Backwards through a model that ranks share out, with gradients added up in `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from geffect_fast.capture.shards import Shards


class SummedBackwards:
    """Backwards that add the gradient of all ranks' losses to the `.grad` of parts.

    Ranks run in step. A parameter that no rank's loss depends on has no gradient, as in a single
    process.

    Args:
        shards: the shards of the model.
        trained: the parameters that are trained, as the model holds them at rest.
        backward: runs the backward of a scalar.
    """

    def __init__(
        self, shards: Shards, trained: Sequence[nn.Parameter], backward: Callable[[Tensor], object]
    ) -> None:
        self._shards, self._trained, self._backward = shards, trained, backward
        self._wholes = [shards.whole(p) for p in trained]
        self._reached: set[int] = set()

    @contextmanager
    def adding_up(self) -> Iterator[None]:
        """Inside, each rank calls `backward` equally often; afterwards gradients are there."""
        self._reached = set()
        with self._shards.sums():
            yield
            self._shards.rest()  # a last batch without a backward leaves the root whole
            found = [p.grad for p in self._trained]
        own = [id(whole) in self._reached for whole in self._wholes]
        told = zip(*self._shards.ranks.meet(own), strict=True)
        for p, grad, reached in zip(self._trained, found, told, strict=True):
            if any(reached):  # otherwise the gradient is only zeros beside others of its group
                p.grad = grad if p.grad is None or grad is None else p.grad + grad

    def backward(self, loss: Tensor, *, idle: bool = False) -> None:
        """Run one backward.

        Args:
            loss: a scalar, of this rank's rows.
            idle: whether the backward runs only for the sake of other ranks, with a loss of zero.
        """
        loss, reached = self._shards.with_zeros(loss, self._wholes)
        self._reached |= set() if idle else reached
        if loss.requires_grad:  # otherwise it reads only layers below everything that is trained
            self._backward(loss)
