"""Objectives in which ranges stand for numbers, `npo(beta=0.1:1:5)`: one objective a value."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Objective, combine
from geffect_fast.objectives.parameters import Value, kind_of, written
from geffect_fast.objectives.problem import Problem


@dataclass(frozen=True)
class Range:
    """`start:stop:count`, evenly spaced, or evenly in the logarithm.

    Attributes:
        start: its first value.
        stop: its last value.
        count: number of values, at least 1.
        position: the character where the range stands, which tells two equal ranges apart.
        log: whether `,log` follows.
    """

    start: float
    stop: float
    count: int
    position: int
    log: bool = False

    def __str__(self) -> str:
        return f"{written(self.start)}:{written(self.stop)}:{self.count}{',log' * self.log}"

    def values(self) -> Iterator[Fraction]:
        """The values, ascending. Both ends are exact, and so are all values of a linear range."""
        start, stop = Fraction(self.start), Fraction(self.stop)
        for i in range(self.count):
            part = Fraction(i, max(self.count - 1, 1))
            if not self.log or part in (0, 1):
                yield start + (stop - start) * part
            else:
                low, high = math.log(self.start), math.log(self.stop)
                # a power of ten comes out whole again
                yield Fraction(f"{math.exp(low + (high - low) * float(part)):.12g}")


@dataclass(frozen=True)
class RangedObjective:
    """An objective with ranges among its parameters.

    Attributes:
        cls: its class.
        keywords: its parameters by name.
        position: the character where its name stands.
    """

    cls: type[Objective]
    keywords: Mapping[str, Value | Range]
    position: int

    @property
    def name(self) -> str:
        """The objective's name."""
        return self.cls.name

    def at(self, point: Mapping[Range, Value]) -> Objective:
        """The objective with a value in place of every range.

        Raises:
            Problem: the objective refuses a value.
        """
        keywords = {k: point[v] if isinstance(v, Range) else v for k, v in self.keywords.items()}
        try:
            made: Objective = self.cls(**keywords).expanded()
            return made
        except InputError as error:
            raise Problem(str(error), self.position) from None


class Term(NamedTuple):
    """A summand: `coefficient` times the value of each of `ranges` times `objective`."""

    coefficient: float
    ranges: tuple[Range, ...]
    objective: Objective | RangedObjective


class Axis(NamedTuple):
    """A hyper-parameter that a range sweeps.

    Attributes:
        name: the parameter's name, with the objective's in front where several of a family share
            it, and with a number behind where they share that too.
        range: its range.
        kind: float or int.
        where: the parameter's name in messages.
    """

    name: str
    range: Range
    kind: type
    where: str

    def values(self) -> tuple[Value, ...]:
        """The range's values, ascending and each once; floats are rounded to 6 significant digits.

        Raises:
            Problem: the parameter is an int, and a value is not whole.
        """
        if self.kind is float:
            return tuple(dict.fromkeys(float(f"{float(x):.6g}") for x in self.range.values()))
        whole: list[int] = []
        for x in self.range.values():
            if x.denominator != 1:
                message = (
                    f"{self.where} must be whole numbers, and {self.range} holds {float(x):.6g}"
                )
                raise Problem(message, self.range.position)
            whole.append(int(x))
        return tuple(dict.fromkeys(whole))


@dataclass(frozen=True)
class RangedSum:
    """A weighted sum with at least one range in it."""

    terms: tuple[Term, ...]

    def axes(self) -> tuple[Axis, ...]:
        """The swept hyper-parameters, in the order in which their ranges stand in the text."""
        found: dict[Range, tuple[str, str, type]] = {}
        for _, factors, objective in self.terms:
            for factor in factors:  # a bracket's factor is named for the bracket's first objective
                found.setdefault(factor, (objective.name, "coefficient", float))
            if isinstance(objective, RangedObjective):
                kinds = {f.name: kind_of(f) or float for f in dataclasses.fields(objective.cls)}
                for name, value in objective.keywords.items():
                    if isinstance(value, Range):
                        found[value] = (objective.name, name, kinds[name])
        shared = Counter(name for _, name, _ in found.values())
        axes: list[Axis] = []
        for swept in sorted(found, key=lambda each: each.position):
            owner, name, kind = found[swept]
            alone = shared[name] == 1 and name != "coefficient"
            label = base = name if alone else f"{owner}_{name}"
            while any(label == axis.name for axis in axes):
                label = f"{base}_{int(label.rpartition('_')[2]) + 1 if label != base else 2}"
            axes.append(Axis(label, swept, kind, f"objective {owner}: {name}"))
        return tuple(axes)

    def at(self, point: Mapping[Range, Value]) -> Objective:
        """The objective with a value in place of every range.

        Raises:
            Problem: an objective refuses a value, or a coefficient is out of range.
        """
        terms = []
        for coefficient, factors, objective in self.terms:
            for factor in factors:
                coefficient *= point[factor]
            if not math.isfinite(coefficient):
                raise Problem("coefficient out of range", factors[0].position)
            made = objective.at(point) if isinstance(objective, RangedObjective) else objective
            terms.append((coefficient, made))
        return combine(terms)
