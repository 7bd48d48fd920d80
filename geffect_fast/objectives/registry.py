"""Objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Composite, Objective, Sum
from geffect_fast.objectives.parameters import make_frozen
from geffect_fast.registry import Registry

C = TypeVar("C", bound=type[Objective])


def _check(name: str, cls: type[Objective]) -> None:
    composite = issubclass(cls, Composite)
    base: type[Objective] = Composite if composite else Objective
    for method in ["terms"] if composite else ["loss", "token_terms"]:
        if getattr(cls, method) is getattr(base, method):
            raise InputError(f"objective {name!r}: {cls.__name__} must define {method}()")
    make_frozen(f"objective {name!r}", cls)


OBJECTIVES: Registry[Objective] = Registry(
    Objective, "objective", _check, reserved={"true", "false", Sum.name}
)


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
    return OBJECTIVES.register(name)


def available() -> tuple[str, ...]:
    """Names of all registered objectives, in alphabetical order."""
    return OBJECTIVES.available()
