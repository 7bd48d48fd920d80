"""What optimizers make of a gradient: a diagonal of it, their momentum, and weight decay.

    theta' = theta - lr (P g + momentum + decay)

Exactly so, for each of them, where `P` is formed with the step's own gradient `g`: SGD's `P` is a
number; Adam's holds the squares that this step adds to; Lion's sign is `c / |c|` of a blend `c`
that is linear in `g`. Momentum and decay depend on no gradient of this step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from geffect_fast.ops.reference import accumulation_dtype


@dataclass(frozen=True)
class Held:
    """What an optimizer holds of one parameter.

    Attributes:
        parameter: it.
        group: hyper-parameters of its group.
        state: its tensors and numbers; empty before the first step.
        rate: the group's learning rate in units of the run's.
    """

    parameter: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    rate: float = 1.0

    def tensor(self, key: str) -> Tensor | None:
        """A tensor of the state where the parameter is, in the dtype gradients are added up in."""
        found = self.state.get(key)
        dtype = accumulation_dtype(self.parameter.dtype)
        return None if found is None else found.to(self.parameter.device, dtype)

    def piece(self, at: slice) -> Held:
        """Of some of the parameter's entries, as they lie in memory: all of them one-dimensional.

        Tensors of the state that do not have the parameter's shape are of all its entries.
        """
        shape = self.parameter.shape
        state = {
            key: of.flatten()[at] if isinstance(of, Tensor) and of.shape == shape else of
            for key, of in self.state.items()
        }
        return replace(self, parameter=self.parameter.detach().flatten()[at], state=state)

    def weights(self) -> Tensor:
        """The parameter in that dtype."""
        return self.parameter.detach().to(accumulation_dtype(self.parameter.dtype))


class OptimizerRule(ABC):
    """How an optimizer of one kind steps.

    Attributes:
        reads: which gradients `P` is formed with: none, the squares of several, or one alone.
        keys: entries of the state once it has stepped.
        options: what its groups hold beside the learning rate.
    """

    reads: ClassVar[str] = "none"
    keys: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def diagonal(self, held: Held, gradients: Tensor | None) -> Tensor:
        """`P` of a parameter, of its shape or a scalar.

        Args:
            held: what the optimizer holds of it.
            gradients: of the step, `(K, *shape)`; None: none are read.
        """

    @abstractmethod
    def momentum(self, held: Held, diagonal: Tensor) -> Tensor | None:
        """What earlier gradients add to the step; None: nothing."""

    def decay(self, held: Held, diagonal: Tensor) -> Tensor | None:
        """What weight decay adds to the step; None: nothing."""
        decay = float(held.group["weight_decay"])
        if decay == 0:
            return None
        scale = held.rate if self.decoupled(held) else diagonal
        return scale * decay * held.weights()

    @abstractmethod
    def decoupled(self, held: Held) -> bool:
        """Whether weight decay stands beside the gradient, and not in it."""

    def fresh(self, held: Held) -> bool:
        """Whether the optimizer has not stepped this parameter, so that `P` is an estimate."""
        return bool(self.keys) and not any(key in held.state for key in self.keys)


class SgdRule(OptimizerRule):
    """SGD, with momentum, dampening and Nesterov's."""

    options: ClassVar[Mapping[str, Any]] = {
        "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0
    }  # fmt: skip

    def diagonal(self, held: Held, gradients: Tensor | None) -> Tensor:
        momentum, of = float(held.group["momentum"]), held.weights()
        taken = 1.0
        if momentum and self._buffer(held) is not None:
            taken -= float(held.group["dampening"])
        if momentum and held.group["nesterov"]:
            taken = 1.0 + momentum * taken
        return of.new_tensor(held.rate * taken)

    def momentum(self, held: Held, diagonal: Tensor) -> Tensor | None:
        momentum, buffer = float(held.group["momentum"]), self._buffer(held)
        if not momentum or buffer is None:
            return None
        return held.rate * momentum ** (2 if held.group["nesterov"] else 1) * buffer

    def decoupled(self, held: Held) -> bool:
        return False

    @staticmethod
    def _buffer(held: Held) -> Tensor | None:
        return held.tensor("momentum_buffer")


class AdamRule(OptimizerRule):
    """Adam and AdamW, with bias correction at the step to come; `amsgrad` too."""

    reads = "squares"
    keys = ("exp_avg", "exp_avg_sq")
    options: ClassVar[Mapping[str, Any]] = {
        "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False
    }  # fmt: skip

    def diagonal(self, held: Held, gradients: Tensor | None) -> Tensor:
        assert gradients is not None
        beta1, beta2 = map(float, held.group["betas"])
        step = float(held.state.get("step", 0)) + 1
        decay = float(held.group["weight_decay"])
        if decay and not self.decoupled(held):
            gradients = gradients + decay * held.weights()
        squares = gradients.square().mean(0).mul_(1 - beta2)
        before = held.tensor("exp_avg_sq")
        if before is not None:
            squares.add_(before, alpha=beta2)
        largest = held.tensor("max_exp_avg_sq") if held.group["amsgrad"] else None
        if largest is not None:
            squares = torch.maximum(squares, largest)
        below = squares.div_(1 - beta2**step).sqrt_().add_(float(held.group["eps"]))
        return below.reciprocal_().mul_(held.rate * (1 - beta1) / (1 - beta1**step))

    def momentum(self, held: Held, diagonal: Tensor) -> Tensor | None:
        average, beta1 = held.tensor("exp_avg"), float(held.group["betas"][0])
        return None if average is None else beta1 / (1 - beta1) * diagonal * average

    def decoupled(self, held: Held) -> bool:
        return bool(held.group.get("decoupled_weight_decay", False))


class LionRule(OptimizerRule):
    """Lion: the sign of a blend of momentum and gradient, which is the blend over its size."""

    reads = "one"
    keys = ("exp_avg",)
    options: ClassVar[Mapping[str, Any]] = {"betas": (0.9, 0.99), "weight_decay": 0.0}

    def diagonal(self, held: Held, gradients: Tensor | None) -> Tensor:
        assert gradients is not None
        beta1 = float(held.group["betas"][0])
        blend = (1 - beta1) * gradients[0]
        average = held.tensor("exp_avg")
        if average is not None:
            blend += beta1 * average
        size = blend.abs_()
        moved = size >= torch.finfo(size.dtype).tiny  # what is less has no reciprocal
        return torch.where(moved, held.rate * (1 - beta1) / size, 0.0)

    def momentum(self, held: Held, diagonal: Tensor) -> Tensor | None:
        average, beta1 = held.tensor("exp_avg"), float(held.group["betas"][0])
        return None if average is None else beta1 / (1 - beta1) * diagonal * average

    def decoupled(self, held: Held) -> bool:
        return True


RULES: dict[str, OptimizerRule] = {
    "sgd": SgdRule(),
    "adam": AdamRule(),
    "adamw": AdamRule(),
    "lion": LionRule(),
}
"""By the name of the metric; adam and adamw differ in their groups' `decoupled_weight_decay`."""
