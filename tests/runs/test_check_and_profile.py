"""`check` and `profile` agree on every model, wrapper and number of rows."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from models import build, samples
from wrapped_cases import ADAPTERS, REFUSED, WRAPPED

import geffect_fast as gf
from geffect_fast.errors import GEffectError
from geffect_fast.report.check_table import verdict

NUMBERS_OF_ROWS = (1, 3, 6)
MODELS = {name: (lambda name=name: build(name)) for name in ARCHITECTURES}
MODELS |= {
    name: (lambda case=case: case.build(torch.float32))
    for name, case in (ADAPTERS | WRAPPED).items()
}


def rows(n):
    """Short, of two lengths; labels on all but the prompt."""
    return samples([4, 5, 4, 4, 5, 4][:n], 1)


def profiled(model, n):
    return gf.profile(model, None, forget=rows(n), retain=rows(n), objectives=["ga"])


def checked(model, n):
    return gf.check(model, None, data=rows(n), samples=n)


@pytest.mark.parametrize("name", MODELS)
def test_both_serve_it(name):
    model = MODELS[name]()
    for n in NUMBERS_OF_ROWS:
        result, found = profiled(model, n), checked(model, n)
        assert found.exact, verdict(found)
        assert result.attrs["layout"] == found.layout
        assert result.attrs["covered_parameters"] == found.coverage.covered_parameters


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_it(name):
    model = REFUSED[name][0](torch.float32)
    for n in NUMBERS_OF_ROWS:
        with pytest.raises(GEffectError) as of_profile:
            profiled(model, n)
        with pytest.raises(GEffectError) as of_check:
            checked(model, n)
        assert str(of_profile.value) == str(of_check.value)
