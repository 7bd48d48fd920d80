"""Hyper-parameters of an objective or an update rule: declared, checked and written."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from typing import Any, ClassVar, TypeVar

from geffect_fast.errors import InputError

Value = bool | int | float
P = TypeVar("P", bound="Parameterised")

_DOMAINS = {float: "a finite number", int: "a 64-bit integer", bool: "true or false"}
# postponed annotations are strings
_KINDS: dict[Any, type] = {key: kind for kind in _DOMAINS for key in (kind, kind.__name__)}

_BOUNDS = {
    "above": operator.gt,
    "at least": operator.ge,
    "below": operator.lt,
    "at most": operator.le,
}


def parameter(
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare a field of an objective together with the range its value must lie in.

    Args:
        default: value where none is given; left out, the parameter is required.
        above: exclusive lower bound.
        at_least: inclusive lower bound.
        below: exclusive upper bound.
        at_most: inclusive upper bound.

    Returns:
        A dataclass field; the objective checks its value on construction.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Mine(Objective):
        ...     beta: float = parameter(0.1, above=0)
    """
    bounds = dict(zip(_BOUNDS, (above, at_least, below, at_most), strict=True))
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"bounds": given})


class Parameterised:
    """A frozen dataclass of hyper-parameters with a name, checked when an instance is made.

    Class attributes:
        noun: the word for such an object in messages, as `objective`.
        name: the name of this class in strings.
    """

    noun: ClassVar[str]
    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __new__(cls: type[P], *args: Any, **kwargs: Any) -> P:
        """Remember which parameters were given: results are looked up by the string as written."""
        self = super().__new__(cls)
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
        positional = [field.name for field in fields][: len(args)]
        object.__setattr__(self, "_given", frozenset(positional) | frozenset(kwargs))
        return self

    def __post_init__(self) -> None:
        """Check the parameters; a subclass that overrides this must call it."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if kind_of(field) is not None:
                value = checked(f"{self.noun} {self.name}", field, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    def expanded(self) -> Any:
        """The object that the name stands for: this one, unless the name is short for others."""
        return self

    def parameters(self) -> dict[str, Any]:
        """Every hyper-parameter by name, given or default, in the order of the signature."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: getattr(self, field.name) for field in fields}

    def __str__(self) -> str:
        """The canonical string: the name and the parameters that were given, `npo(beta=0.1)`."""
        given: frozenset[str] = vars(self)["_given"]
        pairs = [f"{k}={written(v)}" for k, v in self.parameters().items() if k in given]
        return f"{self.name}({', '.join(pairs)})" if pairs else self.name


def kind_of(field: dataclasses.Field[Any]) -> type | None:
    """`float`, `int` or `bool` as the field is annotated; None for any other annotation."""
    return _KINDS.get(field.type)


def make_frozen(owner: str, cls: type) -> None:
    """Make a class a frozen dataclass where it is none yet, and check how it declares parameters.

    Args:
        owner: the owner of the parameters, for the message: `objective 'npo'`.
        cls: the class.

    Raises:
        InputError: a parameter is not annotated `float`, `int` or `bool`.
    """
    if "__dataclass_params__" not in vars(cls):
        dataclasses.dataclass(frozen=True)(cls)
    for field in dataclasses.fields(cls):
        if kind_of(field) is None:
            raise InputError(
                f"{owner}: parameter {field.name!r} must be annotated float, int or bool, not "
                f"{field.type!r}"
            )


def checked(owner: str, field: dataclasses.Field[Any], value: Any) -> Value:
    """`value` as the field's type, if it has that type and lies in the field's range.

    Args:
        owner: the owner of the parameter, for the message: `objective npo`.
        field: the dataclass field, annotated `float`, `int` or `bool`.
        value: what the user gave.

    Raises:
        InputError: `value` does not; the message names owner, parameter, value and range.
    """
    kind = _KINDS[field.type]
    bounds = field.metadata.get("bounds", {})
    converted = _convert(kind, value)
    if converted is None or not all(_BOUNDS[word](converted, b) for word, b in bounds.items()):
        limits = " and ".join(f"{word} {written(bound)}" for word, bound in bounds.items())
        domain = f"{_DOMAINS[kind]} {limits}".rstrip()
        raise InputError(f"{owner}: {field.name} must be {domain}, got {value!r}")
    return converted


def _convert(kind: type, value: Any) -> Value | None:
    """`value` as `kind`, or None where it is of another; a bool is no number, 7.0 no integer."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is int:
        whole = isinstance(value, numbers.Integral) and -(2**63) <= int(value) < 2**63
        return int(value) if whole else None
    return finite(value)


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is not a finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def written(value: Value) -> str:
    """The shortest text that parses to `value` again: `1`, `0.1`, `1e-05`, `true`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e16):
        return repr(value)
    return str(int(value))
