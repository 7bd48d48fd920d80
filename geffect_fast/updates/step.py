"""The gradients and products of one update, computed when an update rule asks for them.

A rule knows nothing of batches, Trainers or accumulation: `Losses` hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from geffect_fast.capture import Plan, Segments
from geffect_fast.capture.compat import put_to_rest
from geffect_fast.capture.modes import evaluating
from geffect_fast.capture.per_sample import LossFn
from geffect_fast.capture.products import add_weighted_sum
from geffect_fast.updates.base import Need, UpdateRule
from geffect_fast.updates.gradients import Gradients, Move, add, union
from geffect_fast.updates.kept_rows import KeptRows
from geffect_fast.updates.optimizer_metric import metric
from geffect_fast.updates.retain_rows import RowProducts, row_products


@dataclass(frozen=True)
class RetainBatch:
    """Retain rows that run together, and their losses one by one.

    Attributes:
        axis: the rows of a module's input that belong to each sample.
        n_tokens: number of tokens in the batch.
        losses: called with the model and this batch; runs the model and returns `(n_rows,)` losses,
            whose sum over all batches is the retain loss.
        around: gives a context to enter around a forward and its backward.
        key: what to tell `losses` of several batches apart by, in all that is not data; None: the
            code and the values that `losses` holds.
    """

    axis: Segments
    n_tokens: int
    losses: LossFn
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    key: Hashable = None

    @property
    def n_rows(self) -> int:
        """Number of samples in the batch."""
        return self.axis.n_samples


class Losses(Protocol):
    """The losses of one update, however its rows are cut into batches.

    Attributes:
        retain_weight: weight of the retain loss in the objective; 0 where it is only protected.
    """

    retain_weight: float

    def forget(self) -> float:
        """Add the gradient of the objective's forget part to `.grad`; return the part's value."""
        ...

    def retain(self) -> float:
        """Add the gradient of the retain loss to `.grad`; return the loss."""
        ...

    def retain_batches(self) -> Sequence[RetainBatch]:
        """The retain rows, whose losses add up to the retain loss."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a scalar's gradient to `.grad`; for a model in parts, that of all ranks' scalars."""
        ...


class Step:
    """One update: the gradients that a rule may ask for, and the `.grad` that it writes.

    Args:
        rule: the rule, whose needs say what may be asked for.
        plan: the plan of the model.
        losses: the losses of the update.
        optimizer: the optimizer that will step; None where it is not known.
        number: number of updates before this one.
        memory: what the rule remembered from earlier updates: tensors by parameter name, under any
            key.

    Attributes:
        value: value of the objective on the rows of the update, as far as it was evaluated.
        remembered: what the rule will find in `memory` at the next update.
    """

    def __init__(
        self,
        rule: UpdateRule,
        plan: Plan,
        losses: Losses,
        optimizer: torch.optim.Optimizer | None,
        number: int,
        memory: Mapping[str, Gradients],
    ) -> None:
        self.number = number
        self.memory = memory
        self.remembered: dict[str, Gradients] = {}
        self.value = 0.0
        self.retain_weight = losses.retain_weight
        self._rule = rule
        self._plan = plan
        self._losses = losses
        self._optimizer = optimizer
        self._random = _random_state(plan)

    def forget(self) -> Gradients:
        """The gradient of the objective's forget part, taken out of `.grad`."""
        self.forget_in_place()
        return self._taken()

    def forget_in_place(self) -> Gradients:
        """The gradient of the objective's forget part, left in `.grad`."""
        with torch.enable_grad():
            self.value += self._losses.forget()
        return {name: p.grad for name, p in self._plan.at_rest.items() if p.grad is not None}

    def forget_at(self, *moves: Move) -> Gradients:
        """The gradient of the forget part at weights that are moved by all `moves`.

        The weights are put back bitwise. Dropout is that of the first pass, so that gradients
        differ by the weights alone.
        """
        self._has("full_precision")
        parameters = self._plan.at_rest
        before = {name: parameters[name].clone() for name in union(of for _, of in moves)}
        _set_random_state(self._plan, self._random)
        put_to_rest(self._plan.model)  # whole parameters are made of the parts that are moved
        try:
            for factor, of in moves:
                for name, move in of.items():
                    # In place, because FSDP brings parts together from where they lie.
                    parameters[name].add_(move, alpha=factor)
            with torch.enable_grad():
                self._losses.forget()
            return self._taken()
        finally:
            put_to_rest(self._plan.model)
            for name, weights in before.items():
                parameters[name].copy_(weights)

    def retain(self) -> Gradients:
        """The gradient of the retain loss, taken out of `.grad`.

        Only rules that need it may ask for it, but any rule where the objective has a retain part.
        """
        if not self.retain_weight:
            self._has("retain")
        with torch.enable_grad():
            value = self._losses.retain()
        if self.retain_weight:
            self.value += self.retain_weight * value
        return self._taken()

    def row_products(self, direction: Gradients, room: float) -> RowProducts:
        """Inner products of the retain rows' gradients with each other, and with a direction.

        Gradients are those of the model in eval mode, here and in `add_rows`.

        Args:
            direction: the direction, by parameter name.
            room: memory of the model's device for inputs and output gradients of rows, in sizes of
                the part of a direction that a rank holds; the rest waits elsewhere.
        """
        self._has("retain_rows")
        batches = self._losses.retain_batches()
        with evaluating(self._plan.model):
            size = sum(p.numel() * p.element_size() for p in self._plan.held.values())
            if self._plan.shards is not None:  # parts differ, and ranks run the same batches
                size = max(self._plan.shards.ranks.meet(size))
            found = row_products(self._plan, batches, direction, room * size, str(self._rule))
        if self.retain_weight:
            self.value += self.retain_weight * float(found.losses.sum())
        return found

    def add_rows(self, weights: Tensor, kept: KeptRows | None) -> None:
        """Add `sum_i weights[i] g_i` over the retain rows' gradients to `.grad`.

        Args:
            weights: `(n_rows,)`.
            kept: the factors that `row_products` kept; None: the rows run once more.
        """
        self._has("retain_rows")
        batches = self._losses.retain_batches()
        pieces = weights.split([batch.n_rows for batch in batches])
        if kept is not None:
            self._add_kept(pieces, kept)
            return
        weighted = [*zip(pieces, batches, strict=True)]
        with evaluating(self._plan.model), torch.enable_grad():
            for own, batch in self._dealt(weighted):
                with batch.around():
                    losses = batch.losses(self._plan.model, batch)
                    self._losses.backward((own.to(losses) * losses).sum())

    def _dealt(
        self, weighted: list[tuple[Tensor, RetainBatch]]
    ) -> list[tuple[Tensor, RetainBatch]]:
        """This rank's batches with their rows' weights, as many as every other rank has.

        Whole weights are gathered and freed for all ranks at once, so all ranks run equally many
        batches. If this rank has too few, the first batch stands in with weights of zero.
        """
        if self._plan.shards is None:
            return weighted
        own, idle = self._plan.shards.ranks.dealt(weighted, in_step=True)
        counted = len(own) - idle
        return own[:counted] + [(torch.zeros_like(of), batch) for of, batch in own[counted:]]

    def _add_kept(self, weights: Sequence[Tensor], kept: KeptRows) -> None:
        for name in kept.names():
            p = self._plan.parameters[name]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            for batch, factors in kept.batches(name):
                for factor in factors:
                    add_weighted_sum(factor, weights[batch], p.grad)

    def metric(self, name: str) -> Tensor | None:
        """`1 / (sqrt(v_hat) + eps)` of Adam for a parameter; None: steps go along gradients."""
        self._has("optimizer")
        return metric(self._optimizer, self._plan.at_rest[name])

    def write(self, gradient: Gradients, retain: Gradients | None = None) -> None:
        """Make `gradient` the parameters' `.grad`.

        Args:
            gradient: the gradient; the call may change it.
            retain: the retain gradient, to be added with its weight in the objective; None:
                `gradient` holds it already.
        """
        if retain is not None and self.retain_weight:
            add(gradient, retain, self.retain_weight)
        for name, p in self._plan.at_rest.items():
            p.grad = gradient.get(name)

    def _taken(self) -> Gradients:
        taken = {}
        for name, p in self._plan.at_rest.items():
            if p.grad is not None:
                taken[name], p.grad = p.grad, None
        return taken

    def _has(self, need: Need) -> None:
        assert need in self._rule.needs, f"update {self._rule.name} does not declare {need}"


def _random_state(plan: Plan) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(plan.device)] if plan.device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _set_random_state(plan: Plan, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], plan.device)
