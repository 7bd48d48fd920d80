"""`check` and `profile` agree on every model, wrapper and number of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES
from models import build, samples
from wrapped_cases import ADAPTERS, REFUSED, WRAPPED

import geffect_fast as gf
from geffect_fast.errors import GEffectError
from geffect_fast.report.tables.check import verdict

pytestmark = pytest.mark.slow

NUMBERS_OF_ROWS = (1, 4)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def smallest(name):
    """A row of the table with one layer, where it has two of one kind."""
    row = ARCHITECTURES[name]
    # RWKV's initial weights divide by the number of layers less one.
    alike = name != "rwkv" and not any(isinstance(v, list) for v in row.settings.values())
    fewer = {k: 1 for k in LAYERS if alike and row.settings.get(k) == 2}
    return build(replace(row, settings=row.settings | fewer))


MODELS = {name: (lambda name=name: smallest(name)) for name in ARCHITECTURES}
MODELS |= {
    name: (lambda case=case: case.build(torch.float32))
    for name, case in (ADAPTERS | WRAPPED).items()
}


def rows(n):
    """Short, of two lengths."""
    return samples([4, 5, 4, 5][:n], 1)


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


def test_norms_in_fp32_inside_fp64_are_no_missed_share():
    model = build("gemma4", torch.float64)
    for n in NUMBERS_OF_ROWS:
        profiled(model, n)
