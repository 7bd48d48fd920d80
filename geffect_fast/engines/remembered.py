"""Memory of answers that were found by running a model, valid until the model changes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import own_part
from geffect_fast.capture.keys import model_key

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

    The key holds the model without its tensors (`model_key`), the parameters and buffers with their
    place, type and number of writes (what a router does depends on them), the rules that serve the
    parameters, and autocast.
    """
    model = plan.model
    parameters = model.parameters() if plan.shards is None else plan.shards.parts
    tensors = tuple(
        (own_part(x).data_ptr(), x._version, x.dtype, x.device, x.shape, x.requires_grad)
        for x in (*parameters, *model.buffers())
    )
    served = tuple(
        (where, own.rule, own.fitted, *own.names.items()) for where, own in plan.owners.items()
    )
    kinds = sorted({x.device.type for x in model.parameters()})
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    )
    return model_key(model), tensors, served, autocast
