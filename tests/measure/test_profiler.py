"""A prepared profiler serves a model whose weights change as a new one would."""

from __future__ import annotations

import copy

import pytest
import torch
import xarray as xr
from models import build, samples

import geffect_fast as gf
from geffect_fast.errors import NonFiniteError
from geffect_fast.measure import prepare
from geffect_fast.measure import profiler as profiler_module
from geffect_fast.measure.profiler import Profiler

DATA = {"forget": samples([5, 9, 3], 1), "retain": samples([7, 4], 2)}
OBJECTIVES = ["ga", "npo(beta=0.5) + kl", "rmu(layer=1)"]


def moved(model):
    """The model after a change of every weight, in place."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(1 + 0.05 * (i % 3))
    return model


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("objectives", [OBJECTIVES, ["npo(beta=0.5)"]], ids=["kept", "let_go_of"])
def test_measured_again_a_changed_model_has_the_numbers_of_a_new_profile(engine, objectives):
    model = build("llama", torch.float64)
    reference = copy.deepcopy(model)
    given = DATA | {"objectives": objectives, "reference_model": reference, "engine": engine}
    given["resolve"] = ("sample",)
    profiler = Profiler.of(model, None, **given)
    first = profiler.measure()
    xr.testing.assert_equal(first.dataset, gf.profile(model, None, **given))
    again = profiler.measure().dataset
    xr.testing.assert_equal(again, first.dataset)
    moved(model)
    later = profiler.measure().dataset
    xr.testing.assert_equal(later, gf.profile(model, None, **given))
    assert abs(later.risk_value - first.dataset.risk_value).min() > 1e-3


def test_the_directions_are_the_gradients_of_the_risks():
    model = build("llama", torch.float64)
    profiler = Profiler.of(model, None, **DATA, objectives=["ga"])
    found = profiler.measure()
    assert profiler.risk_names == ["unlearn", "retain"]
    squares = sum(v.flatten(1).square().sum(1) for v in found.directions.values())
    torch.testing.assert_close(
        squares.sqrt(), torch.from_numpy(found.dataset.risk_grad_norm.values), rtol=1e-12, atol=0
    )
    values, directions = profiler.risk_gradients()
    assert torch.equal(values, torch.from_numpy(found.dataset.risk_value.values))
    assert all(torch.equal(directions[name], v) for name, v in found.directions.items())


def test_a_profile_searches_the_weights_for_nan_once(monkeypatch):
    searched = []
    for module in (prepare, profiler_module):
        monkeypatch.setattr(module, "check_finite", lambda model, *_: searched.append(model))
    model = build("llama")
    gf.profile(model, None, **DATA, objectives=["ga"])
    assert searched == [model]


def test_weights_that_became_nan_are_named():
    model = build("llama")
    profiler = Profiler.of(model, None, **DATA, objectives=["ga"])
    profiler.measure()
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model: model\.embed_tokens\.weight holds 1 NaN"):
        profiler.measure()
