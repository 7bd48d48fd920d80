"""Update rules by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TypeVar

from geffect_fast.errors import InputError
from geffect_fast.objectives.parameters import kind_of
from geffect_fast.objectives.parse import Kind, parse_call
from geffect_fast.objectives.registry import nearest
from geffect_fast.updates.base import UpdateRule

C = TypeVar("C", bound=type[UpdateRule])

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_CLASSES: dict[str, type[UpdateRule]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator that makes an update rule usable by `name`, as `--update NAME`.

    The class gets `name` as its attribute and becomes a frozen dataclass if it is not one yet.

    Args:
        name: lower-case letters, digits and underscores, not yet taken.

    Raises:
        InputError: the name is unusable or taken, or the class is no update rule that defines
            `apply` with parameters annotated `float`, `int` or `bool`.

    Example:
        >>> @register("half")
        ... class Half(UpdateRule):
        ...     def apply(self, step):
        ...         step.write({name: g / 2 for name, g in step.forget().items()})
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"update name {name!r} must be a lower-case identifier")

    def add(cls: C) -> C:
        if not (isinstance(cls, type) and issubclass(cls, UpdateRule)):
            raise InputError(f"update {name!r}: {cls!r} must be a subclass of UpdateRule")
        taken = _CLASSES.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise InputError(f"update name {name!r} is taken by {taken.__qualname__}")
        if cls.apply is UpdateRule.apply:
            raise InputError(f"update {name!r}: {cls.__name__} must define apply()")
        if "__dataclass_params__" not in vars(cls):
            dataclasses.dataclass(frozen=True)(cls)
        for field in dataclasses.fields(cls):
            if kind_of(field) is None:
                raise InputError(
                    f"update {name!r}: parameter {field.name!r} must be annotated float, int or "
                    f"bool, not {field.type!r}"
                )
        cls.name = name
        _CLASSES[name] = cls
        return cls

    return add


def available() -> tuple[str, ...]:
    """Names of all registered update rules, in alphabetical order."""
    return tuple(sorted(_CLASSES))


def _lookup(name: str) -> type[UpdateRule]:
    found = _CLASSES.get(name.lower())
    if found is None:
        shown = name if len(name) <= 40 else f"{name[:37]}..."
        raise InputError(f"unknown update {shown!r}; {nearest(name.lower(), available())}")
    return found


_KIND = Kind("update", "an UpdateRule", "orthograd", _lookup)


def parse(text: str | UpdateRule) -> UpdateRule:
    """The update rule that a string describes, `orthograd(rank_tol=1e-6)`, or that is given.

    Raises:
        InputError: one line with what is wrong, the character where, and the text around it.
    """
    if isinstance(text, UpdateRule):
        return text
    rule: UpdateRule = parse_call(text, _KIND)
    return rule
