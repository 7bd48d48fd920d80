"""A report's numbers: shares and totals add up, verdicts follow the signs, NaN is always shown."""

import csv
import math

import numpy as np
import pytest
from synthetic import make_dataset

from geffect_fast.report.summary.effects import by_place, by_sample, shares, total
from geffect_fast.report.summary.objectives import summarise, write_summary
from geffect_fast.results.by_rows import sum_positions


def with_effects(*pairs):
    """A result whose objectives have these (e_u, e_r) in total."""
    dataset = make_dataset(objectives=tuple(f"o{i}" for i in range(len(pairs))))
    dataset["g_effect"][:] = 0
    dataset["g_effect"][:, :, 3, 1] = np.array(pairs) / 2
    dataset["g_effect"][:, :, 4, 2] = np.array(pairs) / 2
    return dataset


@pytest.mark.parametrize(
    ("e_u", "e_r", "verdict", "collateral"),
    [
        (-2.0, 1.0, "forgets, spares", -0.5),
        (-2.0, 0.0, "forgets, spares", 0.0),
        (-2.0, -0.1, "forgets, little harm", 0.05),
        (-2.0, -1.0, "forgets, some harm", 0.5),
        (-2.0, -2.0, "mostly harm", 1.0),
        (-2.0, -6.0, "mostly harm", 3.0),
        (2.0, 1.0, "does not forget", math.nan),
        (0.0, 1.0, "does not forget", math.nan),
        (0.0, 0.0, "no effect", math.nan),
        (-1e-9, 1e-9, "no effect", math.nan),
        (math.nan, 1.0, "undefined (NaN)", math.nan),
        (-2.0, math.nan, "undefined (NaN)", math.nan),
        (-math.inf, 1.0, "undefined (NaN)", math.nan),
    ],
)
def test_verdicts(e_u, e_r, verdict, collateral):
    row = summarise(with_effects((e_u, e_r), (-3.0, 0.5)).drop_vars("cosine"))[0]
    assert row.verdict == verdict
    assert row.collateral == pytest.approx(collateral, nan_ok=True)
    assert row.forgets == (not math.isnan(collateral))  # "mostly harm" forgets too
    assert row.effects["unlearn"] == pytest.approx(e_u, nan_ok=True)


def test_a_gradient_nearly_orthogonal_to_the_risks_hardly_forgets():
    dataset = with_effects((-2.0, 1.0), (-2.0, 1.0), (2.0, 1.0))
    dataset["cosine"][:, 0] = [-0.05, -0.2, 0.05]
    rows = summarise(dataset)
    assert [row.verdict for row in rows] == ["hardly forgets", "forgets, spares", "does not forget"]
    assert [row.forgets for row in rows] == [False, True, False]


def test_collateral_is_that_of_the_worst_other_risk():
    dataset = make_dataset(risks=("unlearn", "retain", "general"))
    dataset["g_effect"][:] = 0
    dataset["g_effect"][:, :, 0, 0] = [-1.0, 0.25, -0.5]
    assert {row.collateral for row in summarise(dataset)} == {0.5}


def test_a_run_without_any_effect():
    assert [row.verdict for row in summarise(with_effects((0.0, 0.0)))] == ["no effect"]


VIEWS = [
    ("parameter", "sample"),
    ("parameter",),
    ("sample",),
    (),
    ("group",),
    ("group", "sample"),
    ("parameter", "position"),
    ("group", "sample", "position"),
    ("sample", "token"),
    ("group", "sample", "token"),
]


@pytest.mark.parametrize("resolve", VIEWS, ids=str)
def test_every_view_adds_up_to_the_total(resolve):
    dataset = make_dataset(resolve=resolve)
    expected = make_dataset().g_effect.sum(["parameter", "sample"]).values
    np.testing.assert_allclose(total(dataset), expected, rtol=1e-12)
    if {"parameter", "group"} & set(resolve):
        for blocks in (True, False):
            np.testing.assert_allclose(by_place(dataset, blocks)[1].sum(-1), expected, rtol=1e-12)
        assert by_place(dataset, False)[0] == by_place(make_dataset(), False)[0]
    else:
        assert by_place(dataset, True) is None
    if "sample" in resolve:
        forget = make_dataset().g_effect[..., :12].sum(["parameter", "sample"])
        found = by_sample(sum_positions(dataset))
        np.testing.assert_allclose(found.sum("sample"), forget, rtol=1e-12)
    else:
        assert by_sample(dataset) is None


def test_places_run_from_input_to_output():
    dataset = make_dataset(n_blocks=11)
    shuffled = dataset.isel(parameter=np.random.default_rng(0).permutation(36)[:35])
    assert by_place(dataset, True)[0] == [
        "embedding",
        *map(str, range(11)),
        "final_norm",
        "lm_head",
    ]
    assert by_place(dataset, False)[0] == [
        "embedding",
        "shallow",
        "middle",
        "deep",
        "final_norm",
        "lm_head",
    ]
    assert by_place(shuffled, True)[0] == by_place(dataset, True)[0]


def test_a_nan_in_one_sample_is_a_nan_in_the_total(dataset):
    dataset["g_effect"][1, 0, 3, 2] = np.nan
    assert np.isnan(total(dataset))[1, 0] and np.isnan(total(dataset)).sum() == 1
    labels, values = by_place(dataset, True)
    assert np.isnan(values[1, 0]).tolist() == [label == "0" for label in labels]


def test_shares_are_signed_and_their_sizes_add_to_one():
    got = shares(np.array([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0], [np.nan, 1.0, 1.0]]))
    np.testing.assert_array_equal(got[:2], [[0.25, -0.75, 0.0], [0.0, 0.0, 0.0]])
    assert np.isnan(got[2]).all()


def test_the_csv_holds_what_the_summary_says(tmp_path, dataset):
    write_summary(dataset, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["objective"] for row in rows] == list(dataset.objective.values)
    for row, summary in zip(rows, summarise(dataset), strict=True):
        assert float(row["g_effect_retain"]) == summary.effects["retain"]
        assert float(row["cosine_unlearn"]) == summary.cosines["unlearn"]
        assert row["verdict"] == summary.verdict


def test_the_csv_without_norms(tmp_path, dataset):
    write_summary(dataset.drop_vars("cosine"), tmp_path / "summary.csv")
    assert "cosine" not in (tmp_path / "summary.csv").read_text()
