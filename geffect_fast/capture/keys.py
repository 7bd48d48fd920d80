"""Keys of functions and models, which tell apart all that may change what they compute.

Facts that recordings find out about a model are remembered by them (`Learned`).
"""

from __future__ import annotations

import dis
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from hashlib import sha256
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from geffect_fast.capture.attribution import ANY
from geffect_fast.capture.layer_rules import Call

_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device)
_PLAIN_TYPES = frozenset(_PLAIN)

_MOST_KEYS = 16
"""Keys that a model remembers, the last ones: a loss function that is new at each step has new
ones."""


def function_key(function: Callable[..., Any]) -> Hashable:
    """A key that is equal for functions that compute the same of the same data.

    A function that is made anew with the same code has the same key. The key holds the function's
    code and, each in the way of its kind, the values in its closure, its defaults, the arguments
    that a partial binds, the object of a bound method, and the functions and plain values among the
    globals that the code reads. Globals of other modules are left out.

    - Plain values, and tuples, lists, sets and dicts of values, count by value.
    - Functions, partials and bound methods count as the function itself does.
    - Tensors and arrays are data, and count by their type alone.
    - Any other object counts by identity, as long as it exists. What is changed inside such an
      object does not change the key. An object without weak references makes a key that equals no
      other.

    The key keeps none of these values and objects alive.
    """
    values, held = sha256(), []
    for piece in _Pieces().of(function):
        if isinstance(piece, str):
            values.update(piece.encode() + b"\0")
        else:
            held.append(piece)
    return values.digest(), *held


class _Living:
    """An object, held by a weak reference; equal to the same object as long as it exists."""

    def __init__(self, x: object) -> None:
        self._x, self._hash = ref(x), id(x)

    def __eq__(self, other: object) -> bool:
        x = self._x()
        return x is not None and isinstance(other, _Living) and x is other._x()

    def __hash__(self) -> int:
        return self._hash


class _Pieces:
    """One walk through a function: texts of what counts by value, and the codes and objects."""

    def __init__(self) -> None:
        self._home: dict[str, Any] | None = None
        self._seen: dict[int, tuple[int, object]] = {}

    def of(self, x: Any) -> Iterator[Hashable]:
        kind = type(x)
        if kind is int:
            yield f"int {x:x}"  # the decimal digits of a long one are refused
        elif kind in _PLAIN_TYPES:
            yield f"{kind.__name__} {x!r}"
        elif isinstance(x, np.number | np.bool_):
            yield f"number {x.dtype.str} {x.tobytes().hex()}"
        elif isinstance(x, Tensor | np.ndarray):
            yield "data"
            yield from self._identity(kind)
        elif id(x) in self._seen:
            yield f"again {self._seen[id(x)][0]}"
        else:
            self._seen[id(x)] = len(self._seen), x
            yield from self._inside(x)

    def _inside(self, x: Any) -> Iterator[Hashable]:
        if isinstance(x, Enum):
            yield f"enum {x.name!r}"
            yield from self._identity(type(x))
            yield from self.of(x.value)
        elif isinstance(x, tuple | list | set | frozenset | dict | UserDict):
            yield f"{len(x)} values"
            yield from self._identity(type(x))
            for each in x:
                yield from self.of(each)
                if isinstance(x, dict | UserDict):
                    yield from self.of(x[each])
        elif isinstance(x, partial):
            yield "partial"
            yield from (piece for each in (x.func, x.args, x.keywords) for piece in self.of(each))
        elif isinstance(x, MethodType):
            yield "method"
            yield from (piece for each in (x.__func__, x.__self__) for piece in self.of(each))
        elif isinstance(x, FunctionType):
            yield "function"
            yield x.__code__
            yield from self._read_by(x)
        else:
            yield from self._identity(x)

    def _read_by(self, function: FunctionType) -> Iterator[Hashable]:
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                yield "an empty cell"
            else:
                yield from self.of(value)
        yield from self.of(function.__defaults__)
        yield from self.of(function.__kwdefaults__)
        if self._home is None:
            self._home = function.__globals__
        if function.__globals__ is self._home:
            for name in _globals_of(function.__code__):
                value = self._home.get(name)
                if isinstance(value, FunctionType) or type(value) in _PLAIN_TYPES:
                    yield f"global {name}"
                    yield from self.of(value)

    @staticmethod
    def _identity(x: object) -> Iterator[Hashable]:
        yield "object"
        try:
            yield _Living(x)
        except TypeError:
            yield object()  # equals no other


@lru_cache(maxsize=256)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """The names of globals that code reads, also inside functions that it makes."""
    own = (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    inner = (_globals_of(each) for each in code.co_consts if isinstance(each, CodeType))
    return tuple(dict.fromkeys([*own, *(name for names in inner for name in names)]))


def model_key(model: nn.Module) -> Hashable:
    """A key that is equal as long as a model computes the same with the same tensors.

    The key holds the modules with their modes, hooks and settings (active adapters are some), the
    forwards of their classes, and the configs (which attention runs).
    """
    modules, kinds = [], {}
    for module in model.modules():
        own, kind = vars(module), type(module)
        if kind not in kinds:
            kinds[kind] = _Living(kind), _Living(kind.forward)
        modules.append(
            (
                kinds[kind],
                *(tuple(own[hooks]) for hooks in _HOOKS),
                # Plain ones are told apart here: this runs for each batch of a loss function.
                *(
                    (k, type(v), v) if type(v) in _PLAIN_TYPES else (k, _setting(v))
                    for k, v in own.items()
                    if k not in _LEFT_OUT
                ),
            )
        )
    every = nn.modules.module
    anywhere = (*every._global_forward_hooks, *every._global_forward_pre_hooks)
    return tuple(modules), anywhere, settings_of(model)


def settings_of(model: nn.Module) -> Hashable:
    """The settings in the configs of a model, in a form that can be compared."""
    found = (vars(module).get("config") for module in model.modules())
    configs = {id(config): config for config in found if config is not None}
    return tuple(_setting(vars(config)) for config in configs.values())


_LEFT_OUT = vars(nn.Module()).keys() - {"training"} | {"config"}
"""Attributes of modules that are no settings, and the configs, which count once for all modules."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _setting(x: Any) -> Hashable:
    """A setting in a form that can be compared. Any other object than a function is its type."""
    if isinstance(x, _PLAIN):
        return type(x), x
    if isinstance(x, dict):
        return tuple(
            (str(k), _setting(v)) for k, v in sorted(x.items(), key=lambda item: str(item[0]))
        )
    if isinstance(x, list | tuple | set):
        return tuple(map(_setting, sorted(x, key=str) if isinstance(x, set) else x))
    return function_key(x) if callable(x) else repr(type(x))


@dataclass
class Learned:
    """Facts about a model that recordings have found out, kept for as long as the model exists.

    Attributes:
        called_again: names of modules that a forward calls more than once.
        served: the rules of the calls that each parameter took part in, by its name.
    """

    called_again: set[str] = field(default_factory=set)
    served: dict[str, dict[type[Call], None]] = field(default_factory=dict)
    _shown: dict[Hashable, set[Hashable]] = field(default_factory=dict)

    def is_shown(self, key: Hashable, structure: Hashable) -> bool:
        """Whether rows were shown to belong to their samples.

        Args:
            key: the key of the loss function and of the model, see `function_key`, `model_key`.
            structure: the structure of calls, see `Recorder.structure`.
        """
        return not self._shown.get(key, set()).isdisjoint((structure, ANY))

    def note_shown(self, key: Hashable, structure: Hashable) -> None:
        """Note that rows were shown to belong to their samples; `structure` may be `ANY`."""
        self._shown[key] = self._shown.pop(key, set()) | {structure}
        while len(self._shown) > _MOST_KEYS:
            del self._shown[next(iter(self._shown))]
