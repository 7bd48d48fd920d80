"""A model's outputs on a batch, and how they move with its parameters, from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import forward_differentiable, plain_name
from geffect_fast.data.batch import Batch
from geffect_fast.engines.dual.modes import DualFunctions, DualPass
from geffect_fast.engines.dual.modules import dual_modules, fast_forwards
from geffect_fast.engines.dual.packing import Packing, packing
from geffect_fast.engines.dual.tensor import Dual, NoRuleError
from geffect_fast.engines.dual.transformers_attention import attention_apart
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.objectives import Outputs
from geffect_fast.objectives.base import Need

_BY_FRAMEWORK: WeakSet[nn.Module] = WeakSet()
"""Models that duals do not pass."""


class DualModel:
    """A model that is run along directions of its parameters.

    Its own code runs, with duals in place of the parameters that move (`tensor`). Where that
    cannot be, because something in the model writes into a constant, say, torch's forward mode runs
    the model instead: whatever it does, at the price of more host time.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._forwards = fast_forwards(plan.model)
        self._names = {p: plain_name(name) for name, p in plan.model.named_parameters()}
        # Without a graph, although gradients are enabled. What is frozen has none and stays what it
        # is: a quantised weight knows itself how it is read.
        self._values: dict[str, Tensor] = {
            name: p.detach() if p.requires_grad else p for p, name in self._names.items()
        }

    @property
    def by_framework(self) -> bool:
        """Whether torch's forward mode runs the model, as duals do not pass it."""
        return self.plan.model in _BY_FRAMEWORK

    def run_by_framework(self) -> None:
        """Have torch's forward mode run this model from now on."""
        _BY_FRAMEWORK.add(self.plan.model)

    def outputs(
        self, directions: Mapping[str, Tensor], batch: Batch, needs: frozenset[Need]
    ) -> tuple[Outputs, list[Outputs]]:
        """What the model says about a batch, and how that moves with the parameters.

        Args:
            directions: `(M, *shape)` for the parameters that move, in their dtype.
            batch: on the model's device.
            needs: as `model_outputs`.

        Returns:
            The outputs, and their derivatives along each direction.
        """
        with self._ready():
            if not self.by_framework:
                try:
                    found = self._by_duals(directions, batch, needs)
                except NoRuleError:
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
        """The model as forward mode can differentiate it, and fast; left as it was."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())  # so that `no_grad` is seen to be entered
            stack.enter_context(forward_differentiable(self.plan.model))
            stack.enter_context(dual_modules(self._forwards))
            yield

    def _by_duals(
        self, directions: Mapping[str, Tensor], batch: Batch, needs: frozenset[Need]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        own = {
            name: Dual(p, directions[name]) if name in directions else p
            for name, p in self._values.items()
        }
        places = [
            (module._parameters, key, p)
            for module in self.plan.model.modules()
            for key, p in module._parameters.items()
            if p is not None
        ]
        layout = _packing(batch)
        with packing(layout), attention_apart(self.plan.model, layout):
            try:
                for holder, key, p in places:
                    holder[key] = own[self._names[p]]  # type: ignore[assignment]
                with DualPass():
                    found = model_outputs(self.plan.model, batch, needs).tensors()
            finally:
                for holder, key, p in places:
                    holder[key] = p
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
        run = _Run(self.plan.model)
        moving = {name: p for name, p in self._values.items() if name in directions}
        along = {name: directions[name] for name in moving}
        # Each place where a module holds one, once: of a module that stands at several places torch
        # would put back what it had put there itself.
        places = {
            f"{where}.{key}": self._names[p]
            for where, module in run.named_modules()
            for key, p in module._parameters.items()
            if p is not None
        }

        def outputs(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
            given = self._values | parameters
            replaced = {place: given[name] for place, name in places.items()}
            found: tuple[Tensor, ...] = functional_call(
                run, replaced, (batch, needs), tie_weights=False
            )
            return found

        def dual(v: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            values, tangents = jvp(outputs, (moving,), (v,))[:2]
            return values, tangents

        with packed_attention(self.plan.model, batch), DualFunctions():
            values, tangents = vmap(dual, out_dims=(None, 0))(along)  # type: ignore[arg-type]
        return values, tangents


class _Run(nn.Module):
    """A model's outputs on a batch as a function of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, needs: frozenset[Need]) -> tuple[Tensor, ...]:
        return model_outputs(self.model, batch, needs).tensors()


def _packing(batch: Batch) -> Packing | None:
    lengths = list(batch.sequence_lengths)
    packed = batch.packed and len(lengths) > 1
    return Packing.of(lengths, batch.input_ids.device) if packed else None
