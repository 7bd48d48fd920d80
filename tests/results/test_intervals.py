"""Intervals by the choice of rows: what they cover, what they are of, and where there are none."""

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


def test_the_rows_of_a_risk_are_measured_exactly(model):
    """`<grad R_j, G> / <G, G>`, by one backward a row, scaled and centred as the formula says."""

    def gradient(rows, total):
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

    forget = gradient(FORGET, targets(FORGET))
    along = torch.stack([gradient([row], targets(RETAIN)) @ forget for row in RETAIN]).numpy()
    spread = (along - along.mean()) / float(forget @ forget)
    spread = spread * intervals.stretch(5) / intervals.stretch(8)
    found = profile(model).risk_row_spread.sel(risk="retain").values
    np.testing.assert_allclose(found, [*spread, 0, 0, 0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("n", "factor"), [(3, 4.303), (6, 2.571), (12, 2.201), (40, 2.023)])
def test_few_rows_are_stretched_by_student(n, factor):
    """Quantiles of Student's distribution from tables."""
    assert intervals.stretch(n) == pytest.approx(factor / 1.96 * (n / (n - 1)) ** 0.5, rel=0.04)
    assert np.isnan(intervals.stretch(1))


def test_intervals_of_what_is_known_cover_it():
    """Of 200 data sets of 12 rows from a known distribution, 95 % or more hold the truth."""
    rng = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(200):
        rows = np.stack([-rng.gamma(4, 1, 12), -rng.gamma(2, 0.5, 12)])[None] / 12
        rows[:, 0] *= np.sqrt(np.abs(rows[:, 0].sum()))  # a product with itself
        found = intervals.effect_intervals(rows, ["forget"] * 12, np.zeros((2, 8)))
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
    assert not told_apart(1.0, 1.5, 0, 0, zero + np.nan, zero)  # of one row nothing is known


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
