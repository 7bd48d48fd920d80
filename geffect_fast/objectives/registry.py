"""The registry of objectives by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import NamedTuple, TypeVar

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import REFERENCE_NEEDS, Composite, Objective, Sum
from geffect_fast.objectives.parameters import make_frozen, written
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

    Examples:
        >>> @register("mine")
        ... @dataclass(frozen=True)
        ... class Mine(Objective): ...
    """
    return OBJECTIVES.register(name)


def available() -> tuple[str, ...]:
    """Names of all registered objectives, in alphabetical order."""
    return OBJECTIVES.available()


REQUIRED = "..."
"""The text in place of the value of a required parameter."""


class Described(NamedTuple):
    """The description of an objective, for users who choose one.

    Attributes:
        text: its string with the default of every parameter, or `REQUIRED`.
        about: the first paragraph of its docstring.
        sets: the data sets it reads, forget or retain or both.
        needs: the inputs to give beside the rows: a reference, refusals, weights.
    """

    text: str
    about: str
    sets: list[str]
    needs: list[str]


def described_objectives() -> list[Described]:
    """Descriptions of all registered objectives, in alphabetical order."""
    found = []
    for name in available():
        kind = OBJECTIVES.lookup(name)
        values = {
            field.name: REQUIRED if field.default in (MISSING, None) else written(field.default)
            for field in fields(kind)
        }
        made = kind(**{key: 1 for key, value in values.items() if value == REQUIRED})
        parts = [part for _, part in made.parts()]
        needs = {need for part in parts for need in part.needs}
        needed = {
            "a reference": bool(needs & REFERENCE_NEEDS),
            "refusals": any("alternative" in part.roles for part in parts),
            "weights": "weights" in needs,
        }
        given = ", ".join(f"{key}={value}" for key, value in values.items())
        found.append(
            Described(
                f"{name}({given})" if given else name,
                " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()),
                [on for on in ("forget", "retain") if any(part.on == on for part in parts)],
                [need for need, wanted in needed.items() if wanted],
            )
        )
    return found
