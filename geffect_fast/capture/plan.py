"""The plan of a capture: the module that owns each trainable parameter, and the module's rule."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import (
    check_adapters,
    check_is_model,
    is_sharded,
    mixing_module,
    own_part,
    plain_name,
    unwrapped,
)
from geffect_fast.capture.generic_rule import GenericCall
from geffect_fast.capture.keys import Learned
from geffect_fast.capture.layer_rules import Call, NormCall, qualified
from geffect_fast.capture.probing import likeness
from geffect_fast.capture.shards import Shards
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.ranks import here


@dataclass(frozen=True)
class Owner:
    """A module that owns trainable parameters, with the rule for their shares.

    Attributes:
        module: the module.
        names: names of its trainable parameters in the model, by the module's own name for each.
        rule: the rule, which is the class of its calls.
        fitted: the number that the rule found out, such as the `1` in `1 + w` of a norm.
    """

    module: nn.Module
    names: dict[str, str]
    rule: type[Call]
    fitted: float


@dataclass(frozen=True)
class Coverage:
    """Counts of a model's parameters, each counted once however often it is used.

    Attributes:
        covered_parameters, covered_elements: trainable parameters that a result covers.
        trainable_parameters, trainable_elements: all parameters that ask for a gradient.
        frozen_parameters, frozen_elements: parameters that ask for none, and are left out.
        tied: all names of every parameter that has several, its first name first.
    """

    covered_parameters: int
    covered_elements: int
    trainable_parameters: int
    trainable_elements: int
    frozen_parameters: int
    frozen_elements: int
    tied: tuple[tuple[str, ...], ...]

    def attributes(self) -> dict[str, int | str]:
        """The counts as attributes of a result."""
        return vars(self) | {"tied": json.dumps(self.tied)}


_LEARNED: WeakKeyDictionary[nn.Module, Learned] = WeakKeyDictionary()


@dataclass(frozen=True)
class Plan:
    """The modules that own a model's trainable parameters, and the rule that is exact for each.

    A plan is made once for a model. A `Recorder` is made from it for each batch.

    Attributes:
        model: the model.
        parameters: its trainable parameters by name (a tied one once, under its first name).
        owners: the owners, by the module's name.
            A parameter that a module without a forward holds (a `ParameterDict`, a parametrisation)
            belongs to the module around that one, whose local name for the parameter has dots.
        learned: facts that recordings of the model have found out, from any plan of the model.
        axes: axes of the tokens in modules' outputs, learned from batches, see `Segments.rows`.
        widened: the names that each call of `widen` was given, in order.
        shown: structures of calls whose rows were shown to belong to their samples, or `ANY`, see
            `Recorder.show_rows`.
        shards: the shards of a model whose parameters are shared out among ranks; `parameters` are
            the whole ones then. None: the model holds its parameters itself.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    owners: dict[str, Owner]
    learned: Learned = field(default_factory=Learned)
    axes: dict[tuple[str, int], int] = field(default_factory=dict)
    shown: set[Hashable] = field(default_factory=set)
    widened: list[tuple[str, ...]] = field(default_factory=list)
    shards: Shards | None = None

    @classmethod
    def of(cls, model: nn.Module, *, may_be_sharded: bool = False) -> Plan:
        """Make the plan of a model, by one look at every module.

        Args:
            model: the model.
            may_be_sharded: whether the caller supports parameters that FSDP2 shares out.

        Raises:
            InputError: `model` is no model or has no trainable parameter, or a module in train mode
                drops activations or mixes the samples of a batch.
            UnsupportedModelError: the model is wrapped for several devices, or in an adapter whose
                modules cannot be run again one by one.
        """
        check_is_model(model)
        model = unwrapped(model)
        check_adapters(model)
        shards = None
        if is_sharded(model):
            if not may_be_sharded:
                raise UnsupportedModelError(
                    "model: FSDP shares out its parameters; profiles, trainings and evaluations "
                    "support this, this function does not: give it the whole model"
                )
            shards = Shards(model, here())
        why = mixing_module(model)
        if why is not None:
            raise InputError(f"model: {why}")
        parameters = {plain_name(k): p for k, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise InputError("model: every parameter is frozen; set requires_grad on some of them")
        names = {id(p): name for name, p in parameters.items()}
        local: dict[str, dict[str, str]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        paths: dict[nn.Module, list[str]] = {}
        for where, module in modules.items():
            paths.setdefault(module, []).append(where)
        for module, places in paths.items():
            own = {k: p for k, p in module._parameters.items() if p is not None}
            trainable = {k: names[id(p)] for k, p in own.items() if id(p) in names}
            for where, path in _users(modules, places).items() if trainable else ():
                inside = {f"{path}{k}": name for k, name in trainable.items()}
                local.setdefault(where, {}).update(inside)
        if shards is not None:
            parameters = {name: shards.whole(p) for name, p in parameters.items()}
        owners = {}
        tried: dict[Hashable, tuple[type[Call], float]] = {}
        for where, of in local.items():
            module = modules[where]
            nested = any("." in k for k in of)
            groups = []
            if shards is not None and likeness(module) not in tried:
                # `rule_for` tries the module with its weights, which must be whole.
                groups = shards.groups_of([parameters[k] for k in of.values()])
            with nullcontext() if shards is None else shards.unsharded(groups):
                rule, fitted = (GenericCall, 1.0) if nested else rule_for(module, tried)
            owners[where] = Owner(module, of, rule, fitted)
        learned = _LEARNED.setdefault(model, Learned())
        return cls(model, parameters, owners, learned, shards=shards)

    @property
    def held(self) -> dict[str, Tensor]:
        """This rank's part of each trainable parameter; all of it where nothing is shared out."""
        if self.shards is None:
            return dict(self.parameters)
        return {name: own_part(p) for name, p in self.at_rest.items()}

    @property
    def at_rest(self) -> dict[str, nn.Parameter]:
        """The trainable parameters as the model holds them outside of forwards and backwards."""
        if self.shards is None:
            return dict(self.parameters)
        return {name: self.shards.own(p) for name, p in self.parameters.items()}

    @property
    def device(self) -> torch.device:
        """The device of the first trainable parameter."""
        return next(iter(self.parameters.values())).device

    def coverage(self, uncovered: Collection[str] = ()) -> Coverage:
        """Count the model's parameters; `uncovered` are trainable ones that were missed."""
        covered = [p.numel() for name, p in self.parameters.items() if name not in uncovered]
        trainable = {id(p): p.numel() for p in self.at_rest.values()}
        frozen = [p.numel() for p in self.model.parameters() if id(p) not in trainable]
        names: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        return Coverage(
            covered_parameters=len(covered),
            covered_elements=sum(covered),
            trainable_parameters=len(trainable),
            trainable_elements=sum(trainable.values()),
            frozen_parameters=len(frozen),
            frozen_elements=sum(frozen),
            tied=tuple(tuple(several) for several in names.values() if len(several) > 1),
        )

    def norms(self) -> dict[str, tuple[Tensor, float]]:
        """Weight and offset of every norm on a CPU, by the module's name."""
        rules = {where: own for where, own in self.owners.items() if issubclass(own.rule, NormCall)}
        weights = {where: own.module.get_parameter("weight") for where, own in rules.items()}
        at_hand = self.shards is None
        return {
            w: (p.detach(), rules[w].fitted) for w, p in weights.items() if p.is_cpu and at_hand
        }

    def product_shares(self, columns: Sequence[int]) -> list[float]:
        """Each column's share of a forward pass's products, by elements that multiply a token.

        Args:
            columns: the column of each trainable parameter.
        """
        multiplied = {
            name
            for own in self.owners.values()
            if not isinstance(own.module, nn.Embedding)
            for name in own.names.values()
        }
        elements = [0.0] * (max(columns) + 1)
        for (name, p), column in zip(self.parameters.items(), columns, strict=True):
            if p.dim() > 1 and name in multiplied:
                elements[column] += p.numel()
        whole = max(sum(elements), 1.0)
        return [each / whole for each in elements]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter asks for a gradient inside: a backward forms activation gradients only."""
        try:
            self.ask(self.parameters.values(), False)
            yield
        finally:
            self.ask(self.parameters.values(), True)

    def ask(self, parameters: Iterable[nn.Parameter], asks: bool) -> None:
        """Set whether `parameters` ask for gradients."""
        for p in parameters:
            p.requires_grad_(asks)
            if self.shards is not None:  # a whole one follows its part each time it is gathered
                self.shards.own(p).requires_grad_(asks)

    def on_any_rank(self, is_so: bool) -> bool:
        """Whether `is_so` holds here or, if ranks share out the model, on any of them.

        All ranks run a forward or backward of such a model, or none does.
        """
        return is_so if self.shards is None else any(self.shards.ranks.meet(is_so))

    def summing(self) -> AbstractContextManager[None]:
        """Inside, `sharded_gradients` by parameters are sums over ranks."""
        return nullcontext() if self.shards is None else self.shards.sums()

    def sharded_gradients(
        self, loss: Tensor, sources: Sequence[Tensor], *, more: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of a loss by its sources, where parameters are shared out.

        Gradients by parameters are this rank's parts of the sum over all ranks' losses, and are
        taken inside `summing`. Whole gradients would need the memory of all parameters at once.

        Args:
            loss: a scalar.
            sources: leaves; the last of them may be all parameters, in their order.
            more: whether another backward follows through the same graph.

        Returns:
            The gradient of each source. None for sources that the loss does not depend on, such as
            those above a layer that it reads, and for the leaves before all parameters.
        """
        assert self.shards is not None
        n, parameters = len(self.parameters), list(self.parameters.values())
        if [*map(id, sources[-n:])] != [*map(id, parameters)]:
            if not loss.requires_grad:
                return [None] * len(sources)
            return torch.autograd.grad(loss, sources, retain_graph=more, allow_unused=True)
        own = self.shards.sum_of_gradients(loss, parameters, more=more)
        return [*[None] * (len(sources) - n), *own]

    def sources(self) -> list[Tensor]:
        """Parameters such that a backward to them passes by every module that is watched.

        If parameters are shared out, these are the tables of embeddings, where there are any,
        because the gradient by every whole parameter takes memory.
        """
        parameters: list[Tensor] = list(self.parameters.values())
        tables: list[Tensor] = [
            self.parameters[name]
            for own in self.owners.values()
            if isinstance(own.module, nn.Embedding)
            for name in own.names.values()
        ]
        return tables if tables and self.shards is not None else parameters

    @contextmanager
    def generic_at_hand(self) -> Iterator[None]:
        """Inside, modules of the generic rule, which runs them again, have whole parameters.

        All ranks enter and leave the block together.
        """
        if self.shards is None:
            yield
            return
        own = [
            self.parameters[name]
            for owner in self.owners.values()
            if owner.rule is GenericCall
            for name in owner.names.values()
        ]
        with self.shards.unsharded(self.shards.groups_of(own)):
            yield

    def names_of(self, tensors: Iterable[Tensor]) -> list[str]:
        """The names of the trainable parameters among `tensors`."""
        found = {id(x) for x in tensors}
        return [name for name, p in self.parameters.items() if id(p) in found]

    def widen(self, names: Iterable[str]) -> None:
        """Give each parameter, used outside the modules that own it, to the module around them.

        A module may use a parameter of its children in its own forward (`nn.MultiheadAttention` the
        weight of its `out_proj`, a model the table of its embedding), and the generic rule runs
        that forward again. In the worst case this is the whole model, once for each sample.

        Raises:
            UnsupportedModelError: the owner is the model itself already.
        """
        modules, names = dict(self.model.named_modules(remove_duplicate=False)), tuple(names)
        self.widened.extend([names] if names else [])
        for name in names:
            held = [
                (where, local)
                for where, own in self.owners.items()
                for local, known in own.names.items()
                if known == name
            ]
            around = _around(modules, {where for where, _ in held})
            if around is None:
                raise UnsupportedModelError(
                    f"parameter '{name}' is used outside the model's own forward, so its share "
                    "cannot be told apart by sample; freeze it"
                )
            of = dict(self.owners[around].names) if around in self.owners else {}
            for where, local in held:
                of[_below(around, f"{where}.{local}" if where else local)] = name
                del self.owners[where].names[local]
                if not self.owners[where].names:
                    del self.owners[where]
            self.owners[around] = Owner(modules[around], of, GenericCall, 1.0)


def _users(modules: Mapping[str, nn.Module], places: Sequence[str]) -> dict[str, str]:
    """The modules whose forwards use one module's parameters, and the path from each down to it.

    The user is the module itself, unless it is never called: a module without a forward
    (`ParameterDict`), or a part of a parametrisation, which runs wherever the weight is read.

    Args:
        modules: all modules of the model, by all of their names.
        places: all names of the module in the model.

    Returns:
        By the name of each user, the prefix (`""`, `lora_A.`) of its names for the parameters. If a
        module and another one inside it share the same holder, only the outer one is a user.
    """
    found: dict[str, str] = {}
    for where in places:
        user = where
        if _PARAMETRIZATIONS in f".{where}.":
            user = f".{where}.".split(_PARAMETRIZATIONS)[0].removeprefix(".")
        user = _called(modules, user)
        found[user] = f"{_below(user, where)}." if where != user else ""
    if "" in found.values():
        return {places[0]: ""}  # hooks see it wherever it is called from
    outer = {a for a in found if not any(a != b and _inside(a, b) for b in found)}
    once = {modules[where]: where for where in reversed(found) if where in outer}
    return {where: found[where] for where in once.values()}


_PARAMETRIZATIONS = ".parametrizations."


def _around(modules: Mapping[str, nn.Module], places: Collection[str]) -> str | None:
    """The innermost module with a forward around all of `places`; None around the model itself."""
    if len(places) > 1:
        parts = [where.split(".") for where in places]
        same = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
        return _called(modules, ".".join(level[0] for level in same))
    (where,) = places
    return _called(modules, where.rpartition(".")[0]) if where else None


def _called(modules: Mapping[str, nn.Module], where: str) -> str:
    """The module at `where`, or the innermost one around it, that has a forward."""
    while where:
        module = modules[where]
        if type(module).forward is not nn.Module.forward or "forward" in vars(module):
            break
        where = where.rpartition(".")[0]
    return where


def _below(outer: str, inner: str) -> str:
    """The name `inner` as seen from the module `outer`."""
    return inner.removeprefix(f"{outer}.") if outer else inner


def _inside(inner: str, outer: str) -> bool:
    return not outer or inner.startswith(f"{outer}.")


def rule_for(
    module: nn.Module, tried: dict[Hashable, tuple[type[Call], float]]
) -> tuple[type[Call], float]:
    """The rule that is exact for `module`, and the number that the rule found out.

    The rule is that of the module's type, that of norms, or the generic one.

    Args:
        module: a module that owns trainable parameters.
        tried: rules and numbers of modules tried before, by `likeness`; this module's is added.
    """
    like = likeness(module)
    if like is not None and like in tried:
        return tried[like]
    found: tuple[type[Call], float] = (GenericCall, 1.0)
    # Only the generic rule is exact where `forward` was replaced on the object, or where parameters
    # of other names make the weight.
    if "forward" not in vars(module) and module._parameters.keys() <= {"weight", "bias"}:
        kinds = (qualified(base) for base in type(module).__mro__)
        rules: list[type[Call]] = [Call.rules[kind] for kind in kinds if kind in Call.rules]
        rules.append(NormCall)
        fits = ((rule, rule.fit(module)) for rule in rules)
        found = next(((rule, f) for rule, f in fits if f is not None), found)
    if like is not None:
        tried[like] = found
    return found
