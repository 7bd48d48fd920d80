"""An update rule at work on one model, with its checks and its memory from update to update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import (
    fsdp_groups,
    own_part,
    plain_name,
    put_to_rest,
    unwrapped,
)
from geffect_fast.capture.modes import evaluating
from geffect_fast.capture.parts import part_of, whole_values
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.ranks import ALONE, here
from geffect_fast.updates.base import UpdateRule
from geffect_fast.updates.optimizer_metric import check_optimizer
from geffect_fast.updates.retain_rows import check_rows
from geffect_fast.updates.step import Losses, Step


class Updater:
    """An update rule that is applied to a model, update by update.

    Args:
        rule: the rule.
        model: the model, whose trainable parameters are updated. Where FSDP2 shares them out, all
            ranks call `update` together, and `state_dict` too.

    Attributes:
        ranks: the ranks that share the model out; this process alone where the model is whole.

    Raises:
        InputError: the rule moves weights by so little that their precision rounds it away.
        UnsupportedModelError: the model is spread over devices in another way.

    Examples:
        >>> updater = Updater(OrthoGrad(), model)
        >>> updater.update(losses, optimizer)  # writes `.grad`
        >>> optimizer.step()
    """

    def __init__(self, rule: UpdateRule, model: nn.Module) -> None:
        self.rule = rule
        self.model = unwrapped(model)
        self.updates = 0
        self._memory: dict[str, dict[str, torch.Tensor]] = {}
        self._plan: Plan | None = None
        self.ranks = here() if fsdp_groups(self.model) else ALONE
        put_to_rest(self.model)
        named = self.model.named_parameters()
        self._parameters = {plain_name(name): p for name, p in named if p.requires_grad}
        _check_spread(rule, self.model, self._parameters)
        if "full_precision" in rule.needs:
            for name, p in self._parameters.items():
                if torch.finfo(p.dtype).bits < 32:
                    raise InputError(
                        f"update {rule}: moves weights by little, which '{name}' in "
                        f"{str(p.dtype).removeprefix('torch.')} rounds away; train in float32 "
                        "(--dtype float32, --precision bf16 to compute in bfloat16)"
                    )

    def check(self, optimizer: Any) -> None:
        """Raise `InputError` where the rule cannot work with an optimizer or with its state."""
        if "optimizer" in self.rule.needs:
            check_optimizer(optimizer, self._parameters, str(self.rule))

    def check_rows(self, n_retain: int) -> None:
        """Raise `InputError` where the rule cannot work with `n_retain` retain rows an update."""
        if "retain_rows" in self.rule.needs:
            device = next(iter(self._parameters.values())).device
            check_rows(n_retain, device, str(self.rule))

    def update(self, losses: Losses, optimizer: Any = None) -> float:
        """Write the parameters' `.grad` for one update; return the objective's value on its rows.

        If the update fails, parameters have no gradients and the rule's memory is as before.

        Args:
            losses: the losses of the update.
            optimizer: the optimizer that will step, for rules that read its state.

        Raises:
            InputError: gradients are there already, other parameters ask for gradients than at the
                start, the objective lacks a retain part that the rule needs, there are no retain
                rows, or the rule does not know the optimizer.
            NonFiniteError: a product of gradients is not finite.
            UnsupportedModelError: retain rows cannot be told apart; the module is named.
        """
        rule, parameters = self.rule, self._parameters
        if "retain_part" in rule.needs and not losses.retain_weight:
            raise no_retain_part(rule)
        self.check(optimizer)
        put_to_rest(self.model)
        known = {id(p) for p in parameters.values()}
        if {id(p) for p in self.model.parameters() if p.requires_grad} != known:
            raise InputError(
                f"update {rule}: the trainable parameters changed since the rule was given the "
                "model; freeze parameters before that"
            )
        for name, p in parameters.items():
            if p.grad is not None and bool(own_part(p.grad).any()):
                raise InputError(
                    f"update {rule}: '{name}' has a gradient already, which the rule cannot be "
                    "applied to; call optimizer.zero_grad() first"
                )
            p.grad = None
        step = Step(rule, self._planned(), losses, optimizer, self.updates, self._memory)
        try:
            with torch.no_grad():
                rule.apply(step)
        except BaseException:
            for p in parameters.values():
                p.grad = None
            raise
        self._memory = step.remembered
        self.updates += 1
        return step.value

    def _planned(self) -> Plan:
        if self._plan is None:
            rows = "retain_rows" in self.rule.needs
            with evaluating(self.model):
                self._plan = (
                    Plan.of(self.model, may_be_sharded=True)
                    if rows
                    else Plan(self.model, self._parameters, {})
                )
        return self._plan

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs: the number of updates, and the rule's memory.

        The memory is whole. For a model in parts it is brought together on the first rank, on the
        CPU, and is empty on the others.
        """
        memory: Mapping[str, Mapping[str, torch.Tensor]] = self._memory
        if self.ranks.size > 1:
            memory = {key: whole_values(g, self.ranks) for key, g in memory.items()}
        return {"rule": str(self.rule), "updates": self.updates, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state that `state_dict` returned.

        Raises:
            InputError: the state is of another rule or model.
        """
        if state.get("rule") != str(self.rule):
            raise InputError(
                f"update {self.rule}: the state is of {state.get('rule')}; resume with that rule, "
                "or begin anew"
            )
        for key, gradient in state["memory"].items():
            for name, value in gradient.items():
                p = self._parameters.get(name)
                if p is None or p.shape != value.shape:
                    raise InputError(
                        f"update {self.rule}: its {key} gradient of '{name}' is of another model; "
                        "resume with the model that was trained"
                    )
        self.updates = int(state["updates"])
        self._memory = {
            key: {
                name: part_of(value.to(self._parameters[name].device), self._parameters[name])
                for name, value in g.items()
            }
            for key, g in state["memory"].items()
        }


def no_retain_part(rule: UpdateRule, objective: str = "the objective") -> InputError:
    """The error of a rule that adds the retain gradient where the objective has no retain part."""
    return InputError(
        f"update {rule}: the retain gradient is part of the update, and {objective} has no retain "
        "part; add one, such as 'ga + nll'"
    )


def _check_spread(
    rule: UpdateRule, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> None:
    others = ["ds_id"] if fsdp_groups(model) else ["ds_id", "placements"]
    if any(hasattr(p, each) for p in parameters.values() for each in others):
        raise UnsupportedModelError(
            f"update {rule}: parameters are spread over devices by ZeRO or tensor parallelism, of "
            "whose parts no inner products are known; share them out by fully_shard (--shard "
            "fsdp), or give the whole model to each (--shard none)"
        )
    if len({p.device for p in parameters.values()}) > 1:
        raise UnsupportedModelError(
            f"update {rule}: parameters lie on several devices; load the model onto one"
        )
