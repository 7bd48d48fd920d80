"""Sweeps: `wga(alpha=0.1:7:30)` becomes thirty objectives, each with its value of alpha."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Objective
from geffect_fast.objectives.family import RangedSum
from geffect_fast.objectives.parameters import Value
from geffect_fast.objectives.parse import parse_families
from geffect_fast.objectives.problem import located, short

MAX_OBJECTIVES = 10_000


class Member(NamedTuple):
    """An objective and the values that tell it from the others of its sweep."""

    values: tuple[Value, ...]
    objective: Objective


@dataclass(frozen=True)
class Sweep:
    """A family of objectives that differ in the values of some hyper-parameters.

    Attributes:
        text: its string with the ranges as written; the canonical string if there are none.
        names: the swept parameters, in the order of their ranges.
        log: for each of `names`, whether its values are evenly spaced in the logarithm.
        members: its objectives; several ranges make a grid, the last one fastest.
    """

    text: str
    names: tuple[str, ...]
    log: tuple[bool, ...]
    members: tuple[Member, ...]


def expand(text: str | Objective) -> Sweep:
    """The sweep that one objective string describes, in which ranges may stand for numbers.

    `start:stop:count` is `count` evenly spaced values, `start:stop:count,log` as many evenly spaced
    in the logarithm. Values are rounded to 6 significant digits, so that labels can be read, and
    are used as rounded. A parameter's range stands in place of its value. A coefficient's range
    stands in place of the number, in brackets if it needs its own comma: `ga + (0.1:10:5,log)*kl`.

    Args:
        text: an objective string, or an objective, which is a sweep of itself alone.

    Raises:
        InputError: as `objectives.parse`, or a value does not suit its parameter.

    Examples:
        >>> [str(o) for _, o in expand("wga(alpha=1:2:3)").members]
        ['wga(alpha=1)', 'wga(alpha=1.5)', 'wga(alpha=2)']
    """
    found = expand_list([text])
    if len(found) != 1:
        raise InputError(f"objective string {short(str(text))} is a list; give one objective")
    return found[0]


def expand_list(texts: Iterable[str | Objective] | str) -> list[Sweep]:
    """The sweeps of a list, or of one string with commas between them.

    Raises:
        InputError: as `expand`, or there are more than 10,000 objectives in all.
    """
    sweeps: list[Sweep] = []
    free = MAX_OBJECTIVES
    for text in [texts] if isinstance(texts, str) else texts:
        if isinstance(text, Objective):
            pieces: list[tuple[str, Objective | RangedSum]] = [(str(text), text)]
        else:
            pieces = parse_families(text)
        for piece, found in pieces:
            if isinstance(found, Objective):
                sweeps.append(Sweep(str(found), (), (), (Member((), found),)))
            else:
                with located(str(text)):
                    sweeps.append(_members(piece, found, free))
            free -= len(sweeps[-1].members)
            if free < 0:
                raise _too_many(piece)
    return sweeps


def _members(text: str, family: RangedSum, free: int) -> Sweep:
    axes = family.axes()
    if math.prod(axis.range.count for axis in axes) > free:
        raise _too_many(text)
    points = itertools.product(*(axis.values() for axis in axes))
    ranges = [axis.range for axis in axes]
    members = [Member(v, family.at(dict(zip(ranges, v, strict=True)))) for v in points]
    return Sweep(
        text,
        tuple(axis.name for axis in axes),
        tuple(swept.log for swept in ranges),
        tuple(members),
    )


def _too_many(text: str) -> InputError:
    return InputError(
        f"objectives: {short(text)} brings the number of objectives above {MAX_OBJECTIVES}; "
        "use fewer values in each range"
    )
