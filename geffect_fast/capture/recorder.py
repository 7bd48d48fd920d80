"""Hooks that watch one forward and its backwards, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from geffect_fast.capture.calls import (
    Call,
    GenericCall,
    broadcast_ids,
    dropout_in_use,
    rule_for,
    tensors_of,
)
from geffect_fast.capture.factors import Factor
from geffect_fast.capture.segments import Segments
from geffect_fast.errors import InputError

Sink = Callable[[str, list[Factor], list[Tensor | None]], None]
"""Receives a parameter's name, the factors that arrived for it, and what was kept for each."""


@dataclass(frozen=True)
class Plan:
    """Which module owns which trainable parameters, and the rule that is exact for each.

    Made once a model; `Recorder`s are made from it, one a batch.

    Attributes:
        model: the model.
        parameters: its trainable parameters by name (a tied one once, under its first name).
        owners: module name -> (module, local name -> name in the model, rule, the rule's factor).
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    owners: Mapping[str, tuple[nn.Module, dict[str, str], type[Call], float]]

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """Look at every module once.

        Raises:
            InputError: the model has no trainable parameter, or dropout is active.
        """
        dropping = dropout_in_use(model)
        if dropping is not None:
            raise InputError(
                f"model: '{dropping}' is in train mode with active dropout, so gradients would be "
                "random; call model.eval() first"
            )
        parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise InputError("model: every parameter is frozen; set requires_grad on some of them")
        names = {id(p): name for name, p in parameters.items()}
        owners = {}
        for where, module in model.named_modules():
            own = {k: p for k, p in module._parameters.items() if p is not None}
            trainable = {k: names[id(p)] for k, p in own.items() if id(p) in names}
            if trainable:
                owners[where] = (module, trainable, *rule_for(module))
        return cls(model, parameters, owners)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter asks for a gradient inside, so that a backward forms activation gradients only."""
        try:
            for p in self.parameters.values():
                p.requires_grad_(False)
            yield
        finally:
            for p in self.parameters.values():
                p.requires_grad_(True)


class Recorder:
    """Context manager: inside it, every backward hands factors of per-sample gradients to `sink`.

    A parameter's factors are handed over as soon as the output gradient of a call has arrived. With
    `join=True` they are kept until the backward is over (`finish`) and handed over together, for
    what is not additive over calls (norms). The generic rule always waits, as it needs the
    gradients of all of a module's outputs.

    Args:
        plan: of the model.
        sink: receives the factors.
        segments: the sample axis; may be set later, but before the first backward.
        join: whether all factors of a parameter are wanted at once.
        directions: `(M, *shape)` a parameter; given, what inner products with them share between
            objectives is computed in the forward and kept.
        n_rows: rows of the input of a rectangular batch, to undo position ids that are shared.
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        segments: Segments | None = None,
        *,
        join: bool = False,
        directions: Mapping[str, Tensor] | None = None,
        n_rows: int = 1,
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.segments = segments
        self.join = join
        self.directions = directions
        self.n_rows = n_rows
        self.calls: list[Call] = []
        self.roots: list[Tensor] = []
        """Leaves that a backward must reach when parameters are frozen."""
        self._handles: list[RemovableHandle] = []
        self._waiting: dict[int, list[Tensor | None]] = {}
        self._joined: dict[str, list[Factor]] = {}
        self._looking_away = False

    def __enter__(self) -> Recorder:
        for where, (module, *_) in self.plan.owners.items():
            before, after = partial(self._before, where), partial(self._after, where)
            # First among the module's hooks: another hook may replace the output.
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(
                module.register_forward_hook(after, with_kwargs=True, prepend=True)
            )
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for call in self.calls:
            call.args, call.kwargs = (), {}
        self._waiting.clear()
        self._joined.clear()

    def finish(self) -> None:
        """Hand over what waited for the end of the backward; call it after every backward."""
        assert self.segments is not None
        waiting, self._waiting = self._waiting, {}
        self._looking_away = True
        try:
            for index, grads in waiting.items():
                call = self.calls[index]
                assert isinstance(call, GenericCall)
                for name, factor in call.gradients(grads, self.segments):
                    self._hand_over(name, factor, None)
        finally:
            self._looking_away = False
        joined, self._joined = self._joined, {}
        for name, factors in joined.items():
            self.sink(name, factors, [None] * len(factors))

    def _before(
        self, where: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._looking_away or not torch.is_grad_enabled():
            return None
        return broadcast_ids(module, args, self.n_rows), kwargs

    def _after(
        self,
        where: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if self._looking_away or not torch.is_grad_enabled():
            return None
        _, names, rule, factor = self.plan.owners[where]
        if len(args) + len(kwargs) != 1 or not isinstance(output, Tensor):
            rule = GenericCall
        detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        call = rule(where, module, names, *detached, factor)
        index = len(self.calls)
        self.calls.append(call)
        grafted = output
        if not any(y.requires_grad for y in tensors_of(output)):
            grafted = tree_map(self._root, output)
        with torch.no_grad():
            kept = call.constants(self.directions) if self.directions is not None else {}
        for position, y in enumerate(tensors_of(grafted)):
            if y.requires_grad:
                y.register_hook(partial(self._arrived, index, position, kept))
        return grafted

    def _root(self, y: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        leaf = y.detach().requires_grad_()
        self.roots.append(leaf)
        return leaf.clone()  # not the leaf itself: the model may go on to change it in place

    @torch.no_grad()
    def _arrived(self, index: int, position: int, kept: dict[str, Tensor], g: Tensor) -> None:
        if self.segments is None:
            raise RuntimeError("the recorder's segments must be set before the backward")
        call = self.calls[index]
        if isinstance(call, GenericCall):
            grads = self._waiting.setdefault(index, [])
            grads.extend([None] * (position + 1 - len(grads)))
            grads[position] = g
            return
        self._looking_away = True
        try:
            for name, factor in call.factors(g, self.segments):
                self._hand_over(name, factor, kept.get(name))
        finally:
            self._looking_away = False

    def _hand_over(self, name: str, factor: Factor, kept: Tensor | None) -> None:
        if self.join:
            self._joined.setdefault(name, []).append(factor)
        else:
            self.sink(name, [factor], [kept])
