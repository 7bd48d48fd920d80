"""Metrics of membership: whether forget rows look more trained on than a hold-out.

A row's score is high where it looks like a member; the number of the forget set is the area under
the ROC curve, the probability that a forget row scores above a hold-out row (scikit-learn's).
0.5: nobody can tell. With `l_t` the log-probability of label token `t` of `n`:

    loss              mean_t l_t
    zlib              mean_t l_t / bytes of the zlib-compressed answer
    min_k             mean of the k n lowest l_t
    min_k_plus_plus   the same of (l_t - mu_t) / sigma_t, moments over the model's own distribution
    reference         mean_t l_t - mean_t l0_t
    gradient_norm     -||grad mean_t l_t||
    privleak          change of AUC(min_k) against a model without the forget rows, in percent
"""

from __future__ import annotations

import math
import zlib
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from geffect_fast.metrics.base import FORGET, HOLDOUT, Measure, Metric, Need, Seen, drawn
from geffect_fast.metrics.extra import roc_auc_score
from geffect_fast.metrics.observed import Observed, known, losses_of
from geffect_fast.metrics.registry import register


class Membership(Metric):
    """A metric whose number of the forget set is an AUC against the hold-out."""

    statistic: ClassVar[str] = "AUC"
    on: ClassVar[tuple[str, ...]] = (FORGET, HOLDOUT)

    def measures(self, seen: Seen) -> dict[str, Measure]:
        members, others = (known(self.scores(seen.sets[name])) for name in (FORGET, HOLDOUT))
        return {FORGET: auc_of(members, others)}


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above another's, ties counted half."""
    labels = np.repeat([1, 0], [len(members), len(others)])
    return float(roc_auc_score()(labels, np.concatenate([members, others])))


def auc_of(members: np.ndarray, others: np.ndarray) -> Measure:
    """`auc`, with its interval: the rows of both sets are drawn anew, each by themselves."""
    order = np.argsort(others, kind="stable")
    first, last = (np.searchsorted(others[order], members, side=side) for side in ("left", "right"))

    def drawn_auc(own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        up_to = np.zeros((len(theirs), 1 + len(others)))  # weights of the lowest others, summed
        np.cumsum(theirs[:, order], axis=1, out=up_to[:, 1:])
        below = (up_to[:, first] + up_to[:, last]) / 2  # a tie counts half
        return (own * below).sum(1) / (own.sum(1) * theirs.sum(1))

    found = drawn(drawn_auc, {FORGET: len(members), HOLDOUT: len(others)})
    return Measure(auc(members, others), found.low, found.high)


@register("loss")
class LossMembership(Membership):
    """The answer's mean log-probability (LOSS, arXiv 1709.01604)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        return -seen.losses


@register("zlib")
class Zlib(Membership):
    """The mean log-probability beside the answer's zlib entropy (arXiv 2012.07805)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "texts", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        sizes = [len(zlib.compress(text.encode("utf-8"))) for text in known(seen.texts)]
        return -seen.losses / np.array(sizes)


class _Lowest(Membership):
    k: float = Field(default=0.4, gt=0, le=1)
    """The part of an answer's tokens that count, the least expected; at least one."""

    def _lowest(self, values: np.ndarray) -> float:
        n = max(1, int(self.k * len(values)))
        return float(np.sort(values)[:n].mean())


@register("min_k")
class MinK(_Lowest):
    """The mean of the lowest token log-probabilities (Min-K%, arXiv 2310.16789)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        return np.array([self._lowest(known(each.log_prob)) for each in known(seen.answers)])


@register("min_k_plus_plus")
class MinKPlusPlus(_Lowest):
    """Min-K% of log-probabilities standardised by the model's own distribution (2404.02936)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "distribution", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        found = []
        for each in known(seen.answers):
            above, spread = known(each.log_prob) - known(each.mean), known(each.spread)
            # Where one token has all probability the label is it, and as expected as can be.
            found.append(
                self._lowest(np.divide(above, spread, out=np.zeros_like(above), where=spread > 0))
            )
        return np.array(found)


@register("reference")
class ReferenceLoss(Membership):
    """The mean log-probability above that of a reference model (arXiv 2012.07805)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers", "reference", "holdout"})

    def scores(self, seen: Observed) -> np.ndarray:
        return losses_of(known(seen.reference)) - seen.losses


@register("gradient_norm")
class GradientNorm(Membership):
    """The norm of the gradient of the row's mean loss: members have small ones (2402.17012)."""

    convention: Literal["whole", "open_unlearning", "mimir"] = "whole"
    """whole: minus the norm of the whole gradient; open_unlearning: minus the mean over parameters
    of their norms; mimir: the mean over parameters of their largest entries, negated once more as
    there, so that its AUC is that of the others turned round."""

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

    `a0` is that of the model that was trained without the forget rows; 0.5 without one. Below 0
    forget rows still look like members, above 0 they look less known than rows nobody has seen.
    """

    statistic: ClassVar[str] = "percent"
    within: ClassVar[tuple[float, float]] = (-100.0, math.inf)

    def measures(self, seen: Seen) -> dict[str, Measure]:
        own = auc_of(*(self.scores(seen.sets[name]) for name in (FORGET, HOLDOUT)))
        a0 = 0.5
        if seen.retrained:
            a0 = 1 - auc(*(self.scores(seen.retrained[name]) for name in (FORGET, HOLDOUT)))
        if a0 == 0:
            return {FORGET: Measure(np.nan, np.nan, np.nan)}

        def leak(area: float) -> float:
            return 100 * ((1 - area) - a0) / a0

        return {FORGET: Measure(leak(own.value), leak(own.high), leak(own.low))}
