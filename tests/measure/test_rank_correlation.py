"""Rank correlations equal scipy's, bounds are those of drawn runs, and noise is named as noise."""

import numpy as np
import pytest
from scipy import stats

from geffect_fast.measure import rank_correlation as module
from geffect_fast.measure.rank_correlation import FEWEST, rank_correlation
from geffect_fast.results.intervals import DRAWS, SEED, bounds, stretch


def numbers(n, ties=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = x + rng.normal(size=n)
    return (x.round(), y.round()) if ties else (x, y)


@pytest.mark.parametrize("ties", [False, True])
def test_coefficients_are_those_of_scipy(ties):
    x, y = numbers(14, ties)
    found = rank_correlation(x, y)
    assert found.n == 14
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.kendall == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert found.kendall_p_value == pytest.approx(stats.kendalltau(x, y).pvalue, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_bounds_are_of_the_runs_drawn_anew(ties):
    """The reference computes one draw after the other by scipy, on the runs in the draw."""
    x, y = numbers(8, ties, seed=3)
    counts = np.random.default_rng(SEED).multinomial(8, np.full(8, 1 / 8), size=DRAWS)
    drawn = [np.repeat(np.arange(8), c) for c in counts]
    for name, of in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        with np.errstate(invalid="ignore"):
            there = [i for i in drawn if np.ptp(x[i]) and np.ptp(y[i])]
        each = np.array([of(x[i], y[i]).statistic for i in there])
        found = rank_correlation(x, y)
        value = getattr(found, name)
        wanted = np.clip([value + stretch(8) * (b - value) for b in bounds(each)], -1, 1)
        assert [getattr(found, f"{name}_low"), getattr(found, f"{name}_high")] == pytest.approx(
            wanted, abs=1e-9
        )


def test_the_p_value_of_few_runs_is_the_share_of_all_orders():
    """Of the 120 orders of five runs, two agree as well: the order itself and its reverse."""
    found = rank_correlation(np.arange(5.0), np.arange(5.0) ** 3)
    assert found.spearman == pytest.approx(1) and found.p_value == pytest.approx(2 / 120)
    assert np.isnan([found.spearman_low, found.spearman_high]).all(), "every draw says the same"


def test_only_order_counts_and_infinite_numbers_have_one():
    x, y = numbers(9)
    plain, stretched = rank_correlation(x, y), rank_correlation(np.exp(9 * x), y**3)
    assert plain == stretched
    above = x.copy()
    above[x.argmax()] = np.inf
    assert rank_correlation(above, y) == plain


def test_runs_without_a_number_are_left_out():
    x, y = numbers(9)
    holes = np.append(x, [np.nan, 1.0]), np.append(y, [1.0, np.nan])
    assert rank_correlation(*holes) == rank_correlation(x, y)


def test_nothing_is_said_of_few_runs_or_of_equal_numbers():
    x, y = numbers(FEWEST - 1)
    few, flat = rank_correlation(x, y), rank_correlation(np.ones(9), np.arange(9.0))
    assert (few.n, flat.n) == (FEWEST - 1, 9)
    assert np.isnan([few.spearman, few.p_value, flat.spearman, flat.kendall]).all()


def test_of_unrelated_numbers_one_in_twenty_is_told_from_chance(monkeypatch):
    monkeypatch.setattr(module, "_RESAMPLES", 199)
    rng = np.random.default_rng(1)
    p = np.array([rank_correlation(*rng.normal(size=(2, 12))).p_value for _ in range(200)])
    assert 0.01 < (p < 0.05).mean() < 0.1
