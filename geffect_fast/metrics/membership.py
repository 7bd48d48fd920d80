"""Metrics of membership: whether forget rows look more trained on than a hold-out.

A row that looks like a member has a high score. The number of the forget set is the area under the
ROC curve (scikit-learn's): the probability that a forget row scores above a hold-out row. At 0.5
the two sets cannot be told apart. The scores are, with `l_t` the log-probability of label token `t`
of `n`, `l0_t` that by the reference model, and `mu_t`, `sigma_t` the mean and the standard
deviation of a token's log-probability under the model's own distribution:

    loss              mean_t l_t
    zlib              mean_t l_t / bytes of the zlib-compressed answer
    min_k             mean of the k n lowest l_t
    min_k_plus_plus   mean of the k n lowest (l_t - mu_t) / sigma_t
    reference         mean_t l_t - mean_t l0_t
    gradient_norm     -||grad mean_t l_t||

`privleak` is no score: it is the change of `1 - AUC(min_k)` against a model without the forget
rows, in percent.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from geffect_fast.errors import InputError
from geffect_fast.metrics.base import FORGET, HOLDOUT, Measure, Metric, Need, Seen, drawn
from geffect_fast.metrics.extra import roc_auc_score
from geffect_fast.metrics.observed import Observed, losses_of, required
from geffect_fast.metrics.registry import register

_LEAST_SPREAD = 1e-3


class Membership(Metric):
    """A metric whose number of the forget set is an AUC against the hold-out rows."""

    statistic: ClassVar[str] = "AUC"
    on: ClassVar[tuple[str, ...]] = (FORGET, HOLDOUT)

    def measures(self, seen: Seen) -> dict[str, Measure]:
        return {FORGET: auc_of(*self._both(seen.sets))}

    def _both(self, sets: Mapping[str, Observed]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the forget rows and of the hold-out rows."""
        for name in (FORGET, HOLDOUT):
            if not self.measurable(sets[name]):
                raise InputError(
                    f"{name}: its rows lack what metric {self} reads; give rows that have it, or "
                    "leave the metric out"
                )
        members, others = (required(self.scores(sets[name])) for name in (FORGET, HOLDOUT))
        return members, others


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above a non-member's; a tie counts half."""
    labels = np.repeat([1, 0], [len(members), len(others)])
    return float(roc_auc_score()(labels, np.concatenate([members, others])))


def auc_of(members: np.ndarray, others: np.ndarray) -> Measure:
    """`auc` with its interval, for which the rows of the two sets are drawn independently."""
    found = drawn(_weighted_auc(members, others), _sizes(members, others))
    return Measure(auc(members, others), found.low, found.high)


def _sizes(members: np.ndarray, others: np.ndarray) -> dict[str, int]:
    return {FORGET: len(members), HOLDOUT: len(others)}


def _weighted_auc(
    members: np.ndarray, others: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`auc` as a function of weights of both sets' rows, `(draws, n)` each; returns `(draws,)`."""
    order = np.argsort(others, kind="stable")
    first, last = (np.searchsorted(others[order], members, side=side) for side in ("left", "right"))

    def area(own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        up_to = np.zeros((len(theirs), 1 + len(others)))  # weights of the lowest others, summed
        np.cumsum(theirs[:, order], axis=1, out=up_to[:, 1:])
        below = (up_to[:, first] + up_to[:, last]) / 2  # a tie counts half
        return (own * below).sum(1) / (own.sum(1) * theirs.sum(1))

    return area


@register("loss")
class LossMembership(Membership):
    """The answer's mean log-probability (LOSS, arXiv 1709.01604)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        return -seen.losses


@register("zlib")
class Zlib(Membership):
    """The mean log-probability divided by the zlib-compressed answer's bytes (arXiv 2012.07805)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "texts", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        sizes = [len(zlib.compress(text.encode("utf-8"))) for text in required(seen.texts)]
        return -seen.losses / np.array(sizes)


class _Lowest(Membership):
    k: float = Field(default=0.4, gt=0, le=1)
    """Part of an answer's tokens that counts, those with the lowest values; at least one token."""

    def _lowest(self, values: np.ndarray) -> float:
        n = max(1, int(self.k * len(values)))
        return float(np.sort(values)[:n].mean())


@register("min_k")
class MinK(_Lowest):
    """The mean of the lowest token log-probabilities (Min-K%, arXiv 2310.16789)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        return np.array([self._lowest(required(each.log_prob)) for each in required(seen.answers)])


@register("min_k_plus_plus")
class MinKPlusPlus(_Lowest):
    """Min-K% of log-probabilities standardised by the model's own distribution (2404.02936).

    Where the model is almost certain, the standard deviation is close to 0 or rounds to 0. It
    therefore counts as at least 0.001, the square root of open-unlearning's least variance.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "distribution", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        found = []
        for each in required(seen.answers):
            above = required(each.log_prob) - required(each.mean)
            found.append(self._lowest(above / np.maximum(required(each.spread), _LEAST_SPREAD)))
        return np.array(found)


@register("reference")
class ReferenceLoss(Membership):
    """The mean log-probability above that of a reference model (arXiv 2012.07805)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "reference", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        return losses_of(required(seen.reference)) - seen.losses


@register("gradient_norm")
class GradientNorm(Membership):
    """The norm of the gradient of the row's mean loss: members have small ones (2402.17012)."""

    convention: Literal["whole", "open_unlearning", "mimir"] = "whole"
    """whole: minus the norm of the whole gradient; open_unlearning: minus the mean over parameters
    of their norms; mimir: the mean over parameters of their largest entries, with plus, as MIMIR
    has it, so that its AUC counts the other way round."""

    needs: ClassVar[frozenset[Need]] = frozenset({"holdout"})

    def wants(self) -> frozenset[Need]:
        return self.needs | {_NORMS[self.convention]}

    def scores(self, seen: Observed) -> np.ndarray:
        norms = seen.norms[_NORMS[self.convention]]
        return norms if self.convention == "mimir" else -norms


_NORMS: dict[str, Need] = {
    "whole": "whole_norms",
    "open_unlearning": "parameter_norms",
    "mimir": "largest_entries",
}


@register("privleak")
class PrivLeak(MinK):
    """MUSE's leak (arXiv 2407.06460): `100 (a - a0) / a0` with `a = 1 - AUC(min_k)`.

    `a0` is `a` of the model that was trained without the forget rows, or 0.5 where none is given.
    Below 0 the forget rows still look like members; above 0 they look less known than rows that the
    model has not seen. Both models answer the same rows, so a draw of rows is the same for both.
    """

    statistic: ClassVar[str] = "percent"
    within: ClassVar[tuple[float, float]] = (-100.0, math.inf)

    def measures(self, seen: Seen) -> dict[str, Measure]:
        own = self._both(seen.sets)
        before = self._both(seen.retrained) if seen.retrained else None
        a0 = 0.5 if before is None else 1 - auc(*before)
        if a0 == 0:
            return {FORGET: Measure(np.nan, np.nan, np.nan)}
        if before is not None and np.array_equal(_comparisons(*own), _comparisons(*before)):
            return {FORGET: Measure(0.0, 0.0, 0.0)}  # in every draw of rows
        area = auc(*own)
        value = 100 * ((1 - area) - a0) / a0
        if area in (0, 1):  # every draw of these rows gives the same
            return {FORGET: Measure(value, np.nan, np.nan)}
        own_area = _weighted_auc(*own)
        area_before = None if before is None else _weighted_auc(*before)

        def leak(*weights: np.ndarray) -> np.ndarray:
            a = _left(own_area(*weights))
            left = np.full_like(a, 0.5) if area_before is None else _left(area_before(*weights))
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where(a == left, 0, 100 * (a - left) / left)

        found = drawn(leak, _sizes(*own))
        return {FORGET: Measure(value, found.low, found.high)}


def _comparisons(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The comparisons of scores that determine an AUC, `(2, n, m)` bool: above, and not below."""
    return np.stack([members[:, None] > others, members[:, None] >= others])


def _left(area: np.ndarray) -> np.ndarray:
    """`1 - AUC`, rounded to 12 digits and clipped to [0, 1]: a draw's weights may be negative."""
    return np.round(1 - area, 12).clip(0, 1)
