"""TOFU's two numbers for a whole model (arXiv 2401.06121): forget quality and model utility."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from geffect_fast.errors import InputError
from geffect_fast.metrics.base import ALL, FORGET, Measure, Metric, Need, Seen, drawn
from geffect_fast.metrics.extra import scipy_stats
from geffect_fast.metrics.likelihood import (
    Probability,
    TruthRatio,
    log_truth_ratios,
    option_probabilities,
)
from geffect_fast.metrics.observed import Observed
from geffect_fast.metrics.overlap import RougeL
from geffect_fast.metrics.registry import register

OPTION_SETS = ("real_authors", "world_facts")
"""Sets on which the probability is the answer's share beside the perturbed answers."""
UTILITY_SETS = ("retain", *OPTION_SETS)


@register("forget_quality")
class ForgetQuality(Metric):
    """The p-value of a two-sample Kolmogorov-Smirnov test of truth ratios on the forget set.

    The test compares the model with one that was trained without the forget rows; the p-value is 1
    where no test could tell the two apart. The number has no bounds, since p-values of rows drawn
    anew do not spread about the p-value of the rows.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"paraphrases", "perturbed", "retain_model"})
    statistic: ClassVar[str] = "p-value"
    on: ClassVar[tuple[str, ...]] = (FORGET,)

    def measures(self, seen: Seen) -> dict[str, Measure]:
        own = log_truth_ratios(seen.sets[FORGET])
        others = log_truth_ratios(seen.retrained[FORGET])
        return {FORGET: Measure(ks_p_value(own, others), np.nan, np.nan)}


def ks_p_value(one: np.ndarray, other: np.ndarray) -> float:
    """The p-value of scipy's two-sample Kolmogorov-Smirnov test, `(n,)` and `(m,)`."""
    return float(scipy_stats("forget_quality").ks_2samp(one, other).pvalue)


@register("model_utility")
class ModelUtility(Metric):
    """The harmonic mean of nine: probability, ROUGE-L recall and truth ratio on three sets.

    The sets are `retain`, `real_authors` and `world_facts`. On the last two, the probability is the
    answer's share beside the perturbed answers. The mean is 0 where one of the nine is 0.
    """

    needs: ClassVar[frozenset[Need]] = frozenset(
        {"answers", "paraphrases", "perturbed", "continuations"}
    )
    statistic: ClassVar[str] = "harmonic mean"
    on: ClassVar[tuple[str, ...]] = UTILITY_SETS

    def measures(self, seen: Seen) -> dict[str, Measure]:
        for name in UTILITY_SETS:
            if name not in seen.sets:
                raise InputError(
                    f"metric model_utility needs the data set {name}: give it as a probe, such as "
                    f"--probe {name}={name}_perturbed.json"
                )
            if not seen.sets[name].has(self.needs):
                raise InputError(
                    f"metric model_utility needs 'perturbed_answer' in the rows of {name}, and for "
                    "retain 'paraphrased_answer'; give TOFU's perturbed files"
                )
        parts = [nine_parts(seen.sets[name]) for name in UTILITY_SETS]

        def utility(*weights: np.ndarray) -> np.ndarray:
            means = [w @ p.T / p.shape[1] for w, p in zip(weights, parts, strict=True)]
            nine = np.concatenate(means, axis=1).clip(min=0)  # a draw's weights may be negative
            with np.errstate(divide="ignore"):
                return nine.shape[1] / (1 / nine).sum(1)

        sizes = {name: part.shape[1] for name, part in zip(UTILITY_SETS, parts, strict=True)}
        return {ALL: drawn(utility, sizes)}


def nine_parts(seen: Observed) -> np.ndarray:
    """The three parts of the nine that a set gives, by row, `(3, n)`.

    They are probability, ROUGE-L recall and truth ratio.
    """
    by_option = seen.name in OPTION_SETS
    return np.stack(
        [
            option_probabilities(seen) if by_option else Probability().scores(seen),
            RougeL().scores(seen),
            TruthRatio(aggregation="true_better").scores(seen),
        ]
    )
