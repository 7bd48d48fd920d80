"""The base class of metrics: needs from a model, a score of each row, a number of each set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from geffect_fast.data.row_kinds import RowKind
from geffect_fast.metrics.observed import Observed
from geffect_fast.results.intervals import bounds, row_weights
from geffect_fast.settings import Settings

Need = Literal[
    "answers",
    "distribution",
    "paraphrases",
    "perturbed",
    "rephrased",
    "choices",
    "texts",
    "continuations",
    "written",
    "whole_norms",
    "parameter_norms",
    "largest_entries",
    "reference",
    "retain_model",
    "holdout",
]
"""Observations that a metric may need; `docs/adding_a_metric.md` describes each."""

FORGET, RETAIN, HOLDOUT = "forget", "retain", "holdout"
ALL = "all"
"""The name of the set that stands for several sets together."""

_ROUNDING = 1e-9
"""Largest difference, as a part of a number, that rounding makes between equal draws of it."""


@dataclass(frozen=True)
class Measure:
    """A number of a set, and bounds for it on other rows of the kind; NaN where it is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Seen:
    """Observations of a model, and of the model that it is compared with.

    Attributes:
        sets: observations of the model, by the name of the data set.
        retrained: observations of the model that was trained without the forget rows, by the name
            of the data set; empty where no such model is given.
    """

    sets: Mapping[str, Observed]
    retrained: Mapping[str, Observed]


class Metric(Settings):
    """A measure of a model on rows; a frozen pydantic model of its hyper-parameters.

    A subclass defines `scores`, and the metric's number of a set is the mean of the scores. A
    subclass whose number is not a mean defines `measures` too.

    Class attributes:
        name: the metric's name in lists of metrics, set by `register`.
        needs: observations that the metric needs of every set that it is measured on.
        statistic: the kind of number that a set gets: mean, AUC, p-value ...
        on: names of the sets that the metric reads; empty: all sets.
        kinds: kinds of rows that the metric reads; empty: all kinds.
        within: least and largest value that the number can have; bounds are cut to this range.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    statistic: ClassVar[str] = "mean"
    on: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[RowKind, ...]] = ()
    within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @classmethod
    def reads(cls, name: str) -> bool:
        """Whether the metric reads the set of this name."""
        return not cls.on or name in cls.on

    @classmethod
    def reads_rows(cls, kind: RowKind) -> bool:
        """Whether the metric reads rows of this kind."""
        return not cls.kinds or kind in cls.kinds

    def wants(self) -> frozenset[Need]:
        """The metric's needs; a subclass overrides this where they depend on hyper-parameters."""
        return self.needs

    def most_written(self) -> int:
        """The most tokens of a continuation that the metric reads, where it needs `written`."""
        return 0

    def measurable(self, seen: Observed) -> bool:
        """Whether the metric reads this set, and all its needs were observed there."""
        return self.reads(seen.name) and self.reads_rows(seen.kind) and seen.has(self.wants())

    def scores(self, seen: Observed) -> np.ndarray | None:
        """One score for each row of a set, `(n,)` fp64; None where only whole sets have numbers."""
        return None

    def measures(self, seen: Seen) -> dict[str, Measure]:
        """The metric's number of every set that it reads: the mean of the rows' scores."""
        found = {}
        for name, observed in seen.sets.items():
            scores = self.scores(observed) if self.measurable(observed) else None
            if scores is not None:
                found[name] = mean_of(scores, name)
        return found

    def __str__(self) -> str:
        """The name with the hyper-parameters that are not at their defaults: `min_k(k=0.2)`."""
        given = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default()
        }
        pairs = [f"{name}={_written(value)}" for name, value in given.items()]
        return f"{self.name}({', '.join(pairs)})" if pairs else self.name


def mean_of(scores: np.ndarray, name: str) -> Measure:
    """The mean of a set's scores, with bounds.

    Args:
        scores: scores of the rows, `(n,)`.
        name: name of the set.
    """
    return drawn(lambda weights: weights @ scores / len(scores), {name: len(scores)})


def drawn(statistic: Callable[..., Any], sizes: Mapping[str, int]) -> Measure:
    """A number of one or several sets, with its interval (`geffect_fast.results.intervals`).

    The rows of each set are drawn independently. The bounds are NaN where every draw gives the same
    number, as with rows that all score alike: such draws tell nothing about other rows.

    Args:
        statistic: a function of weights of the rows, an array `(draws, n)` for each set in the
            order of `sizes`; returns `(draws,)`.
        sizes: number of rows of each set, by name.
    """
    (value,) = statistic(*(np.ones((1, n)) for n in sizes.values()))
    if min(sizes.values()) < 2:  # one row tells nothing about others
        return Measure(float(value), np.nan, np.nan)
    draws = statistic(*(row_weights([name] * n) for name, n in sizes.items()))
    with np.errstate(invalid="ignore"):  # draws may be infinite
        if np.ptp(draws) <= _ROUNDING * abs(value):
            return Measure(float(value), np.nan, np.nan)
    low, high = bounds(draws)
    return Measure(float(value), float(low), float(high))


def _written(value: Any) -> str:
    if isinstance(value, str) and not value.isidentifier():
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
