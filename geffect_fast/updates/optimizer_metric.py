"""The metric in which an optimizer measures gradients, from its live state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.errors import InputError
from geffect_fast.optimizers.rules import adam_scale
from geffect_fast.optimizers.state import held_by, inside, kind_of

_ADAM = ("adam", "adamw")


def check_optimizer(optimizer: Any, parameters: Mapping[str, nn.Parameter], rule: str) -> None:
    """Raise `InputError` where a rule cannot measure in an optimizer's metric.

    Args:
        optimizer: the optimizer that will step.
        parameters: the trainable parameters of the model, by name.
        rule: the update rule, for the message.
    """
    if kind_of(optimizer) not in ("sgd", *_ADAM):
        name = "no optimizer" if optimizer is None else type(inside(optimizer)).__name__
        raise InputError(
            f"update {rule}: measures in the optimizer's metric and does not know that of {name}; "
            "use sgd, adam or adamw of torch (--optimizer adamw_torch)"
        )
    held_by(optimizer, parameters, f"optimizer of update {rule}")


@torch.no_grad()
def metric(optimizer: Any, p: nn.Parameter) -> Tensor | None:
    """`1 / (sqrt(v_hat) + eps)` of Adam for one parameter, by which its last step was scaled.

    None where the optimizer steps along the gradient, or has not stepped this parameter yet.
    """
    if kind_of(optimizer) not in _ADAM:
        return None
    optimizer = inside(optimizer)
    state = optimizer.state.get(p, {})
    if "exp_avg_sq" not in state:
        return None
    group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
    squares = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return adam_scale(squares.clone(), float(state["step"]), group)
