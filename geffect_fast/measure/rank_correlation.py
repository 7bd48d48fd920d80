"""Rank correlations over a few runs: Spearman's and Kendall's, with intervals and p-values.

Only ranks are read, so nothing is assumed about scales: an effect of `npo` is a sum over an
answer's tokens, an effect of `ga` a mean.

For intervals as many runs as there are get drawn with replacement, a thousand times with a fixed
seed. The bounds are percentiles of the draws, whose deviations from the value are stretched for few
runs as Student's distribution is (`geffect_fast.results.intervals`). A draw is a vector of counts
`c`, by which mid-ranks and concordant pairs are sums over the runs:

    rank_i = 1/2 + sum_j c_j ([x_j < x_i] + [x_j = x_i] / 2)
    tau_b  = sum_ij c_i c_j s_ij t_ij / sqrt(sum_ij c_i c_j s_ij^2  sum_ij c_i c_j t_ij^2)

where `s_ij` and `t_ij` are the signs of `x_i - x_j` and `y_i - y_j`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geffect_fast.results.intervals import DRAWS, SEED, bounds, stretch

FEWEST = 5
"""Fewest runs that are correlated. With four, even perfect agreement has a p-value of 1/12."""

_RESAMPLES = 9999
"""Number of random permutations for a p-value where there are more orders than this."""


@dataclass(frozen=True)
class RankCorrelation:
    """The agreement of two orders of the same runs; NaN where it cannot be told.

    Attributes:
        n: number of runs that have both numbers.
        spearman, spearman_low, spearman_high: Spearman's coefficient and its bounds; the bounds are
            NaN where every draw gives the same.
        p_value: part of all orders of the one that agree with the other at least as well,
            two-sided.
        kendall, kendall_low, kendall_high: Kendall's tau-b, likewise.
        kendall_p_value: by scipy, exact for few runs without ties.
    """

    n: int
    spearman: float = math.nan
    spearman_low: float = math.nan
    spearman_high: float = math.nan
    p_value: float = math.nan
    kendall: float = math.nan
    kendall_low: float = math.nan
    kendall_high: float = math.nan
    kendall_p_value: float = math.nan


def rank_correlation(x: np.ndarray, y: np.ndarray) -> RankCorrelation:
    """Agreement of the orders in which two numbers of each run put the runs.

    Runs with a NaN among the two are left out. With fewer than `FEWEST` runs, or where all `x` or
    all `y` are the same, every coefficient is NaN.

    Args:
        x, y: the two numbers of each run, `(n,)`.
    """
    there = ~(np.isnan(x) | np.isnan(y))
    x, y = x[there], y[there]
    n = len(x)
    if n < FEWEST or len(np.unique(x)) == 1 or len(np.unique(y)) == 1:
        return RankCorrelation(n)
    from geffect_fast.metrics.extra import scipy_stats  # here, as metrics load torch

    stats = scipy_stats("rank correlation")
    counts = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
    spearman = float(stats.spearmanr(x, y).statistic)
    kendall = stats.kendalltau(x, y)
    by_chance = stats.permutation_test(
        (stats.rankdata(x),),
        lambda ranks, axis: _correlations(ranks, stats.rankdata(y), axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=_RESAMPLES,
        random_state=np.random.default_rng(SEED),
    )
    one, other = _signs(x), _signs(y)
    return RankCorrelation(
        n,
        spearman,
        *_bounds(spearman, _spearmans(one, other, counts), n),
        float(by_chance.pvalue),
        float(kendall.statistic),
        *_bounds(float(kendall.statistic), _kendalls(one, other, counts), n),
        float(kendall.pvalue),
    )


def _signs(values: np.ndarray) -> np.ndarray:
    """Signs of the differences, `(n, n)`; 0 between equal numbers, also between infinite ones."""
    return (values[:, None] > values).astype(float) - (values[:, None] < values)


def _correlations(ranks: np.ndarray, others: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's correlation of ranks along an axis with the ranks `others`, `(n,)`."""
    ranks = np.moveaxis(ranks, axis, -1)
    one, other = ranks - ranks.mean(-1, keepdims=True), others - others.mean()
    coefficient: np.ndarray = one @ other / np.sqrt((one**2).sum(-1) * (other**2).sum())
    return coefficient


def _spearmans(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's coefficient of each draw, `(draws,)`; NaN where a draw ranks nothing."""
    n = counts.sum(1, keepdims=True)
    # A mid-rank is (n + 1) / 2 plus half the sum of the signs.
    a, b = (counts @ signs.T / 2 for signs in (one, other))
    a, b = (ranks - (counts * ranks).sum(1, keepdims=True) / n for ranks in (a, b))
    with np.errstate(invalid="ignore"):
        coefficient: np.ndarray = (counts * a * b).sum(1) / np.sqrt(
            (counts * a * a).sum(1) * (counts * b * b).sum(1)
        )
    return coefficient


def _kendalls(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each draw, `(draws,)`; NaN where a draw ranks nothing."""
    both, first, second = (
        (counts @ product * counts).sum(1) for product in (one * other, one * one, other * other)
    )
    with np.errstate(invalid="ignore"):
        tau: np.ndarray = both / np.sqrt(first * second)
    return tau


def _bounds(value: float, draws: np.ndarray, n: int) -> tuple[float, float]:
    """Bounds of a coefficient from its draws; NaN where every draw gives the same."""
    draws = draws[~np.isnan(draws)]
    if not draws.size or np.ptp(draws) < 1e-9:
        return math.nan, math.nan
    low, high = (value + stretch(n) * (bound - value) for bound in bounds(draws))
    return float(np.clip(low, -1, 1)), float(np.clip(high, -1, 1))
