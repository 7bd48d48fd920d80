"""Memory of answers that were found by running a model, valid until the model changes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import own_part

Answered = TypeVar("Answered")


class Remembered(Generic[Answered]):
    """The last answer found about each model, valid as long as the model's state is the same."""

    def __init__(self) -> None:
        self._answers: WeakKeyDictionary[nn.Module, tuple[Hashable, Answered]] = WeakKeyDictionary()

    def get(self, model: nn.Module, state: Hashable) -> Answered | None:
        """The answer found when the model was in this state; None where there is none."""
        then, answer = self._answers.get(model, (None, None))
        return answer if then == state else None

    def keep(self, model: nn.Module, state: Hashable, answer: Answered) -> None:
        """Keep an answer in place of an earlier one. The answer must not hold the model."""
        self._answers[model] = (state, answer)


def state_of(plan: Plan) -> Hashable:
    """A key that stays equal as long as a model computes the same, for the same parameters.

    The key holds the modules with their modes, hooks and plain settings (active adapters are some),
    the configs (which attention runs), the parameters and buffers with their place, type and number
    of writes (what a router does depends on them), the rules that serve the parameters, and
    autocast.
    """
    model = plan.model
    modules = []
    for module in model.modules():
        own = vars(module)
        modules.append(
            (
                type(module),
                id(own["forward"]) if "forward" in own else None,
                tuple(module._forward_hooks),
                tuple(module._forward_pre_hooks),
                *((k, _plain(own[k])) for k in sorted(own.keys() - _OF_EVERY_MODULE)),
            )
        )
    parameters = model.parameters() if plan.shards is None else plan.shards.parts
    tensors = tuple(
        (own_part(x).data_ptr(), x._version, x.dtype, x.device, x.shape, x.requires_grad)
        for x in (*parameters, *model.buffers())
    )
    served = tuple(
        (where, own.rule, own.factor, *own.names.items()) for where, own in plan.owners.items()
    )
    kinds = sorted({x.device.type for x in model.parameters()})
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    )
    return tuple(modules), settings_of(model), tensors, served, autocast


def settings_of(model: nn.Module) -> Hashable:
    """The settings in the configs of a model, in a form that can be compared."""
    found = (vars(module).get("config") for module in model.modules())
    configs = {id(config): config for config in found if config is not None}
    return tuple(_plain(vars(config)) for config in configs.values())


_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _plain(x: Any) -> Hashable:
    """A setting in a form that can be compared. An object that is no plain value is its type."""
    if isinstance(x, _PLAIN):
        return type(x), x
    if isinstance(x, dict):
        return tuple(
            (str(k), _plain(v)) for k, v in sorted(x.items(), key=lambda item: str(item[0]))
        )
    if isinstance(x, list | tuple | set):
        return tuple(map(_plain, sorted(x, key=str) if isinstance(x, set) else x))
    return repr(type(x))
