"""The metric in which an optimizer measures gradients, from its live state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.errors import InputError

_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_KNOWN = "sgd, adam or adamw of torch (--optimizer adamw_torch)"


def inside(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate has wrapped it."""
    while not isinstance(optimizer, _ADAM) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], rule: str, reads_state: bool
) -> None:
    """Raise `InputError` where a rule cannot work with an optimizer.

    Args:
        optimizer: that will step.
        parameters: the trainable ones of the model, by name.
        rule: for the message.
        reads_state: whether the rule reads its state, and not only the gradients are handed on.
    """
    optimizer = inside(optimizer)
    if reads_state and type(optimizer) not in (*_ADAM, torch.optim.SGD):
        name = "no optimizer" if optimizer is None else type(optimizer).__name__
        raise InputError(
            f"update {rule}: measures in the optimizer's metric and does not know that of {name}; "
            f"use {_KNOWN}"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in parameters.items() if reads_state else ():
        if id(p) not in stepped:
            raise InputError(
                f"update {rule}: the optimizer does not hold '{name}' of the model; make it from "
                "this model's parameters"
            )
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                raise InputError(
                    f"update {rule}: the optimizer's {key} of '{name}' has shape "
                    f"{tuple(value.shape)}, the parameter {tuple(p.shape)}; it is the state of "
                    "another model: load this one's"
                )


@torch.no_grad()
def metric(optimizer: Any, p: nn.Parameter) -> Tensor | None:
    """`1 / (sqrt(v_hat) + eps)` of Adam for one parameter, by which its next step is scaled.

    None where the optimizer steps along the gradient, or has not stepped this parameter yet.
    """
    optimizer = inside(optimizer)
    if not isinstance(optimizer, _ADAM):
        return None
    state = optimizer.state.get(p, {})
    if "exp_avg_sq" not in state:
        return None
    group = _group_of(optimizer.param_groups, p)
    squares = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    correction = 1.0 - group["betas"][1] ** float(state["step"])
    return 1.0 / ((squares / correction).sqrt() + group["eps"])


def _group_of(groups: Iterable[dict[str, Any]], p: nn.Parameter) -> dict[str, Any]:
    return next(group for group in groups if any(q is p for q in group["params"]))
