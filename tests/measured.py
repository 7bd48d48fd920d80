"""Measures of every kind without a model, for tests of reports."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr
from step_results import step_dataset

import geffect_fast as gf

METRICS = {"probability": "mean", "truth_ratio": "mean", "min_k(k=0.2)": "AUC"}
KINDS = ("one", "several", "steps", "control", "relearn", "survey", "against")
STUDY = {
    "ga": "ga",
    "npo": "npo(beta=0.1)",
    "$\\frac{$": "wga(alpha=1)",
    "gd": "gd",
    "tnpo": "tnpo(beta=1)",
    "kl": "ga + kl",
}
"""Objectives of the runs that are compared with effects, by the runs' names."""


def measures(seed=0, sets=("forget", "retain"), metrics=METRICS, questions=None):
    """The result of `evaluate` for one model: membership has no number of retain, and no bounds."""
    draw, names = np.random.default_rng(seed), list(metrics)
    value = draw.uniform(0.1, 0.9, (len(names), len(sets)))
    half = draw.uniform(0.01, 0.09, value.shape)
    for m, name in enumerate(names):
        if name.startswith("min_k"):
            value[m, 1:], half[m] = np.nan, np.nan
    n, both = 6, ("metric", "set")
    asked = [f"who wrote book {i}?" for i in range(n)] if questions is None else questions
    return xr.Dataset(
        {
            "value": (both, value),
            "value_low": (both, value - half),
            "value_high": (both, value + half),
            "sample_value": (("metric", "sample"), draw.uniform(0, 1, (len(names), 2 * n))),
        },
        {
            "metric": names,
            "statistic": ("metric", list(metrics.values())),
            "set": list(sets),
            "sample": np.tile(np.arange(n), 2),
            "sample_set": ("sample", np.repeat(sets, n)),
            "question": ("sample", [*asked, *asked]),
        },
        {
            "metrics": json.dumps(
                [{"name": name, "parameters": {}, "about": f"What {name} is."} for name in names]
            ),
            "n_rows": json.dumps(dict.fromkeys(sets, n)),
            "interval_level": 0.95,
            "versions": json.dumps({"torch": "2"}),
            "created": "2026-01-02T03:04:05+00:00",
        },
    )


def along(axis, places, found):
    return xr.concat(found, xr.DataArray(places, dims=axis, name=axis), combine_attrs="override")


def assessed(base):
    """Measures with all parts of the survey's assessment; the first model has no cost."""
    draw, along = np.random.default_rng(5), ("model", "relearned_step")
    relearned = draw.uniform(0.1, 0.9, (3, 2, 1, 2))
    axes, both = (*along, "relearned_metric", "relearned_set"), ("objective", "risk")
    effect = np.array([[-1.5, 0.5], [-2.5, -0.25]])
    return (
        base.assign(
            relearned=(axes, relearned),
            relearned_low=(axes, relearned - 0.05),
            relearned_high=(axes, relearned + 0.05),
            seconds=("model", [np.nan, 12.5, 0.25]),
            peak_memory=("model", [np.nan, 3.0 * 2**20, 2.0**30]),
            touched=("model", [0.0, 0.5, np.nan]),
            effect=(both, effect),
            effect_low=(both, effect - 0.1),
            effect_high=(both, effect + 0.1),
        )
        .assign_coords(
            relearned_step=[0, 4],
            relearned_metric=["probability"],
            relearned_set=["relearned", "others"],
            objective=["npo", "gd"],
            risk=["e_u", "e_r"],
            trained_on=("model", ["", "npo", ""]),
        )
        .assign_attrs(
            suite="survey",
            relearning=json.dumps({"steps": 4, "n_rows": 2}),
            survey_notes=json.dumps(["Of ga nobody knows the cost."]),
            original="/models/ga",
            original_place="ga",
        )
    )


def against(n=6, **more):
    """Measures of an original and of the first `n` of `STUDY`, set against effects."""
    runs = {
        name: step_dataset((objective,), seed=i, n_steps=3, every=2)
        for i, (name, objective) in enumerate([*STUDY.items()][:n])
    }
    found = [measures(i, **more) for i in range(n + 1)]
    both = gf.against_effects(runs, along("model", ["original", *runs], found))
    return both.assign(effect_low=both["effect"] - 0.01, effect_high=both["effect"] + 0.01)


def measured(kind, **more):
    """Measures of a kind of `KINDS`."""
    if kind == "one":
        return measures(**more)
    if kind == "several":
        return along("model", ["ga", "npo", "$\\frac{$"], [measures(i, **more) for i in range(3)])
    if kind == "steps":
        return along("step", [0, 5, 10], [measures(i, **more) for i in range(3)])
    if kind == "relearn":
        own = dict(sets=("relearned", "others"), **more)
        found = [
            along("step", [0, 2, 4], [measures(3 * m + i, **own) for i in range(3)])
            for m in range(2)
        ]
        return along("model", ["unlearned", "original"], found).assign_attrs(command="relearn")
    if kind == "against":
        return against(**more)
    if kind == "survey":
        return assessed(measured("several", **more))
    alphas = [0.0, 0.25, 0.3125, 0.5, 0.75, 1.0]
    kept = np.array([[0.8, 0.79, np.nan, 0.6, 0.65, 0.2], [0.8, 0.7, 0.69, 0.5, 0.4, 0.1]])
    curve = ("model", "alpha")
    base = along("model", ["ga", "npo"], [measures(i, **more) for i in range(2)])
    return (
        base.assign(
            retention=(curve, kept),
            retention_low=(curve, kept - 0.05),
            retention_high=(curve, kept + 0.05),
            alpha_chosen=("model", [0.25, 0.25]),
            alpha_lost=("model", [0.5, 0.3125]),
            monotone=("model", [False, True]),
            original_value=measures(7, **more)["value"],
            unlearned_value=base["value"] / 2,
        )
        .assign_coords(alpha=alphas, on_grid=("alpha", [True, True, False, True, True, True]))
        .assign_attrs(
            command="control",
            control=json.dumps(
                {"metric": "probability", "set": "retain", "tau": 0.7, "tolerance": 0.1, "grid": 4}
            ),
        )
    )
