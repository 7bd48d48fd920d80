"""Hooks that watch one forward and its backwards, and leave nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from geffect_fast.capture.attribution import ANY, Attribution
from geffect_fast.capture.factors import Factor
from geffect_fast.capture.generic_rule import GenericCall
from geffect_fast.capture.grams import InputGrams
from geffect_fast.capture.inputs import (
    REPLAYING,
    Given,
    broadcast_ids,
    tensors_of,
)
from geffect_fast.capture.layer_rules import Call, NormWeights
from geffect_fast.capture.plan import Plan
from geffect_fast.capture.samples import Segments
from geffect_fast.errors import InputError, UnsupportedModelError

Sink = Callable[[str, list[Factor], list[Tensor | None]], None]
"""Receives a parameter's name, the factors that arrived for it, and what was kept for each."""


_CALLED_AGAIN: WeakSet[nn.Module] = WeakSet()
"""Modules that were seen to be called more than once in a forward."""


class Recorder:
    """Context manager: inside it, every backward hands factors of per-sample gradients to `sink`.

    A parameter's factors are handed over as soon as the output gradient of a call has arrived. With
    `join=True` those of a parameter that was used several times are kept until the backward is over
    (`finish`) and handed over together, for what is not additive over calls (norms). The generic
    rule always waits, as it needs the gradients of all of a module's outputs.

    Args:
        plan: of the model.
        sink: receives the factors.
        segments: the sample axis of the next forward; set before it runs.
        join: whether all factors of a parameter are wanted at once.
        once: whether there is a single backward, so that what a call holds is let go of as soon as
            its gradient has arrived: the backward's own memory then comes from there.
        directions: `(M, *shape)` a parameter; given, what inner products with them share between
            objectives is computed in the forward and kept.
        norms_alone: whether norms are all that is asked of the factors: what they need of inputs is
            computed in the forward and kept in place of them, as `GramOuter`, but where a parameter
            is used twice, for which norms need the inputs.
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        segments: Segments | None = None,
        *,
        join: bool = False,
        once: bool = False,
        directions: Mapping[str, Tensor] | None = None,
        norms_alone: bool = False,
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.segments = segments
        self.join = join
        self.once = once
        self.directions = directions
        self.calls: dict[int, Call] = {}
        self.lost = False
        """Whether a module was called twice whose first inputs are gone: to be recorded again."""
        self.roots: list[Tensor] = []
        """Leaves that a backward must reach when parameters are frozen."""
        self.structure: list[Hashable] = []
        """What was called, in order, and how the axes of what it returned compare with the batch's:
        calls of one structure count their rows for samples in one way."""
        self.gave_positions = False
        """Whether position ids of all samples were given to each, which a model might not take."""
        self.attribution: Attribution | None = None
        """Set, backwards are noted by it and compared, as it says."""
        self._number = count()
        self._handles: list[RemovableHandle] = []
        self._entered: dict[str, list[tuple[Given | None, list[nn.Parameter]]]] = {}
        self._shown: dict[str, list[nn.Parameter]] | None = None
        self._waiting: dict[int, list[Tensor | None]] = {}
        self._joined: dict[str, list[Factor]] = {}
        self._uses: Counter[str] = Counter()
        self._grams = InputGrams()
        self._norm_weights = NormWeights(plan.owners)
        self._condensed: set[str] = set()
        self._condensable: set[str] = set()
        """Modules whose parameters nobody else owns, as far as known called once."""
        if norms_alone:
            owners = Counter(k for own in plan.owners.values() for k in own.names.values())
            self._condensable = {
                where
                for where, own in plan.owners.items()
                if all(owners[name] == 1 for name in own.names.values())
                and own.module not in _CALLED_AGAIN
            }

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

    def roots_of(self, y: Tensor) -> list[Tensor]:
        """The leaves that a backward from `y` must reach to pass by every recorded call.

        Parameters are left out. Beside `roots` there may be others, such as embeddings that a hook
        lets ask for a gradient (`enable_input_require_grads`).

        Raises:
            InputError: there is none, and `y` depends on no trainable parameter.
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
        """Run the backward of a trial of rows, which the next backward is compared with.

        Args:
            losses: `(n_samples,)`, of which each depends on its own sample alone.
            sources: what a backward must reach.
        """
        trial = self.attribution = Attribution(self.plan.model, len(losses))
        torch.autograd.grad(trial.weighted(losses), sources, retain_graph=True, allow_unused=True)
        trial.noting = False
        return trial

    def to_be_shown(self) -> bool:
        """Whether it is still open that rows belong to the samples they are counted for.

        Positions are no samples, and are asked for where samples were shown.
        """
        axis = self.segments
        if axis is None or axis.n_samples == 1 or axis.per_token:
            return False
        shown = self.plan.shown
        return ANY not in shown and tuple(self.structure) not in shown

    def show_rows(self, losses: Tensor, sources: Sequence[Tensor]) -> None:
        """Show that rows belong to the samples they are counted for, once a structure of calls.

        It takes two backwards, from which nothing is handed over.

        Args:
            losses, sources: as `weigh` takes them.

        Raises:
            UnsupportedModelError: they do not; the module is named.
        """
        trial = self.weigh(losses, sources)
        trial.alone = True
        torch.autograd.grad(losses.sum(), sources, retain_graph=True, allow_unused=True)
        self.attribution = None
        trial.conclude()
        self.plan.shown.add(tuple(self.structure))

    @contextmanager
    def showing_parameters(self) -> Iterator[None]:
        """Inside, frozen parameters ask for a gradient but where a module that owns them runs.

        So a graph made here that reaches one has used it elsewhere, where no hook sees it: names in
        `plan.names_of(leaves_of(losses))` are for `plan.widen`.
        """
        self._shown = {
            where: [self.plan.parameters[name] for name in own.names.values()]
            for where, own in self.plan.owners.items()
        }
        owned = [p for own in self._shown.values() for p in own]
        try:
            for p in owned:
                p.requires_grad_(True)
            yield
        finally:
            self._shown = None
            for p in owned:
                p.requires_grad_(False)

    def running(self, where: str) -> bool:
        """Whether the module's forward has been entered and not yet left."""
        return bool(self._entered.get(where))

    def finish(self) -> None:
        """Hand over what waited for the end of the backward; call it after every backward."""
        waiting, self._waiting = self._waiting, {}
        for index, grads in waiting.items():
            call = self.calls[index]
            assert isinstance(call, GenericCall)
            for name, factor in call.gradients(grads):
                self._hand_over(name, factor, None)
        joined, self._joined = self._joined, {}
        for name, factors in joined.items():
            self.sink(name, factors, [None] * len(factors))

    def _before(
        self, where: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if REPLAYING.get() or not torch.is_grad_enabled():
            return None
        with torch._C.DisableTorchFunction():  # `OutsideUse` need not look at what hooks do
            if self.segments is not None:
                given_to_each = broadcast_ids(module, args, self.segments)
                self.gave_positions |= given_to_each is not args
                args = given_to_each
            # The generic rule runs the module again, its hooks included: it takes what came in.
            again = len(args) + len(kwargs) != 1 or self.plan.owners[where].rule is GenericCall
            given = Given.of(args, kwargs) if again else None
        hidden: list[nn.Parameter] = []
        if self._shown is not None:
            # Not where a module around this one has hidden it already.
            hidden = [p for p in self._shown[where] if p.requires_grad]
            for p in hidden:
                p.requires_grad_(False)
        self._entered.setdefault(where, []).append((given, hidden))
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
        entered, hidden = self._entered[where].pop()
        for p in hidden:
            p.requires_grad_(True)
        if entered is not None or not isinstance(output, Tensor):
            rule = GenericCall
        given = Given.of(args, kwargs) if entered is None else entered
        call = rule(where, module, names, given, own.factor, self.segments, self.plan.axes)
        index = next(self._number)
        self.calls[index] = call
        for name in names.values():
            self._uses[name] += 1
        call.keep(output, self._norm_weights)
        if where in self._condensable:
            self._condense(call, output)
        kept: dict[str, Tensor] = {}
        if self.directions is not None:
            # Rows that cannot be told apart matter only where a gradient arrives: DoRA runs its
            # layers on an identity matrix, and detaches what they return.
            with torch.no_grad(), suppress(UnsupportedModelError):
                kept = call.constants(self.directions)
        if isinstance(output, Tensor):  # most are, and pytrees take a while
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
                self.structure.append((where, rule, self.segments.likeness(y.shape[:-1])))
            arrived = partial(self._arrived, index, position, kept)
            self._handles.append(y.register_hook(arrived))
        return grafted

    def _condense(self, call: Call, output: Any) -> None:
        """Let a call keep what norms need alone, where it is its module's first one."""
        if call.where in self._condensed:
            _CALLED_AGAIN.add(call.module)
            self.lost = True
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
            # One output may be computed from another, or be an input handed on: a copy receives the
            # gradient of what happens outside the module alone. A view would not do, as its hooks
            # are lost when the model changes it in place.
            return y.clone() if rule is GenericCall or y._is_view() else y
        leaf = y.detach().requires_grad_()
        self.roots.append(leaf)
        return leaf.clone()  # not the leaf itself: the model may go on to change it in place

    @torch.no_grad()
    def _arrived(self, index: int, position: int, kept: dict[str, Tensor], g: Tensor) -> None:
        if index not in self.calls:
            raise UnsupportedModelError(
                "loss_fn: a second backward passes the model, such as one of its own inside; what "
                "belongs to the losses cannot be told apart"
            )
        call = self.calls[index]
        if self.attribution is not None:
            if self.attribution.noting:
                call.checked_segments()
                self.attribution.note((index, position), g)
                return
            rows = call.rows(call.checked_segments(), g)
            self.attribution.compare((index, position), call.where, g, rows)
            if self.attribution.alone:
                return
        if self.once and not isinstance(call, GenericCall):
            del self.calls[index]
        if isinstance(call, GenericCall):
            grads = self._waiting.setdefault(index, [])
            grads.extend([None] * (position + 1 - len(grads)))
            grads[position] = g
            return
        for name, factor in call.checked_factors(g):
            self._hand_over(name, factor, kept.get(name))

    def _hand_over(self, name: str, factor: Factor, kept: Tensor | None) -> None:
        if self.join and self._uses[name] > 1:
            self._joined.setdefault(name, []).append(factor)
        else:
            self.sink(name, [factor], [kept])


_SEVERAL = (list, tuple)


class OutsideUse(TorchFunctionMode):
    """Notices parameters that are used outside their modules' forwards, where no hook sees it.

    For where parameters ask for gradients of their own; `Recorder.showing_parameters` takes less
    time, and looks at every operation of a graph.

    Attributes:
        found: their names; `Plan.widen` takes them.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.found: dict[str, None] = {}
        self.owners: dict[int, list[str]] = {}
        for where, own in recorder.plan.owners.items():
            module, names = own.module, own.names
            for local in names:
                self.owners.setdefault(id(module.get_parameter(local)), []).append(where)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Every operation of the model comes by: no more than a look at each argument.
        for x in (*args, *kwargs.values()) if kwargs else args:
            if id(x) in self.owners:
                self._check(x, func, args, kwargs)
            elif isinstance(x, _SEVERAL):
                for y in x:
                    if id(y) in self.owners:
                        self._check(y, func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, p: nn.Parameter, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        owners = self.owners[id(p)]
        if REPLAYING.get() or not torch.is_grad_enabled():
            return
        if any(self.recorder.running(where) for where in owners):
            return
        # Asking for its shape or dtype, or for zeros like it, is no use of it.
        leaf = p.detach().requires_grad_()
        replaced = tree_map(lambda x: leaf if x is p else x, (args, kwargs))
        used = func(*replaced[0], **replaced[1])
        if any(y.requires_grad and y is not leaf for y in tensors_of(used)):
            name = next(k for k, q in self.recorder.plan.parameters.items() if q is p)
            self.found[name] = None


def leaves_of(y: Tensor) -> list[Tensor]:
    """Every leaf that `y` depends on: a backward to all of them passes by every recorded call.

    A recorder's own roots are among them, and whatever else asks for a gradient (soft prompts).

    Raises:
        InputError: a part of the graph is made during the backward only.
    """
    seen, todo, leaves = set(), [y.grad_fn] if y.grad_fn is not None else [], []
    while todo:
        node = todo.pop()
        if node in seen:  # reached twice before its turn
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind == "CheckpointFunctionBackward":
            raise InputError(
                "model: it calls torch.utils.checkpoint with use_reentrant=True, which gives no "
                "gradients of activations; call it with use_reentrant=False"
            )
        todo += [n for n, _ in node.next_functions if n is not None and n not in seen]
        if kind == "AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
    return leaves
