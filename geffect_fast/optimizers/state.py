"""The state of a live optimizer or of a checkpoint, by the names of a model's parameters."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import own_part
from geffect_fast.capture.parts import part_of
from geffect_fast.errors import InputError
from geffect_fast.optimizers.rules import RULES, Held
from geffect_fast.paths import user_path

OPTIMIZER = "optimizer.pt"
"""Name of the file that holds the optimizer's state in a Trainer's checkpoint."""

KNOWN = ", ".join(RULES)

_CLASSES = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}


def inside(optimizer: Any) -> Any:
    """The optimizer itself, without accelerate's wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def kind_of(optimizer: Any) -> str | None:
    """The metric of a live optimizer, a key of `RULES`; None: it is not known."""
    optimizer = inside(optimizer)
    kind = _CLASSES.get(type(optimizer))
    if kind == "adam" and any(g.get("decoupled_weight_decay") for g in optimizer.param_groups):
        return "adamw"
    if kind is None and type(optimizer).__name__ == "Lion":
        groups = getattr(optimizer, "param_groups", [])
        return (
            "lion" if all({"betas", "weight_decay"} <= group.keys() for group in groups) else None
        )
    return kind


def held_by(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], where: str = "optimizer"
) -> dict[str, Held]:
    """A live optimizer's `Held` of each parameter of a model, by name; `where` is for messages.

    Raises:
        InputError: the optimizer lacks a parameter, or a tensor of its state has another shape.
    """
    optimizer = inside(optimizer)
    owned = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, p in parameters.items():
        if id(p) not in owned:
            raise InputError(
                f"{where}: it does not hold '{name}' of the model; make it from this model's "
                "parameters, or freeze what it does not step"
            )
        found[name] = Held(p, owned[id(p)], optimizer.state.get(p, {}))
    return _checked(found, where)


def read_state(source: str | Path) -> tuple[dict[str, Any], str]:
    """An optimizer's state dict from its file or the folder of a checkpoint, and the file's name.

    Raises:
        InputError: there is no such file, or it is damaged or holds more than tensors and numbers.
    """
    file = user_path(source).absolute()
    if file.is_dir():
        file = file / OPTIMIZER
    if not file.is_file():
        raise InputError(
            f"optimizer {file}: there is no such file; give optimizer.pt of a checkpoint, or the "
            "checkpoint's folder"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of files that are refused below
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise InputError(
            f"optimizer {file} cannot be read as tensors and numbers: it is damaged, or of another "
            "kind; give optimizer.pt of a Trainer's checkpoint"
        ) from None
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not isinstance(state.get("state"), dict):
        raise InputError(
            f"optimizer {file} holds no state of an optimizer; give optimizer.pt of a checkpoint"
        )
    return state, str(file)


def kind_of_state(state: Mapping[str, Any]) -> str | None:
    """The metric of a state dict, judged by its entries; None: it is not known."""
    keys = {key for each in state["state"].values() for key in each}
    options = {key for group in state["param_groups"] for key in group}
    if "exp_avg_sq" in keys and {"betas", "eps", "amsgrad"} <= options:
        decoupled = any(g.get("decoupled_weight_decay") for g in state["param_groups"])
        return "adamw" if decoupled else "adam"
    if keys <= {"momentum_buffer"} and {"momentum", "dampening", "nesterov"} <= options:
        return "sgd"
    if "exp_avg" in keys and keys <= {"exp_avg", "step"} and "betas" in options:
        return "lion"
    return None


def held_in_state(
    state: Mapping[str, Any], where: str, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Held]:
    """A saved state's `Held` of each parameter of a model, by name.

    A saved state knows parameters by their order only. The order is that of a Trainer, which puts
    parameters that decay first, or that of the model where there is one group. Every tensor's shape
    is compared.

    Args:
        state: the state, as `read_state` reads it.
        where: the place that the state is from, for messages.
        model: the model that the state belongs to.
        parameters: the trainable parameters, by name.

    Raises:
        InputError: the state is of another model.
    """
    groups: Sequence[Mapping[str, Any]] = state["param_groups"]
    names = {id(p): name for name, p in parameters.items()}
    found = {}
    for group, own in zip(groups, _in_order(groups, model, where), strict=True):
        if len(group["params"]) != len(own):
            raise InputError(
                f"optimizer {where}: a group of it has {len(group['params'])} parameters, and the "
                f"model's {len(own)}; it is the state of another model: give this one's"
            )
        for number, p in zip(group["params"], own, strict=True):
            if id(p) in names:
                found[names[id(p)]] = Held(p, group, state["state"].get(number, {}))
    for name in parameters:
        if name not in found:
            raise InputError(
                f"optimizer {where}: it does not hold '{name}' of the model; give the state of "
                "this model's optimizer"
            )
    ordered = {name: found[name] for name in parameters}
    return _checked(ordered, f"optimizer {where}")


def _in_order(
    groups: Sequence[Mapping[str, Any]], model: nn.Module, where: str
) -> Iterator[list[nn.Parameter]]:
    """The model's trainable parameters, group by group, in the order of the saved state."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if len(groups) == 1:
        yield list(trainable.values())
        return
    if len(groups) != 2:
        raise InputError(
            f"optimizer {where}: it has {len(groups)} groups of parameters, and a Trainer's has "
            "two; give the optimizer itself in Python"
        )
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))
    yield [p for name, p in trainable.items() if name in decaying]
    yield [p for name, p in trainable.items() if name not in decaying]


def _checked(held: dict[str, Held], where: str) -> dict[str, Held]:
    """This rank's part of each `Held`; raise `InputError` where a tensor has another shape."""
    for name, each in held.items():
        for key, value in each.state.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != each.parameter.shape:
                raise InputError(
                    f"{where}: its {key} of '{name}' has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(each.parameter.shape)}; it is the state of another model: give this "
                    "one's"
                )
    return {name: _own_part(each) for name, each in held.items()}


def _own_part(held: Held) -> Held:
    p = held.parameter
    state = {
        key: own_part(part_of(value, p)) if isinstance(value, Tensor) and value.dim() else value
        for key, value in held.state.items()
    }
    return replace(held, parameter=own_part(p), state=state)


def check_options(held: Iterable[Held], kind: str, where: str) -> None:
    """Raise `InputError` where groups lack what a metric reads, or ascend instead of descending."""
    for each in held:
        missing = [key for key in ("lr", *RULES[kind].options) if key not in each.group]
        keys = RULES[kind].keys
        missing += [key for key in keys if each.state and key not in each.state]
        if missing:
            raise InputError(
                f"{where}: it has no '{missing[0]}', so it is no state of {kind}; choose its own "
                f"metric from {KNOWN}"
            )
        if each.group.get("maximize"):
            raise InputError(
                f"{where}: it maximizes, but effects describe descent; negate the loss"
            )
