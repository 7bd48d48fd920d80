"""Hooks that watch one forward and its backwards, and leave nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from geffect_fast.capture.attribution import ANY, Attribution
from geffect_fast.capture.factors import Factor
from geffect_fast.capture.generic_rule import GenericCall
from geffect_fast.capture.inputs import REPLAYING, Inputs, tensors_of
from geffect_fast.capture.layer_rules import Call, InputGrams, NormWeights
from geffect_fast.capture.leaves import leaves_of
from geffect_fast.capture.outside_use import OutsideUseInGraph
from geffect_fast.capture.plan import Plan
from geffect_fast.capture.segments import Segments
from geffect_fast.errors import InputError, UnsupportedModelError

Sink = Callable[[str, list[Factor], list[Tensor | None]], None]
"""Receives a parameter's name, the factors that arrived for it, and what was kept for each."""


@dataclass(frozen=True)
class Recording:
    """Choices of a recording: what a forward keeps for its backwards, and how factors arrive.

    A parameter's factors are handed over as soon as the output gradient of a call has arrived,
    unless they are joined. Factors of the generic rule are handed over when the backward is over,
    because the rule needs the gradients of all of a module's outputs.

    Attributes:
        joined: whether all factors of a parameter that is used several times are handed over
            together, when the backward is over. Quantities that are not additive over calls, such
            as norms, need this.
        one_backward: whether a single backward follows, so that a call's tensors are let go of as
            soon as its gradient has arrived, and the backward reuses their memory.
        directions: `(M, *shape)` by parameter. If given, the half of the inner products with them
            that all objectives share is computed in the forward and kept.
        norms_alone: whether factors are used for norms alone. Then the forward computes what norms
            need of the inputs and keeps it in their place, as `GramOuter`, except where a parameter
            is used twice, for which norms need the inputs themselves.
    """

    joined: bool = False
    one_backward: bool = False
    directions: Mapping[str, Tensor] | None = None
    norms_alone: bool = False


class Recorder:
    """A context in which every backward hands factors of per-sample gradients to `sink`.

    Args:
        plan: the plan of the model.
        sink: receives the factors.
        segments: the sample axis of the next forward; set before the forward runs.
        recording: what is kept, and how factors are handed over.

    Attributes:
        calls: every call that was seen and is still held, by its number.
        roots: leaves that a backward must reach when parameters are frozen.
        structure: the modules called, in order, and how the axes of their outputs compare with the
            batch's. Forwards of one structure count rows for samples in the same way.
        called_again: names of modules called twice whose first inputs are gone, as norms alone were
            asked for. The plan has to learn them, and the forward has to run again.
        gave_positions: whether position ids shared by all samples were expanded to each sample,
            which a model might not take.
        attribution: the trial, if one is running, that notes and compares backwards.
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        segments: Segments | None = None,
        recording: Recording = Recording(),
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.segments = segments
        self.recording = recording
        self.calls: dict[int, Call] = {}
        self.roots: list[Tensor] = []
        self.structure: list[Hashable] = []
        self.called_again: set[str] = set()
        self.gave_positions = False
        self.attribution: Attribution | None = None
        self._number = count()
        self._handles: list[RemovableHandle] = []
        self._entered: dict[str, list[tuple[Inputs | None, list[nn.Parameter]]]] = {}
        self._outside: OutsideUseInGraph | None = None
        self._waiting: dict[int, list[Tensor | None]] = {}
        self._joined: dict[str, list[Factor]] = {}
        self._uses: Counter[str] = Counter()
        self._grams = InputGrams()
        self._norm_weights = NormWeights(plan.norms())
        self._condensed: set[str] = set()
        self._condensable: set[str] = set()
        """Modules whose parameters no other module owns, and of which no second call is known."""
        if recording.norms_alone:
            owners = Counter(k for own in plan.owners.values() for k in own.names.values())
            self._condensable = {
                where
                for where, own in plan.owners.items()
                if all(owners[name] == 1 for name in own.names.values())
            } - plan.learned.called_again

    def __enter__(self) -> Recorder:
        for where, owner in self.plan.owners.items():
            module = owner.module
            before, after = partial(self._before, where), partial(self._after, where)
            # First among the module's hooks: another hook may replace the input or the output.
            self._handles.append(
                module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            )
            self._handles.append(
                module.register_forward_hook(after, with_kwargs=True, prepend=True)
            )
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        for kept in (self._handles, self.calls, self.roots):
            kept.clear()
        for waiting in (self._entered, self._waiting, self._joined, self._uses):
            waiting.clear()

    def leaves_of(self, losses: Tensor) -> list[Tensor] | None:
        """All leaves that losses depend on, after a forward inside `showing_parameters`.

        None where the plan learned something from the forward, which then has to run again with
        another recorder.

        Raises:
            UnsupportedModelError: a parameter is used outside the model.
        """
        leaves, shards = leaves_of(losses), self.plan.shards
        outside, again = self.plan.names_of(leaves), self.called_again
        if shards is not None:  # all ranks learn what the rows of any of them show
            told = shards.ranks.meet((outside, again))
            seen = {name for names, _ in told for name in names}
            outside = [name for name in self.plan.parameters if name in seen]
            again = {where for _, of in told for where in of}
        if not outside and not again:
            return leaves
        self.plan.widen(outside)
        self.plan.learned.called_again |= again
        return None

    def roots_of(self, y: Tensor) -> list[Tensor]:
        """The leaves that a backward from `y` must reach to pass by every recorded call.

        Parameters are left out. Beside `roots` there may be others, such as embeddings that a hook
        lets ask for a gradient (`enable_input_require_grads`).

        Raises:
            InputError: there is no leaf, so `y` depends on no trainable parameter.
        """
        leaves = leaves_of(y)
        if not leaves:
            raise InputError(
                "model: its output depends on no trainable parameter (an adapter that is merged or "
                "switched off?); set requires_grad on parameters that take part"
            )
        parameters = {id(p) for p in self.plan.parameters.values()}
        return [leaf for leaf in leaves if id(leaf) not in parameters]

    def weigh(self, losses: Tensor, sources: Sequence[Tensor]) -> Attribution:
        """Run the first backward of a trial of rows; the next backward is compared with it.

        Args:
            losses: `(n_samples,)`, each of which depends on its own sample alone.
            sources: the leaves that a backward must reach.
        """
        trial = self.attribution = Attribution(self.plan.model, len(losses))
        torch.autograd.grad(trial.weighted(losses), sources, retain_graph=True, allow_unused=True)
        trial.noting = False
        return trial

    def to_be_shown(self) -> bool:
        """Whether rows still have to be shown to belong to the samples they are counted for.

        Where every token is a segment nothing is shown: rows of samples were shown before.
        """
        axis, shown = self.segments, self.plan.shown
        if axis is None or axis.per_token:
            return False
        is_open = ANY not in shown and tuple(self.structure) not in shown and axis.n_samples > 1
        return self.plan.on_any_rank(is_open)

    def show_rows(self, losses: Tensor, sources: Sequence[Tensor]) -> None:
        """Show that rows belong to the samples they are counted for, once for a structure of calls.

        This takes two backwards, which hand over no factors.

        Args:
            losses, sources: as `weigh` takes them.

        Raises:
            UnsupportedModelError: rows do not belong to their samples; the module is named.
        """
        trial = self.weigh(losses, sources)
        trial.alone = True
        torch.autograd.grad(losses.sum(), sources, retain_graph=True, allow_unused=True)
        self.attribution = None
        trial.conclude()
        self.plan.shown.add(tuple(self.structure))

    @contextmanager
    def showing_parameters(self) -> Iterator[None]:
        """Inside, the graph of a forward shows parameters that are used outside their modules."""
        try:
            with OutsideUseInGraph(self.plan) as self._outside:
                yield
        finally:
            self._outside = None

    def running(self, where: str) -> bool:
        """Whether the module's forward has been entered and not yet left."""
        return bool(self._entered.get(where))

    def finish(self) -> None:
        """Hand over the factors that waited for the end of a backward; call it after each one.

        If the sink has a `finish` of its own, it is called last, when every factor has arrived.
        """
        waiting, self._waiting = self._waiting, {}
        with self.plan.generic_at_hand():
            for index, grads in waiting.items():
                call = self.calls[index]
                assert isinstance(call, GenericCall)
                for name, factor in call.gradients(grads):
                    self._hand_over(name, factor, None)
            joined, self._joined = self._joined, {}
            for name, factors in joined.items():
                self.sink(name, factors, [None] * len(factors))
            told = getattr(self.sink, "finish", None)
            if told is not None:
                told()

    def _before(
        self, where: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if REPLAYING.get() or not torch.is_grad_enabled():
            return None
        with torch._C.DisableTorchFunction():  # `OutsideUse` need not look at what hooks do
            if self.segments is not None:
                of_each = _ids_of_each(module, args, self.segments)
                self.gave_positions |= of_each is not args
                args = of_each
            # The generic rule runs the module again, other hooks included, so it takes the
            # arguments from before those hooks.
            again = len(args) + len(kwargs) != 1 or self.plan.owners[where].rule is GenericCall
            inputs = Inputs.of(args, kwargs) if again else None
        hidden = [] if self._outside is None else self._outside.hide(where)
        self._entered.setdefault(where, []).append((inputs, hidden))
        return args, kwargs

    def _after(
        self,
        where: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if REPLAYING.get() or not torch.is_grad_enabled():
            return None
        with torch._C.DisableTorchFunction():
            return self._watch(where, module, args, kwargs, output)

    def _watch(
        self,
        where: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        own = self.plan.owners[where]
        names, rule = own.names, own.rule
        inputs, hidden = self._entered[where].pop()
        self.plan.ask(hidden, True)
        if inputs is not None or not isinstance(output, Tensor):
            rule = GenericCall
        inputs = Inputs.of(args, kwargs) if inputs is None else inputs
        call = rule(where, module, names, inputs, own.fitted, self.segments, self.plan.axes)
        index = next(self._number)
        self.calls[index] = call
        for name in names.values():
            self._uses[name] += 1
            self.plan.learned.served.setdefault(name, {})[rule] = None
        call.keep(output, self._norm_weights)
        if where in self._condensable:
            self._condense(call, output)
        kept: dict[str, Tensor] = {}
        if self.recording.directions is not None:
            # Rows that cannot be told apart matter only where a gradient arrives: DoRA runs its
            # layers on an identity matrix, and detaches what they return.
            with torch.no_grad(), suppress(UnsupportedModelError):
                kept = call.constants(self.recording.directions)
        if isinstance(output, Tensor):  # the most common output; pytrees take a while
            grafted = self._graft(rule, output)
        else:
            leaves, structure = tree_flatten(output)
            if not any(isinstance(y, Tensor) for y in leaves):
                raise UnsupportedModelError(
                    f"module '{where or type(module).__name__}' returns no tensor that can be "
                    f"watched, but {type(output).__name__}; return a tensor, a tuple or a dict, or "
                    "freeze it"
                )
            grafted = tree_unflatten([self._graft(rule, y) for y in leaves], structure)
        for position, y in enumerate(tensors_of(grafted)):
            if self.segments is not None:
                self.structure.append((where, rule, self.segments.axes_alike(y.shape[:-1])))
            arrived = partial(self._arrived, index, position, kept)
            self._handles.append(y.register_hook(arrived))
        return grafted

    def _condense(self, call: Call, output: Any) -> None:
        """Let a module's first call keep only what norms need; note a second call."""
        if call.where in self._condensed:
            self.called_again.add(call.where)
        elif self._uses[next(iter(call.names.values()))] == 1 and self.segments is not None:
            try:
                if call.condense(self._grams, output):
                    self._condensed.add(call.where)
            except UnsupportedModelError:
                pass  # rows that cannot be told apart matter only where a gradient arrives

    def _graft(self, rule: type[Call], y: Any) -> Any:
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if y.requires_grad:
            # One output may be computed from another, or be an input handed on. A copy receives
            # only the gradient from outside the module. A view would not do, as its hooks are lost
            # when the model changes it in place.
            return y.clone() if rule is GenericCall or y._is_view() else y
        leaf = y.detach().requires_grad_()
        self.roots.append(leaf)
        return leaf.clone()  # not the leaf itself, which the model might change in place

    @torch.no_grad()
    def _arrived(self, index: int, position: int, kept: dict[str, Tensor], g: Tensor) -> None:
        if index not in self.calls:
            raise UnsupportedModelError(
                "loss_fn: a second backward passes the model, such as one of its own inside; what "
                "belongs to the losses cannot be told apart"
            )
        call = self.calls[index]
        trial = self.attribution
        if trial is not None and trial.take((index, position), call, g):
            return
        if self.recording.one_backward and not isinstance(call, GenericCall):
            del self.calls[index]
        if isinstance(call, GenericCall):
            grads = self._waiting.setdefault(index, [])
            grads.extend([None] * (position + 1 - len(grads)))
            grads[position] = g
            return
        for name, factor in call.checked_factors(g):
            self._hand_over(name, factor, kept.get(name))

    def _hand_over(self, name: str, factor: Factor, kept: Tensor | None) -> None:
        if self.recording.joined and self._uses[name] > 1:
            self._joined.setdefault(name, []).append(factor)
        else:
            self.sink(name, [factor], [kept])


def _ids_of_each(module: nn.Module, args: tuple[Any, ...], segments: Segments) -> tuple[Any, ...]:
    """A module's arguments, with position ids `(1, length)` of all sequences expanded to each."""
    if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
        ids, n, length = args[0], segments.n_rows, segments.length or 0
        # A single id may be anything, such as the one distance within a sample of one token.
        if n > 1 and length > 1 and ids.shape == (1, length):
            return (ids.expand(n, length), *args[1:])
    return args
