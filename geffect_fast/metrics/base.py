"""What a metric is: what it needs to see of a model, its score of a row, its number of a set."""

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
"""What a metric may ask for; `docs/adding_a_metric.md` says what each is."""

FORGET, HOLDOUT = "forget", "holdout"
ALL = "all"
"""The place of a number that is of several sets together."""

_ROUNDING = 1e-9
"""What draws of one and the same number differ by, as a part of it."""


@dataclass(frozen=True)
class Measure:
    """A number of a set, and its bounds by the choice of the rows; NaN where nothing is known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Seen:
    """All that was seen of a model and of those it is compared with.

    Attributes:
        sets: of the model, by the name of the data set.
        retrained: of the model that was trained without the forget rows, likewise; empty where none
            is given.
    """

    sets: Mapping[str, Observed]
    retrained: Mapping[str, Observed]


class Metric(Settings):
    """Something measured of a model on rows; a frozen pydantic model of its hyper-parameters.

    A subclass defines `scores`; its number of a set is then their mean. One whose number is not a
    mean defines `measures` too.

    Class attributes:
        name: what it is called in lists of metrics, set by `register`.
        needs: what must be seen of the rows of every set that it is measured on.
        statistic: what its number of a set is: mean, AUC, p-value ...
        on: the sets it reads; none named: every one.
        kinds: of rows that it reads; none named: every one.
        within: what its number can be; bounds do not lie outside.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    statistic: ClassVar[str] = "mean"
    on: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[RowKind, ...]] = ()
    within: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @classmethod
    def reads(cls, name: str) -> bool:
        """Whether it reads the set of this name."""
        return not cls.on or name in cls.on

    @classmethod
    def reads_rows(cls, kind: RowKind) -> bool:
        """Whether it reads rows of this kind."""
        return not cls.kinds or kind in cls.kinds

    def wants(self) -> frozenset[Need]:
        """Its needs, where they depend on its hyper-parameters."""
        return self.needs

    def most_written(self) -> int:
        """Tokens of a continuation that it reads at most, where it needs what is `written`."""
        return 0

    def measurable(self, seen: Observed) -> bool:
        """Whether a set is one that it reads, and all that it needs was seen of its rows."""
        return self.reads(seen.name) and self.reads_rows(seen.kind) and seen.has(self.wants())

    def scores(self, seen: Observed) -> np.ndarray | None:
        """One number a row of a set, `(n,)` fp64; None where only sets have numbers."""
        return None

    def measures(self, seen: Seen) -> dict[str, Measure]:
        """Its number of every set: the mean of the rows' scores."""
        found = {}
        for name, observed in seen.sets.items():
            scores = self.scores(observed) if self.measurable(observed) else None
            if scores is not None:
                found[name] = mean_of(scores, name)
        return found

    def __str__(self) -> str:
        """The name and the hyper-parameters that are not their defaults, `min_k(k=0.2)`."""
        given = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default()
        }
        pairs = [f"{name}={_written(value)}" for name, value in given.items()]
        return f"{self.name}({', '.join(pairs)})" if pairs else self.name


def mean_of(scores: np.ndarray, name: str) -> Measure:
    """The mean of a set's scores.

    Args:
        scores: `(n,)`.
        name: of the set.
    """
    return drawn(lambda weights: weights @ scores / len(scores), {name: len(scores)})


def drawn(statistic: Callable[..., Any], sizes: Mapping[str, int]) -> Measure:
    """A number of one or several sets, with its interval (`geffect_fast.results.intervals`).

    The rows of each set are drawn by themselves. Where every draw gives the same, as of rows that
    all score alike, they say nothing of other rows, and the bounds are NaN.

    Args:
        statistic: of weights of the sets' rows, `(draws, n)` each, in order: `(draws,)`.
        sizes: rows of each set, by name.
    """
    (value,) = statistic(*(np.ones((1, n)) for n in sizes.values()))
    if min(sizes.values()) < 2:  # nothing can be said of a set of one row
        return Measure(float(value), np.nan, np.nan)
    draws = statistic(*(row_weights([name] * n) for name, n in sizes.items()))
    with np.errstate(invalid="ignore"):  # of infinite draws
        if np.ptp(draws) <= _ROUNDING * abs(value):
            return Measure(float(value), np.nan, np.nan)
    low, high = bounds(draws)
    return Measure(float(value), float(low), float(high))


def _written(value: Any) -> str:
    if isinstance(value, str) and not value.isidentifier():
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
