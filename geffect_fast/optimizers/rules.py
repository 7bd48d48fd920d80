"""The step that an optimizer makes of a gradient: a diagonal, its momentum, and weight decay.

    theta' = theta - lr (P g + momentum + decay)

This is exact for every optimizer here if `P` is formed with the step's own gradient `g`. SGD's `P`
is a number. Adam's `P` holds the mean of squares, to which this step adds its own. Lion's sign is
`c / |c|` of a blend `c` that is linear in `g`. Momentum and decay depend on `g` through `P` only.
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
    """An optimizer's hyper-parameters and state for one parameter.

    Attributes:
        parameter: the parameter.
        group: hyper-parameters of its group.
        state: tensors and numbers of its state; empty before the first step.
        rate: the group's learning rate in units of the run's.
    """

    parameter: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    rate: float = 1.0

    def tensor(self, key: str) -> Tensor | None:
        """A tensor of the state, on the parameter's device, in the dtype that gradients add up in.

        None where the state has no such tensor.
        """
        found = self.state.get(key)
        dtype = accumulation_dtype(self.parameter.dtype)
        return None if found is None else found.to(self.parameter.device, dtype)

    def piece(self, at: slice) -> Held:
        """The same for some of the parameter's entries, one-dimensional, in memory order.

        Tensors of the state that do not have the parameter's shape count for all entries, and stay
        as they are.
        """
        shape = self.parameter.shape
        state = {
            key: of.flatten()[at] if isinstance(of, Tensor) and of.shape == shape else of
            for key, of in self.state.items()
        }
        return replace(self, parameter=self.parameter.detach().flatten()[at], state=state)

    def weights(self) -> Tensor:
        """The parameter in the dtype that gradients add up in."""
        return self.parameter.detach().to(accumulation_dtype(self.parameter.dtype))


class OptimizerRule(ABC):
    """The step of one kind of optimizer.

    Attributes:
        reads: the gradients that `P` is formed with: none, the squares of several, or one alone.
        keys: entries of the state once the optimizer has stepped.
        options: entries of its groups beside the learning rate, with their defaults.
    """

    reads: ClassVar[str] = "none"
    keys: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def diagonal(self, held: Held, gradients: Tensor | None) -> Tensor:
        """`P` of a parameter, of its shape or a scalar.

        Args:
            held: the optimizer's hyper-parameters and state for the parameter.
            gradients: gradients of the step, `(K, *shape)`; None: none are read.
        """

    @abstractmethod
    def momentum(self, held: Held, diagonal: Tensor) -> Tensor | None:
        """The part of the step that earlier gradients add; None: nothing."""

    def decay(self, held: Held, diagonal: Tensor) -> Tensor | None:
        """The part of the step that weight decay adds; None: nothing."""
        decay = float(held.group["weight_decay"])
        if decay == 0:
            return None
        scale = held.rate if self.decoupled(held) else diagonal
        return scale * decay * held.weights()

    @abstractmethod
    def decoupled(self, held: Held) -> bool:
        """Whether weight decay is added beside the gradient, and not into the gradient."""

    def fresh(self, held: Held) -> bool:
        """Whether the optimizer has not stepped this parameter, so that `P` is an estimate."""
        return bool(self.keys) and not any(key in held.state for key in self.keys)


class SgdRule(OptimizerRule):
    """SGD, with momentum, dampening and Nesterov's momentum."""

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
        scale = adam_scale(squares, step, held.group)
        return scale.mul_(held.rate * (1 - beta1) / (1 - beta1**step))

    def momentum(self, held: Held, diagonal: Tensor) -> Tensor | None:
        average, beta1 = held.tensor("exp_avg"), float(held.group["betas"][0])
        return None if average is None else beta1 / (1 - beta1) * diagonal * average

    def decoupled(self, held: Held) -> bool:
        return bool(held.group.get("decoupled_weight_decay", False))


def adam_scale(squares: Tensor, step: float, group: Mapping[str, Any]) -> Tensor:
    """`1 / (sqrt(v_hat) + eps)` of Adam after `step` steps; `squares`, its `v`, is overwritten."""
    v_hat = squares.div_(1 - float(group["betas"][1]) ** step)
    return v_hat.sqrt_().add_(float(group["eps"])).reciprocal_()


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
        moved = size >= torch.finfo(size.dtype).tiny  # smaller sizes have no finite reciprocal
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
"""Rules by the name of the metric; adam and adamw differ in `decoupled_weight_decay` of groups."""
