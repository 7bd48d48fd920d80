"""Classes by the names under which users ask for them, and advice on names and on lists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Generic, TypeVar

from geffect_fast.errors import InputError

T = TypeVar("T")
C = TypeVar("C")
Item = TypeVar("Item")

_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_SHOWN = 40
"""Most characters of an unknown name in a message."""


class Registry(Generic[T]):
    """Subclasses of one base, each by a name of its own.

    Args:
        base: the base class.
        noun: the word for such a class in messages.
        check: takes a name and its class; raises `InputError` where the class is of no use.
        unknown: the beginning of a message on an unknown name; None: `unknown NOUN`.
        reserved: names that cannot be registered.
    """

    def __init__(
        self,
        base: type,
        noun: str,
        check: Callable[[str, type[T]], None],
        *,
        unknown: str | None = None,
        reserved: Collection[str] = (),
    ) -> None:
        self.base = base
        self.noun = noun
        self.classes: dict[str, type[T]] = {}
        self._check = check
        self._unknown = unknown or f"unknown {noun}"
        self._reserved = reserved

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that adds a class, and gives it `name` as its attribute.

        Running the definition of the same class again replaces it, as a notebook needs.

        Raises:
            InputError: the name is unusable or taken, or the class is of no use.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in self._reserved:
            others = f" other than {', '.join(sorted(self._reserved))}" if self._reserved else ""
            raise InputError(f"{self.noun} name {name!r} must be a lower-case identifier{others}")

        def add(cls: Any) -> Any:
            usable = isinstance(cls, type) and issubclass(cls, self.base)
            if not usable:
                raise InputError(
                    f"{self.noun} {name!r}: {cls!r} must be a subclass of {self.base.__name__}"
                )
            taken = self.classes.get(name)
            if taken is not None and _origin(taken) != _origin(cls):
                raise InputError(
                    f"{self.noun} name {name!r} is taken by {'.'.join(_origin(taken))}"
                )
            self._check(name, cls)
            cls.name = name
            self.classes[name] = cls
            return cls

        return add

    def available(self) -> tuple[str, ...]:
        """All names, in alphabetical order."""
        return tuple(sorted(self.classes))

    def lookup(self, name: str) -> type[T]:
        """The class registered under `name`, upper or lower case.

        Raises:
            InputError: there is no such class; the nearest name is offered.
        """
        found = self.classes.get(name.lower())
        if found is None:
            shown = name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}..."
            advice = nearest(name.lower(), self.available())
            raise InputError(f"{self._unknown} {shown!r}; {advice}")
        return found


def nearest(name: str, candidates: Sequence[str], otherwise: str | None = None) -> str:
    """Advice for a misspelt `name`: the closest candidate, else `otherwise` or all of them."""
    close = difflib.get_close_matches(name, candidates, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    if otherwise is not None:
        return otherwise
    return f"known: {', '.join(candidates)}" if candidates else "there are none"


def each_once(field: str, values: Iterable[Item]) -> tuple[Item, ...]:
    """The values of a field; raises `InputError` where one of them is listed twice."""
    listed = tuple(values)
    for i, value in enumerate(listed):
        if value in listed[:i]:
            raise InputError(f"{field}: '{value}' is listed twice; leave one out")
    return listed


def _origin(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
