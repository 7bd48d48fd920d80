"""Reports name two objectives different only where 16 bits tell them apart."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from report_views import words_of
from step_results import step_dataset
from synthetic import make_dataset

import geffect_fast as gf
from geffect_fast.report.html.page import page_html
from geffect_fast.report.summary.findings import findings
from geffect_fast.report.summary.objectives import summarise
from geffect_fast.report.summary.run_findings import comparison_finding
from geffect_fast.report.summary.sweep import Swept
from geffect_fast.report.tables.compare import render_comparison
from geffect_fast.report.tables.profile import render_profile
from geffect_fast.report.tables.sweep import render_sweep
from geffect_fast.results.told_apart import effect_errors, told_apart

NAMES = ["ga", "npo(beta=0.1)", "gd"]


def result(e_u, e_r, error=0.01, names=NAMES, **kwargs):
    """A result with these totals, in bf16 with this `precision_error`."""
    given = {"resolve": (), "n_blocks": 1} | kwargs
    dataset = make_dataset(names, **given).drop_vars(["cosine", "grad_norm", "risk_grad_norm"])
    dataset["g_effect"][:, 0], dataset["g_effect"][:, 1] = e_u, e_r
    stated = {"precision_error": error, "precision_samples": [0, 6]} if error else {}
    return dataset.assign_attrs(dtype="bfloat16", **stated)


def test_the_least_cost_is_shared_by_what_is_no_different():
    # Collaterals 0.30, 0.305 and 0.60; each may be off by 2 % of itself.
    found = findings(result([-1, -1, -1], [-0.30, -0.305, -0.60]))[0]
    assert "The least cost elsewhere is that of ga:" in found
    assert "; 16 bits do not tell it from npo(beta=0.1)." in found
    assert "The highest is that of gd: the retain risk rises by 0.6." in found


@pytest.mark.parametrize("e_r", [-0.31, -0.40])
def test_objectives_beyond_the_figure_are_ranked(e_r):
    found = findings(result([-1, -1, -1], [-0.30, e_r, -0.60]))[0]
    assert "The least cost elsewhere is that of ga:" in found and "do not tell" not in found


def test_nothing_is_ranked_where_all_are_within_the_figure():
    found = findings(result([-1, -1, -1], [-0.30, -0.305, -0.302]))[0]
    assert "They do so at the same cost elsewhere, as far as 16 bits tell:" in found
    assert "least" not in found


def test_of_wider_precisions_every_digit_counts():
    found = findings(result([-1, -1, -1], [-0.30, -0.30001, -0.302], error=0))[0]
    assert "The least cost elsewhere is that of ga:" in found and "16 bits" not in found


def test_effects_whose_samples_cancel_are_off_by_more():
    """Shares of +1 and -0.9 are a total of 0.1 that may be off by 1 % of 1.9."""
    dataset = result(0, 0, resolve=("sample",), n_forget=2, n_retain=0)
    dataset["g_effect"][:, 0] = [-1.0, -1.0]
    dataset["g_effect"][:, 1] = [1.0, -0.9]
    np.testing.assert_allclose(effect_errors(dataset), [[0.02, 0.019]] * 3)
    for row in summarise(dataset):
        # |d (e_r / e_u)| <= 0.019 / 2 + 0.05 * 0.02 / 2
        assert row.collateral_error == pytest.approx(0.01)


def test_told_apart_by_more_than_the_larger_error():
    assert told_apart(1.0, 1.02, 0.01, 0.019)
    assert not told_apart(1.0, 1.02, 0.01, 0.021)
    assert told_apart(1.0, 1.0 + 1e-15, 0, 0) and not told_apart(1.0, 1.0, 0, 0)


# ---- sweeps ----


@pytest.fixture
def family(swept):
    """A function that makes a sweep of one family with these totals, in bf16, with this error."""

    def make(e_u, e_r, error=0.01):
        dataset = swept([f"wga(alpha=1:{len(e_u)}:{len(e_u)})"], e_u=e_u, e_r=e_r)
        stated = {"precision_error": error, "precision_samples": [0, 6]} if error else {}
        dataset = dataset.assign_attrs(dtype="bfloat16", **stated)
        return dataset.assign(pareto=gf.pareto_front(dataset))

    return make


def test_the_front_keeps_what_is_not_told_apart_from_its_better(family):
    e_u, e_r = [-1.0, -0.995, -0.9, -0.5], [-0.2, -0.201, -0.3, -0.1]
    assert family(e_u, e_r).pareto.values.tolist() == [True, True, False, True]
    assert family(e_u, e_r, error=0).pareto.values.tolist() == [True, False, False, True]


def test_the_best_of_a_family_names_how_many_are_no_different(family):
    dataset = family([-1.0, -0.995, -0.9, -0.5], [-0.2, -0.21, -0.4, -0.39])
    (one,) = Swept.of(dataset).families
    (at, best), *_ = Swept.of(dataset).picks(one).items()
    assert at == 0
    assert best == ["strongest removal (2 alike)", "least harm", "least collateral"]
    assert "strongest removal (2 alike)" in words_of(render_sweep(dataset))
    exact = Swept.of(family([-1.0, -0.995, -0.9, -0.5], [-0.2, -0.21, -0.4, -0.39], error=0))
    assert exact.picks(one)[0] == ["strongest removal", "least harm", "least collateral"]


# ---- the places that say so ----


def test_tables_and_pages_say_the_figure():
    dataset = result([-1, -1, -1], [-0.30, -0.305, -0.60], error=0.0123)
    line = (
        "Precision: effects in 16 bits may be off by 1.2 % (thrice what float32 changes at forget "
        "row 0 and 6); objectives that differ by no more are called no different."
    )
    assert line in words_of(render_profile(dataset))
    assert line in page_html({"run": dataset})
    assert "Precision" not in words_of(render_profile(result([-1] * 3, [0] * 3, error=0)))


def test_tables_say_why_there_is_no_figure():
    dataset = result([-1] * 3, [0] * 3, error=0).assign_attrs(
        precision_note="not measured: no room"
    )
    line = "Precision of effects in 16 bits: not measured: no room."
    assert line in words_of(render_profile(dataset)) and line in page_html({"run": dataset})


def compared(rises, error):
    """Runs whose forget and retain risks rise by these numbers from 1."""
    runs: dict[str, xr.Dataset] = {}
    for i, (name, rise) in enumerate(rises.items()):
        run = step_dataset((name,), seed=i, n_steps=3, resolve=(), weights=False)
        run["risk_value"][:] = 1 + np.array([[0, 0], [0.5, 0.5], [1, 1]]) * rise
        stated = {"precision_error": error, "precision_samples": [0]} if error else {}
        runs[name] = run.assign_attrs(stated)
    both = gf.compare(runs)
    return both, comparison_finding(both)


def test_runs_that_are_compared_are_held_to_the_figure():
    rises = {"ga": (2.0, 0.500), "gd": (1.99, 0.499)}
    both, said = compared(rises, error=0.02)
    assert "All 2 runs raise the forget risk, alike as far as 16 bits tell: by 1.99 to 2." in said
    three = compared(rises | {"npo(beta=0.1)": (1.0, 0.2)}, error=0.02)[1]
    assert "ga raises the forget risk most, by 2; gd as much, as far as 16 bits tell." in three
    assert "risen alike under all, as far as 16 bits tell" in said and "least" not in said
    assert "effects in 16 bits may be off by 2 %" in words_of(render_comparison(both))
    both, said = compared(rises, error=0.0)
    assert "ga raises the forget risk most, by 2." in said and "risen least under" in said
    assert "16 bits" not in said + words_of(render_comparison(both))
    said = compared({"ga": (2.0, 0.5), "gd": (1.0, 0.9)}, error=0.02)[1]
    assert "ga raises the forget risk most, by 2." in said and "risen least under ga" in said
