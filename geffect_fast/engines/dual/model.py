"""A model's outputs on a batch and their derivatives along directions, from one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import jvp, vmap

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import forward_differentiable
from geffect_fast.capture.exchange import Gathered
from geffect_fast.data.batch import Batch
from geffect_fast.engines.dual.modes import DualFunctions, DualPass
from geffect_fast.engines.dual.modules import dual_modules, fast_forwards
from geffect_fast.engines.dual.packing import Packing, packing
from geffect_fast.engines.dual.rule import Primals, Rule, Tangents
from geffect_fast.engines.dual.tensor import Dual, NoRuleError
from geffect_fast.engines.dual.transformers_attention import attention_apart
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.objectives import Outputs
from geffect_fast.objectives.base import Need

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_BY_FRAMEWORK: WeakSet[nn.Module] = WeakSet()
"""Models in which duals fail."""


class DualModel:
    """A model that is run along directions of its parameters.

    The model's own code runs, with duals in place of the parameters that move (`tensor`). Where
    duals fail, for example because the model writes into a constant, torch's forward mode runs the
    model instead. Torch's forward mode takes any code, at the price of more host time.

    Where the parameters are shared out, each group's directions come and go with its weights.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        groups: Any = () if plan.shards is None else plan.shards.groups
        self._forwards = fast_forwards(plan.model, besides=groups)
        self._names = {p: name for name, p in plan.parameters.items()}
        self._order: list[FSDPModule] = []
        """The order in which groups ran last time, the same on all ranks."""

    @property
    def by_framework(self) -> bool:
        """Whether torch's forward mode runs the model, because duals fail in it."""
        return self.plan.model in _BY_FRAMEWORK

    def run_by_framework(self) -> None:
        """Have torch's forward mode run this model from now on."""
        _BY_FRAMEWORK.add(self.plan.model)

    def outputs(
        self, directions: Mapping[str, Tensor], batch: Batch, needs: frozenset[Need]
    ) -> tuple[Outputs, list[Outputs]]:
        """The model's outputs on a batch, and their derivatives along directions of its parameters.

        Args:
            directions: `(M, *shape)` for the parameters that move, in their dtype; this rank's part
                of each where they are shared out.
            batch: on the model's device.
            needs: as `model_outputs` takes them.

        Returns:
            The outputs, and their derivatives along each direction.

        Raises:
            UnsupportedModelError: duals fail in the model, and its parameters are shared out: the
                other ranks would not run it again.
        """
        with self._ready():
            if not self.by_framework:
                try:
                    found = self._by_duals(directions, batch, needs)
                except NoRuleError as error:
                    if self.plan.shards is not None:
                        raise UnsupportedModelError(
                            f"engine forward: {error}; use engine='reverse', without 'token'"
                        ) from error
                    self.run_by_framework()
            if self.by_framework:
                found = self._by_framework(directions, batch, needs)
        values, tangents = found
        has_logits = not {"logits", "reference_logits"}.isdisjoint(needs)
        n = len(next(iter(directions.values())))
        return Outputs.of(values, has_logits), [
            Outputs.of(tuple(t[m] for t in tangents), has_logits) for m in range(n)
        ]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Inside, the model is fast and differentiable in forward mode; restored at the end."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # so that `no_grad` is seen to be entered
            stack.enter_context(forward_differentiable(self.plan.model))
            stack.enter_context(dual_modules(self._forwards))
            yield

    def _by_duals(
        self, directions: Mapping[str, Tensor], batch: Batch, needs: frozenset[Need]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        layout = _packing(batch)
        with (
            packing(layout),
            attention_apart(self.plan.model, layout),
            self.moving(directions, Dual),
            DualPass(),
        ):
            found = model_outputs(self.plan.model, batch, needs).tensors()
        n = len(next(iter(directions.values())))
        values = tuple(x.primal if isinstance(x, Dual) else x for x in found)
        tangents = tuple(
            x.tangents if isinstance(x, Dual) else x.new_zeros(()).expand(n, *x.shape)
            for x in found
        )
        return values, tangents

    def _by_framework(
        self, directions: Mapping[str, Tensor], batch: Batch, needs: frozenset[Need]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        some = next(iter(directions.values()))
        at_rest = some.new_zeros(())

        def outputs(step: Tensor) -> tuple[Tensor, ...]:
            with self.moving(directions, lambda p, along: _MovedParameter(along)(p, step)):
                return model_outputs(self.plan.model, batch, needs).tensors()

        def dual(one: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            values, tangents = jvp(outputs, (at_rest,), (one,))[:2]
            return values, tangents

        with packed_attention(self.plan.model, batch), DualFunctions():
            values, tangents = vmap(dual, out_dims=(None, 0))(  # type: ignore[arg-type]
                some.new_ones(len(some))
            )
        return values, tangents

    @contextmanager
    def moving(
        self, directions: Mapping[str, Tensor], make: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[None]:
        """Inside, modules hold moving tensors in place of parameters that move, else constants.

        Args:
            directions: as `outputs` takes them.
            make: makes a moving tensor of a parameter's value and its whole direction.
        """
        shards = self.plan.shards

        def put(
            places: Sequence[tuple[nn.Module, str, nn.Parameter]],
            came: dict[nn.Parameter, Gathered] | None = None,
        ) -> None:
            instead: dict[nn.Parameter, Tensor] = {}
            for module, key, p in places:
                if p not in instead:
                    # Without a graph, although gradients are enabled. A frozen parameter has none
                    # and stays itself: a quantised weight is read by methods of its own.
                    constant = p.detach() if p.requires_grad else p
                    if came is None:
                        along = directions.get(self._names.get(p, ""))
                    else:
                        with temporarily_clear_interpreter_stack():  # of the framework's transforms
                            along = came.pop(p).arrived() if p in came else None
                    instead[p] = constant if along is None else make(constant, along)
                module._parameters[key] = instead[p]  # type: ignore[assignment]

        def put_back(places: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
            for module, key, p in places:
                module._parameters[key] = p

        if shards is None:
            places = [
                (module, key, p)
                for module in self.plan.model.modules()
                for key, p in module._parameters.items()
                if p is not None
            ]
            try:
                put(places)
                yield
            finally:
                put_back(places)
            return
        running: list[FSDPModule] = []
        entered: list[FSDPModule] = []
        ahead: dict[FSDPModule, dict[nn.Parameter, Gathered]] = {}

        def bring(group: FSDPModule) -> dict[nn.Parameter, Gathered]:
            held = {p: self._names.get(p, "") for _, _, p in shards.places[group]}
            with temporarily_clear_interpreter_stack():
                return {
                    p: Gathered(directions[name], shards.own(p))
                    for p, name in held.items()
                    if name in directions
                }

        def enter(group: Any, *_: Any) -> None:
            running.append(group)
            entered.append(group)
            came = ahead.pop(group) if group in ahead else bring(group)
            n = len(entered)
            if self._order[:n] == entered and n < len(self._order):
                # The next group's directions come while this group computes.
                ahead[self._order[n]] = bring(self._order[n])
            put(shards.places[group], came)

        def leave(group: Any, *_: Any) -> None:
            running.remove(group)
            put_back(shards.places[group])

        # After FSDP's own hook that brings the weights, and before the one that releases them.
        modules: list[Any] = shards.groups
        handles = [m.register_forward_pre_hook(enter) for m in modules]
        handles += [m.register_forward_hook(leave, prepend=True) for m in modules]
        try:
            yield
            self._order = entered
            for came in ahead.values():  # directions of a group that did not run
                for gathered in came.values():
                    gathered.arrived()
        finally:
            for handle in handles:
                handle.remove()
            for group in running:  # groups of a forward that failed
                put_back(shards.places[group])


class _MovedParameter(Rule):
    """The rule of `p + s v_m`, a parameter moved along its directions, at the step `s = 0`."""

    def __init__(self, along: Tensor) -> None:
        self.along = along

    def value(self, p: Tensor, step: Tensor) -> Tensor:
        return p.detach()

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        return self.along


def _packing(batch: Batch) -> Packing | None:
    lengths = list(batch.sequence_lengths)
    packed = batch.packed and len(lengths) > 1
    return Packing.of(lengths, batch.input_ids.device) if packed else None
