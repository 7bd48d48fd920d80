"""Update rules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from geffect_fast.errors import InputError
from geffect_fast.objectives.parameters import make_frozen
from geffect_fast.objectives.parse import Kind, parse_call
from geffect_fast.registry import Registry
from geffect_fast.updates.base import UpdateRule

C = TypeVar("C", bound=type[UpdateRule])


def _check(name: str, cls: type[UpdateRule]) -> None:
    if cls.apply is UpdateRule.apply:
        raise InputError(f"update {name!r}: {cls.__name__} must define apply()")
    make_frozen(f"update {name!r}", cls)


UPDATE_RULES: Registry[UpdateRule] = Registry(UpdateRule, "update", _check)


def register(name: str) -> Callable[[C], C]:
    """Class decorator that makes an update rule usable by `name`, as `--update NAME`.

    The class gets `name` as its attribute and becomes a frozen dataclass if it is not one yet.

    Args:
        name: lower-case letters, digits and underscores, not yet taken.

    Raises:
        InputError: the name is unusable or taken, or the class is no update rule that defines
            `apply` with parameters annotated `float`, `int` or `bool`.

    Examples:
        >>> @register("half")
        ... class Half(UpdateRule):
        ...     def apply(self, step):
        ...         step.write({name: g / 2 for name, g in step.forget().items()})
    """
    return UPDATE_RULES.register(name)


def available() -> tuple[str, ...]:
    """Names of all registered update rules, in alphabetical order."""
    return UPDATE_RULES.available()


_KIND = Kind(UpdateRule, "orthograd", UPDATE_RULES.lookup)


def parse(text: str | UpdateRule) -> UpdateRule:
    """The update rule that a string such as `orthograd(rank_tol=1e-6)` describes, or a given rule.

    Raises:
        InputError: in one line, the problem, the character where it is, and the text around.
    """
    if isinstance(text, UpdateRule):
        return text
    rule: UpdateRule = parse_call(text, _KIND)
    return rule
