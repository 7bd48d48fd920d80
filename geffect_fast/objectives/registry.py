"""Objectives by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import TypeVar

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Composite, Objective, Sum
from geffect_fast.objectives.parameters import kind_of

C = TypeVar("C", bound=type[Objective])

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_RESERVED = {"true", "false", Sum.name}
_CLASSES: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator that makes an objective usable by `name` in objective strings.

    The class gets `name` as its attribute and becomes a frozen dataclass if it is not one yet.
    Running the definition of the same class again replaces it, as a notebook needs.

    Args:
        name: lower-case letters, digits and underscores, not yet taken.

    Raises:
        InputError: the name is unusable or taken, or the class is not an objective that defines
            `loss` and `token_terms` (or `terms`, for a `Composite`) with parameters annotated
            `float`, `int` or `bool`.

    Example:
        >>> @register("mine")
        ... @dataclass(frozen=True)
        ... class Mine(Objective): ...
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise InputError(
            f"objective name {name!r} must be a lower-case identifier other than "
            + ", ".join(sorted(_RESERVED))
        )

    def add(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise InputError(f"objective {name!r}: {cls!r} must be a subclass of Objective")
        taken = _CLASSES.get(name)
        if taken is not None and _origin(taken) != _origin(cls):
            raise InputError(f"objective name {name!r} is taken by {'.'.join(_origin(taken))}")
        composite = issubclass(cls, Composite)
        base: type[Objective] = Composite if composite else Objective
        for method in ["terms"] if composite else ["loss", "token_terms"]:
            if getattr(cls, method) is getattr(base, method):
                raise InputError(f"objective {name!r}: {cls.__name__} must define {method}()")
        if "__dataclass_params__" not in vars(cls):
            dataclasses.dataclass(frozen=True)(cls)
        for field in dataclasses.fields(cls):
            if kind_of(field) is None:
                raise InputError(
                    f"objective {name!r}: parameter {field.name!r} must be annotated float, int or "
                    f"bool, not {field.type!r}"
                )
        cls.name = name
        _CLASSES[name] = cls
        return cls

    return add


def available() -> tuple[str, ...]:
    """Names of all registered objectives, in alphabetical order."""
    return tuple(sorted(_CLASSES))


def lookup(name: str) -> type[Objective]:
    """The class registered under `name`, upper or lower case.

    Raises:
        InputError: there is none; the nearest name is offered.
    """
    found = _CLASSES.get(name.lower())
    if found is None:
        shown = name if len(name) <= 40 else f"{name[:37]}..."
        raise InputError(f"unknown objective {shown!r}; {nearest(name.lower(), available())}")
    return found


def nearest(name: str, candidates: tuple[str, ...]) -> str:
    """Advice for a misspelt `name`: the closest candidate, or all of them."""
    close = difflib.get_close_matches(name, candidates, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(candidates)}" if candidates else "there are none"


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
