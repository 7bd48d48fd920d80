"""Settings made of arguments of Python, fields of YAML and options of commands.

An error says in one line what is wrong, with the nearest known name.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from geffect_fast.errors import InputError
from geffect_fast.registry import nearest
from geffect_fast.settings import ProfileConfig, Settings

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = TypeVar("Kind", bound=Settings)


def make_config(
    values: dict[Any, Any], where: str = "", options: Mapping[str, str] | None = None
) -> ProfileConfig:
    """The config of a profile or sweep from plain values, as `checked_config` makes it."""
    return checked_config(ProfileConfig, values, where, options)


def checked_config(
    kind: type[Kind],
    values: dict[Any, Any],
    where: str = "",
    options: Mapping[str, str] | None = None,
) -> Kind:
    """Settings from plain values.

    Args:
        kind: the class of the settings.
        values: field name to value.
        where: the place that the values come from, for the error, such as a file name.
        options: fields that come from options of the command line instead, with the names of these
            options.

    Raises:
        InputError: one line with the place, the field, what is wrong and the nearest field name.
    """
    for name in values:
        if not isinstance(name, str):
            place = f"{where}: " if where else ""
            raise InputError(f"{place}field {name!r} must be text, such as model or forget")
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(_one_line(error, where, options or {}, list(kind.model_fields))) from None


def with_settings(kind: type[Settings], **defaults: Any) -> Callable[[Function], Function]:
    """Show the fields of `kind` in the signature and the docstring of a function.

    The function takes the fields that are given as `**settings`. Its docstring must have a line
    `settings:` among its arguments.

    Args:
        kind: the class of the settings.
        defaults: defaults of the function that differ from those of the fields.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        shown, described = [], []
        for parameter in signature.parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                shown.append(parameter)
        for name, field in kind.model_fields.items():
            default = inspect.Parameter.empty if field.is_required() else field.get_default()
            keyword = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, default)
            )
            shown.append(keyword)
            described.append(
                textwrap.fill(
                    f"{name}: {' '.join((field.description or '').split())}",
                    96,
                    initial_indent=4 * " ",
                    subsequent_indent=8 * " ",
                )
            )
        vars(function)["__signature__"] = signature.replace(parameters=shown)
        text = inspect.getdoc(function) or ""  # without indentation, as Python 3.13 keeps it
        if f"{4 * ' '}settings:\n" not in text:
            raise ValueError(f"{function.__name__}: its docstring has no line 'settings:'")
        function.__doc__ = text.replace(f"{4 * ' '}settings:", "\n".join(described))
        return function

    return decorate


def _one_line(
    error: ValidationError, where: str, options: Mapping[str, str], fields: list[str]
) -> str:
    """The first problem of a validation error: place, field, problem, remedy."""
    problem = min(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    if not problem["loc"]:  # a problem of several fields; the message begins with the one to change
        field, colon, said = str(problem["ctx"]["error"]).partition(": ")
        place = f"{where}: " if where and field not in options else ""
        return f"{place}{options.get(field, field)}{colon}{said}"
    first, *inner = map(str, problem["loc"])
    place = f"{where}: " if where and first not in options else ""
    field = ".".join([options.get(first, first), *inner])
    if problem["type"] == "extra_forbidden":
        return f"{place}unknown field {_short(field)}; {nearest(field, fields)}"
    if problem["type"] == "missing":
        return f"{place}field {field!r} is missing; give it"
    if problem["type"] == "value_error":
        return f"{place}{field}: {problem['ctx']['error']}"
    given = problem["input"]
    if problem["type"] == "literal_error" and isinstance(given, str):
        allowed = re.findall(r"'([^']+)'", str(problem["ctx"]["expected"]))
        advice = nearest(given, allowed, f"choose from {', '.join(allowed)}")
        return f"{place}{field}: unknown {_short(given)}; {advice}"
    return f"{place}{field}: {problem['msg'].replace('Input s', 's')}, got {_short(given)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
