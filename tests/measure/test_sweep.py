"""Sweeps: the numbers of single profiles, under the values they belong to; the Pareto front."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, samples

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.objectives import GA, KL, NPO

SWEPT = [
    "wga(alpha=0.5:2:4)",
    "npo(beta=0.1:10:3,log) + 0.5*kl",
    "ga + 0.5:1:2*nll",
    "wtnpo(1:2:2, 3:4:2)",
    "ga",
]


@pytest.fixture(scope="module")
def study():
    return {
        "model": build("llama"),
        "tokenizer": None,
        "forget": samples([7, 4, 9], 1, 2),
        "retain": samples([6, 8], 2, 2),
        "reference_model": build("llama", seed=1),
    }


@pytest.fixture(scope="module")
def result(study):
    return gf.sweep(**study, objectives=SWEPT)


def test_its_numbers_are_those_of_each_objective_alone(study, result):
    assert result.sizes["objective"] == 4 + 3 + 2 + 4 + 1
    assert result.g_effect.dims == ("objective", "risk", "sample")
    for label in result.objective.values:
        alone = gf.profile(**study, objectives=[str(label)], resolve=("sample",))
        here = result.sel(objective=[label])
        rows = alone.sizes["sample"]  # the retain rows are left out where the objective reads none
        assert not here.g_effect[..., rows:].any()
        scale = float(np.abs(alone.g_effect).max())
        np.testing.assert_allclose(
            here.g_effect[..., :rows], alone.g_effect, rtol=1e-5, atol=1e-6 * scale
        )
        np.testing.assert_allclose(here.loss, alone.loss, rtol=1e-6)


def test_objectives_are_found_by_text_and_by_value(result):
    assert list(dict.fromkeys(result.sweep.values)) == SWEPT
    found = {str(name) for name in result.coords if str(name).startswith("hyper_")}
    assert found == {"hyper_alpha", "hyper_beta", "hyper_nll_coefficient"}
    of = {str(o): result.sel(objective=o) for o in result.objective.values}
    one = of["wga(alpha=1.5)"]
    assert float(one.hyper_alpha) == 1.5 and np.isnan(one.hyper_beta)
    one = of["wtnpo(beta=2, alpha=3)"]
    assert (float(one.hyper_beta), float(one.hyper_alpha)) == (2, 3)
    assert float(of["ga + 0.5*nll"].hyper_nll_coefficient) == 0.5
    assert np.isnan([of["ga"].hyper_alpha, of["ga"].hyper_beta]).all()
    line = result.where(result.sweep == SWEPT[0], drop=True).swap_dims(objective="hyper_alpha")
    assert list(line.hyper_alpha.values) == [0.5, 1, 1.5, 2]


def test_the_front_comes_with_it(result):
    assert result.pareto.dtype == bool and result.pareto.any()
    xr.testing.assert_equal(result.pareto, gf.pareto_front(result))


def test_an_objective_of_several_ranges_appears_once_and_belongs_to_the_first(study):
    texts = ["wga(alpha=1)", "npo", "wga(alpha=0:2:3)", "wga(alpha=1:3:3)", "npo(beta=0.1)"]
    found = gf.sweep(**study, objectives=texts, norms=False)
    expected = {
        "wga(alpha=1)": (texts[2], 1),
        "npo": ("npo", np.nan),
        "wga(alpha=0)": (texts[2], 0),
        "wga(alpha=2)": (texts[2], 2),
        "wga(alpha=3)": (texts[3], 3),
    }
    assert list(found.objective.values) == list(expected)
    for label, (text, alpha) in expected.items():
        one = found.sel(objective=label)
        assert one.sweep == text
        np.testing.assert_equal(float(one.hyper_alpha), alpha)


def test_objects_and_one_string_are_taken(study):
    listed = gf.sweep(**study, objectives=[NPO(0.1) + KL(), "wga(1:2:2),ga"], norms=False)
    joined = gf.sweep(**study, objectives="npo(0.1)+kl, wga(1:2:2), ga", norms=False)
    xr.testing.assert_equal(listed, joined)
    assert list(listed.sweep.values) == ["npo(beta=0.1) + kl", "wga(1:2:2)", "wga(1:2:2)", "ga"]


def test_it_is_called_as_profile_is():
    ours, theirs = (inspect.signature(f).parameters for f in (gf.sweep, gf.profile))
    assert list(ours) == list(theirs)
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"resolve"} and ours["resolve"].default == ("sample",)
    with pytest.raises(TypeError, match="forget"):
        gf.sweep(None, None, retain=[], objectives="ga")
    with pytest.raises(InputError, match="unknown field 'resolv'; did you mean 'resolve'"):
        gf.sweep(None, None, forget=[], retain=[], objectives="ga", resolv="group")


@pytest.mark.parametrize(
    ("objectives", "line"),
    [
        ([], "the list is empty"),
        (GA(), "got ga; give a list"),
        (3, "got 3; give a list"),
        ([3], "objective 3 must be a string"),
        (["wga(1:2:2)", " wga(1:2:2)"], r"'wga\(1:2:2\)' is listed twice; leave one out"),
        (["ga,ga"], "'ga' is listed twice"),
    ],
)
def test_lists_that_are_none(study, objectives, line):
    with pytest.raises(InputError, match=line):
        gf.sweep(**study, objectives=objectives)


def test_a_sweep_stays_in_memory(study, tmp_path):
    with pytest.raises(InputError, match="out: the result of a sweep is held in memory"):
        gf.sweep(**study, objectives="ga", out=tmp_path / "x.nc", resolve=("sample", "position"))


# ---- the front ----

few = st.sampled_from([-2.0, -1.0, 0.0, 1.0, np.nan, np.inf, -np.inf])
points = st.lists(
    st.tuples(*[few | st.integers(-64, 64).map(lambda i: i / 16)] * 2), min_size=1, max_size=12
)


def effects(points):
    e_u, e_r = np.array(points, dtype=float).T
    total = np.stack([e_u, np.zeros_like(e_u), e_r], axis=1)
    shares = np.stack([total / 4, 3 * total / 4], axis=2)
    return xr.Dataset(
        {"g_effect": (("objective", "risk", "sample"), shares)},
        {"objective": [f"o{i}" for i in range(len(e_u))], "risk": ["unlearn", "probe", "retain"]},
    )


@settings(max_examples=300, deadline=None)
@given(points)
def test_the_front_is_what_nothing_dominates(points):
    def beats(a, b):
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    sound = [p for p in points if np.isfinite(p).all()]
    expected = [
        # of several values in one place, the first is listed
        p in sound and p not in points[:i] and not any(beats(other, p) for other in sound)
        for i, p in enumerate(points)
    ]
    front = gf.pareto_front(effects(points))
    assert front.name == "pareto" and front.dims == ("objective",) and front.dtype == bool
    assert list(front.values) == expected
