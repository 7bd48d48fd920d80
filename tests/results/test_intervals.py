"""Intervals by the choice of rows: their coverage, their quantities, and results without any."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from models import build, samples

import geffect_fast as gf
from geffect_fast.results import intervals
from geffect_fast.results.told_apart import effect_spreads, told_apart

FORGET, RETAIN = samples([9, 7, 11, 8, 6, 9], 1), samples([8, 10, 9, 7, 12], 2)
MANY = samples([8, 10, 9, 7, 12, 5, 11, 6, 9, 13, 7], 5)


@pytest.fixture(scope="module")
def model():
    return build("llama", dtype=torch.float64)


def profile(model, **settings):
    given = {"forget": FORGET, "retain": RETAIN, "objectives": ["ga", "gd"]} | settings
    return gf.profile(model, None, **given)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resolve": ("sample",), "engine": "forward"},
        {"resolve": ("group", "sample"), "norms": False},
        {"resolve": ("sample", "token")},
    ],
)
def test_every_way_to_resolve_by_sample_gives_the_same_intervals(model, settings, tmp_path):
    expected, found = profile(model), profile(model, **settings)
    names = [name for name in expected if str(name).endswith(("_low", "_high"))]
    assert len(names) == 6
    for name in [*names, "collateral"]:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    total = found.g_effect.sum([d for d in found.g_effect.dims if d not in ("objective", "risk")])
    assert (found.g_effect_low <= total).all() and (total <= found.g_effect_high).all()
    assert (found.risk_value_low <= found.risk_value).all()
    assert (found.risk_value <= found.risk_value_high).all()
    assert (found.collateral_low <= found.collateral).all()
    assert found.attrs["interval_level"] == 0.95


def test_a_result_in_a_file_has_those_of_one_in_memory(model, tmp_path):
    expected = profile(model, resolve=("sample", "token"))
    with profile(model, resolve=("sample", "token"), out=tmp_path / "effects.nc") as found:
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_where_samples_are_summed_there_are_none(model):
    assert "g_effect_low" not in profile(model, resolve=("parameter",))
    assert "interval_level" not in profile(model, resolve=("parameter",)).attrs


def test_nothing_is_said_of_one_row(model):
    found = profile(model, forget=FORGET[:1])
    assert found.g_effect_low.isnull().all() and found.collateral_high.isnull().all()
    assert found.risk_value_low.isnull().values.tolist() == [True, False]
    found = profile(model, retain=RETAIN[:1], objectives=["ga"])
    assert found.g_effect_low.isnull().values.tolist() == [[False, True]]


def gradient(model, rows, total):
    """The gradient of the rows' losses over `total` tokens, by plain autograd."""
    model.zero_grad()
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[:, :-1]
        labels = torch.tensor([row["labels"]])[:, 1:]
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).div(total).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def targets(rows):
    return sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)


def test_all_rows_of_a_risk_are_measured_exactly(model):
    """`<grad R_j, G> / <G, G>`, by one backward a row, centred and stretched by the formula.

    A risk with fewer rows than another is filled up with zeros.
    """
    probe = samples([6, 7, 8], 4)
    forget = gradient(model, FORGET, targets(FORGET))
    found = profile(model, retain=MANY, probes={"probe": probe}).risk_row_spread
    assert found.dims == ("risk", "risk_row") and found.shape == (3, len(MANY))
    for risk, rows in (("retain", MANY), ("probe", probe)):
        along = torch.stack([gradient(model, [row], targets(rows)) @ forget for row in rows])
        spread = ((along - along.mean()) / (forget @ forget)).numpy()
        spread = np.pad(spread * intervals.stretch(len(rows)), (0, len(MANY) - len(rows)))
        np.testing.assert_allclose(found.sel(risk=risk), spread, rtol=1e-8, atol=1e-12)
    assert not found.sel(risk="unlearn").values.any()


def test_an_interval_is_that_of_drawing_both_data_sets_anew(model):
    """The reference is a bootstrap of `-<sum_i w_i g_i, sum_j v_j r_j>`, a gradient a row: `ga`."""
    n, m = 8 * len(FORGET), 8 * len(MANY)
    of_forget = torch.stack([gradient(model, [row], 8 * targets(FORGET)) for row in FORGET])
    of_retain = torch.stack([gradient(model, [row], 8 * targets(MANY)) for row in MANY])
    products = np.tile(-(of_forget @ of_retain.T).numpy(), (8, 8))
    rng = np.random.default_rng(7)
    draws = np.array(
        [
            (1 + (rng.multinomial(n, [1 / n] * n) - 1) * intervals.stretch(n))
            @ products
            @ (1 + (rng.multinomial(m, [1 / m] * m) - 1) * intervals.stretch(m))
            for _ in range(4000)
        ]
    )
    result = profile(model, forget=FORGET * 8, retain=MANY * 8, objectives=["ga"])
    result = result.sel(objective="ga", risk="retain")
    low, high = float(result.g_effect_low), float(result.g_effect_high)
    expected = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(high - low, np.ptp(expected), rtol=0.1)
    np.testing.assert_allclose([low, high], expected, atol=0.1 * np.ptp(expected))


@pytest.mark.parametrize(("n", "factor"), [(3, 4.303), (6, 2.571), (12, 2.201), (40, 2.023)])
def test_few_rows_are_stretched_by_student(n, factor):
    """The reference is quantiles of Student's distribution from tables."""
    assert intervals.stretch(n) == pytest.approx(factor / 1.96 * (n / (n - 1)) ** 0.5, rel=0.04)
    assert np.isnan(intervals.stretch(1))


def test_intervals_of_what_is_known_cover_it():
    """Of 200 data sets of 12 rows from a known distribution, 95 % or more cover the truth."""
    rng = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(200):
        rows = np.stack([-rng.gamma(4, 1, 12), -rng.gamma(2, 0.5, 12)])[None] / 12
        rows[:, 0] *= np.sqrt(np.abs(rows[:, 0].sum()))  # a product with itself
        found = intervals.effect_intervals(rows, ["forget"] * 12, [np.zeros(8)])
        low, high = found["g_effect_low"][1][0], found["g_effect_high"][1][0]
        truth = np.array([-(4**1.5), -1.0])
        hits[:2] += (low <= truth) & (truth <= high)
        ratio = truth[1] / truth[0]
        hits[2] += found["collateral_low"][1][0] <= ratio <= found["collateral_high"][1][0]
    assert (hits / 200 >= 0.9).all()


def test_rows_of_each_data_set_are_drawn_by_themselves():
    weights = intervals.row_weights(["forget"] * 5 + ["retain"] * 7)
    counts = 1 + (weights - 1) / np.repeat([intervals.stretch(5), intervals.stretch(7)], [5, 7])
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    np.testing.assert_allclose(counts[:, :5].sum(1), 5)
    np.testing.assert_allclose(counts[:, 5:].sum(1), 7)
    assert len(np.unique(counts.round(), axis=0)) > 900
    np.testing.assert_array_equal(weights, intervals.row_weights(["forget"] * 5 + ["retain"] * 7))


def test_the_same_rows_tell_apart_what_their_intervals_do_not(model):
    """Two objectives that differ by a tenth on every row differ, however unlike the rows are."""
    rows = -np.random.default_rng(0).gamma(1, 1, 20)
    x, y = rows - rows.mean(), 1.1 * (rows - rows.mean()) + 0.01
    zero = np.zeros(1)
    assert told_apart(rows.sum(), 1.1 * rows.sum() - 2, 0, 0, x, x)
    assert not told_apart(rows.sum(), 1.1 * rows.sum(), 0, 0, x, 3 * y)
    assert not told_apart(1.0, 1.5, 0, 0, zero + np.nan, zero)  # one row gives no interval


def test_spreads_are_the_deviation_of_the_draws(model):
    """The closed form that comparisons use has the width of the intervals, to first order."""
    result = profile(model, forget=FORGET * 20, retain=RETAIN * 20)
    deviation = np.sqrt(np.square(effect_spreads(result)).sum(-1))
    half = (result.g_effect_high - result.g_effect_low).values / 2
    np.testing.assert_allclose(half, 1.96 * deviation, rtol=0.15)
    shuffled = result.transpose(..., "risk").isel(sample=slice(None, None, -1))
    np.testing.assert_allclose(
        np.sqrt(np.square(effect_spreads(shuffled)).sum(-1)), deviation, rtol=1e-9
    )
    assert isinstance(result, xr.Dataset)
