"""Types and checks of the fields of settings: paths, names, days, objectives, and options.

The modules that read a value are imported when the value is read, so that options and their help
do not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from geffect_fast.data.chat_template import checked_date
from geffect_fast.errors import InputError
from geffect_fast.paths import is_there, user_path
from geffect_fast.registry import each_once

if TYPE_CHECKING:
    from geffect_fast.objectives import Objective
    from geffect_fast.updates import UpdateRule

Read = TypeVar("Read")


def settled(source: str) -> str:
    """An existing path made absolute, so that a replay finds it from anywhere; else unchanged."""
    if not source:
        raise ValueError("must not be empty; give a path or a hub id")
    path = user_path(source)
    try:
        return str(path.absolute()) if is_there(path) else source
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{reason}; give a path or a hub id") from None


def read_by(field: str, read: Callable[[Any], Read]) -> Callable[[Any], Read]:
    """`read` as a validator of a field: its `InputError` becomes a `ValueError` of the field.

    The error's leading `field: ` is dropped, since pydantic names the field itself.
    """

    def checked(value: Any) -> Read:
        try:
            return read(value)
        except InputError as error:
            raise ValueError(str(error).removeprefix(f"{field}: ")) from None

    return checked


def day(date: str) -> str:
    """The day itself, checked."""
    checked_date(date)
    return date


def blocks_by_name(groups: Any) -> Any:
    """Blocks by the name of their group; empty for None."""
    if not isinstance(groups, Mapping | None):
        raise InputError(f"got {groups!r}; give blocks by name, such as {{'first': '0-3'}}")
    return groups or {}


def axes(resolve: Any) -> tuple[str, ...]:
    """The axes of a result, checked."""
    from geffect_fast.results.axes import checked_axes

    return checked_axes(resolve)


def canonical(objective: str) -> str:
    """An objective's string as results write it."""
    from geffect_fast.objectives import parse

    return str(parse(objective))


def canonical_update(rule: str | UpdateRule) -> str:
    """An update rule's string as results write it, of a string or a rule."""
    from geffect_fast.updates import parse

    return str(parse(rule))


def canonical_list(objectives: Any) -> tuple[str, ...]:
    """Canonical strings of a list of objectives, or of one string with commas, each once."""
    from geffect_fast.objectives import parse_list

    texts = [objectives] if isinstance(objectives, str) else objectives
    found = each_once("objectives", (each for text in texts for each in parse_list(text)))
    return tuple(map(str, found))


def swept_list(objectives: Any) -> tuple[str, ...]:
    """Strings of a list of objectives with ranges, or of one string with commas, each once."""
    from geffect_fast.objectives.ranges import expand_list

    return each_once("objectives", (sweep.text for sweep in expand_list(objectives)))


def one_or_several(value: Any) -> Any:
    """One text as a tuple; any other value as it is."""
    return (value,) if isinstance(value, str) else value


def texts_of(given: Any) -> Any:
    """Names as a tuple, from one text with commas or several, without the spaces around them."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return given
    return tuple(name for text in texts for each in text.split(",") if (name := each.strip()))


def canonical_or_none(objective: str | None) -> str | None:
    """An objective's string as results write it; None stays None."""
    return None if objective is None else canonical(objective)


def state_file(source: str | None) -> str | None:
    """The file with an optimizer's state, also where a checkpoint's folder is given; None stays."""
    if source is None or not user_path(source).is_dir():
        return source
    return str(user_path(source) / "optimizer.pt")


def risk_of(spec: str | Objective) -> str | Objective:
    """The canonical string of a risk given as a string; an objective stays as it is, checked."""
    from geffect_fast.objectives import resolve
    from geffect_fast.objectives.base import REFERENCE_NEEDS

    objective = resolve(spec)
    parts = objective.parts()
    if len(parts) != 1 or parts[0][0] != 1.0 or parts[0][1].needs & REFERENCE_NEEDS:
        raise InputError(
            f"'{objective}' must be one objective that needs no reference, such as nll"
        )
    return str(parts[0][1]) if isinstance(spec, str) else spec


def number_or_all(value: Any) -> Any:
    """A number of rows, also one written as text, as options are; or `all`, or None."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    whole = isinstance(number, int) and not isinstance(number, bool) and number > 0
    if number in (None, "all") or whole:
        return number
    raise ValueError(f"must be a whole number of at least 1, or all, got {value!r}")


@dataclass(frozen=True)
class Option:
    """The form of a field's option on the command line, where it differs from the default.

    Attributes:
        names: names of the option; empty: the field's name with dashes.
        metavar: placeholder for the option's value in help.
        help: help of the option, in place of the field's docstring.
        repeatable: whether the option may be given several times.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    help: str | None = None
    repeatable: bool = False


PathOrId = Annotated[str, AfterValidator(settled)]
"""A path (stored absolute) or a hub id (stored as it is)."""
Name = Annotated[str, Field(min_length=1)]
