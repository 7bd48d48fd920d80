"""Effects at the original model beside changes of measures: reading, comparing, refusing."""

import numpy as np
import pytest
import xarray as xr
from step_results import step_dataset

import geffect_fast as gf
from geffect_fast.errors import InputError

OBJECTIVES = ("ga", "wga(alpha=1)", "npo(beta=0.1)", "gd", "ga + kl", "tnpo(beta=1)")


def results(n=6, **more):
    return {
        f"run {i}": step_dataset((objective,), seed=i, n_steps=3, every=2, **more)
        for i, objective in enumerate(OBJECTIVES[:n])
    }


def measures(names, values, metrics=("probability",)):
    """Measures of the original, all 1, and of the runs' models: `values` (run, metric, set)."""
    models = ["original", *names]
    table = np.concatenate([np.ones((1, *values.shape[1:])), values])
    return xr.Dataset(
        {
            "value": (("model", "metric", "set"), table),
            "value_low": (("model", "metric", "set"), table),
            "value_high": (("model", "metric", "set"), table),
            "sample_value": (
                ("model", "metric", "sample"),
                np.ones((len(models), len(metrics), 2)),
            ),
        },
        {
            "model": models,
            "metric": list(metrics),
            "statistic": ("metric", ["mean"] * len(metrics)),
            "set": ["forget", "retain"],
        },
    )


def random_measures(runs, seed=0):
    return measures(runs, np.random.default_rng(seed).random((len(runs), 1, 2)))


def test_effects_are_those_of_the_trained_objective_at_step_0():
    runs = results()
    found = gf.against_effects(runs, random_measures(runs))
    assert found["run"].values.tolist() == [*runs]
    assert found["objective"].values.tolist() == [*OBJECTIVES]
    for name, run in runs.items():
        first = run.isel(step=0, objective=0)
        totals = first.g_effect.sum(["parameter", "sample"])
        own = found.effect.sel(run=name)
        for risk, predictor in (("unlearn", "e_u"), ("retain", "e_r")):
            assert float(own.sel(predictor=predictor)) == float(totals.sel(risk=risk))
        e_u, e_r = (float(totals.sel(risk=r)) for r in ("unlearn", "retain"))
        wanted = e_r / e_u if e_u < 0 else np.nan
        got = float(own.sel(predictor="collateral"))
        assert got == pytest.approx(wanted, nan_ok=True)
        assert float(own.sel(predictor="cosine_u")) == float(first.cosine.sel(risk="unlearn"))
        second = run.isel(step=1)
        assert float(own.sel(predictor="update_r")) == float(
            second.predicted_update.sel(risk="retain")
        )
    assert "sgd_u" not in found["predictor"].values, "all learned at one rate"


def test_further_effects_that_runs_hold_are_predictors_too():
    """Any effect is a predictor under its own name, such as one that knows the optimizer."""
    runs = results()
    for i, name in enumerate(runs):
        effect = runs[name]["g_effect"] * (i + 2)
        runs[name] = runs[name].assign(adam_effect=effect)
    found = gf.against_effects(runs, random_measures(runs))
    for i, name in enumerate(runs):
        own = found.effect.sel(run=name)
        assert float(own.sel(predictor="adam_effect_u")) == pytest.approx(
            (i + 2) * float(own.sel(predictor="e_u"))
        )


def test_what_not_all_runs_have_is_left_out():
    runs = results()
    runs["run 2"] = runs["run 2"].drop_vars("cosine").isel(step=[0, 2])
    found = gf.against_effects(runs, random_measures(runs))
    assert found["predictor"].values.tolist() == ["e_u", "e_r", "collateral"]


def test_learning_rates_that_differ_bring_the_step_that_they_predict():
    runs = results()
    runs["run 1"] = runs["run 1"].assign(learning_rate=runs["run 1"].learning_rate * 2)
    found = gf.against_effects(runs, random_measures(runs))
    for name, run in runs.items():
        wanted = float(run.predicted_sgd.isel(step=1).sel(risk="unlearn"))
        assert float(found.effect.sel(run=name, predictor="sgd_u")) == wanted


def test_changes_are_from_the_original_and_what_predicts_them_is_found():
    runs = results()
    alone = gf.against_effects(runs, random_measures(runs)).effect
    e_u = alone.sel(predictor="e_u").values.round(5)  # ga and ga + kl nearly agree
    values = np.stack([1 + e_u**3, 1 - np.arange(6)[[2, 0, 4, 5, 1, 3]]], axis=-1)[:, None]
    given = measures(runs, values)
    found = gf.against_effects(runs, given)
    np.testing.assert_allclose(found.change.sel(set="forget").values[:, 0], e_u**3, rtol=1e-9)
    best = found.sel(metric="probability", set="forget", predictor="e_u")
    assert float(best.spearman) == pytest.approx(1) and bool(best.beyond_noise)
    assert int(best.n_runs) == 6 and float(best.p_value) < 0.01
    xr.testing.assert_identical(found[["value", "sample_value"]], given[["value", "sample_value"]])


def test_effects_that_differ_by_rounding_are_tied():
    """Effects of ga and ga + kl at the original model agree: rounding errors give no order."""
    runs = results()
    for name in runs:
        factor = 1 + 1e-7 * float(name[-1])
        runs[name] = runs["run 0"].assign(g_effect=runs["run 0"].g_effect * factor)
    found = gf.against_effects(runs, random_measures(runs))
    assert found.effect.sel(predictor="e_u").std() > 0
    assert found.spearman.sel(predictor=["e_u", "e_r"]).isnull().all()


def test_of_fewer_than_five_runs_no_correlation_is_given():
    runs = results(4)
    found = gf.against_effects(runs, random_measures(runs))
    assert found.spearman.isnull().all() and not found.beyond_noise.any()
    assert found.change.notnull().all() and found.effect.sel(predictor="e_u").notnull().all()


def without_original(runs):
    return random_measures(runs).sel(model=[*runs])


REFUSED = {
    "one run": (lambda r: {"a": r["run 0"]}, random_measures, "got 1 run; give two or more"),
    "no steps": (
        lambda r: r | {"run 0": r["run 0"].isel(step=0)},
        random_measures,
        "run 0 is not the result of a training on one objective",
    ),
    "begun later": (
        lambda r: r | {"run 0": r["run 0"].isel(step=[1, 2])},
        random_measures,
        "run 0 begins at step 2",
    ),
    "checkpoints": (
        lambda r: r | {"run 0": step_dataset(("ga",), trained=False)},
        random_measures,
        "give runs of unlearn",
    ),
    "another risk": (
        lambda r: r | {"run 1": r["run 1"].assign_attrs(risk="ga")},
        random_measures,
        "against_effects: run 0 has risk",
    ),
    "other rows": (
        lambda r: r | {"run 1": r["run 1"].assign_attrs(digests='{"forget": "x"}')},
        random_measures,
        "the forget rows of run 0 are not those of run 1",
    ),
    "no original": (lambda r: r, without_original, "lack model original"),
    "one model": (
        lambda r: r,
        lambda r: random_measures(r).isel(model=0),
        "the measures are of one model",
    ),
    "effects that are NaN": (
        lambda r: r | {"run 1": r["run 1"].assign(g_effect=r["run 1"].g_effect * np.nan)},
        random_measures,
        "effects of run 1 are not finite",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_compared_is_refused(wrong):
    change, measured, message = REFUSED[wrong]
    runs = results()
    for name, run in runs.items():
        runs[name] = run.assign_attrs(digests='{"forget": "f"}')
    changed = change(runs)
    with pytest.raises(InputError, match=message):
        gf.against_effects(changed, measured(changed))
