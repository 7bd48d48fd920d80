"""`check` and `profile` agree on every kind of model and wrapper, of one row and of several."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES
from models import build, samples
from wrapped_cases import ADAPTERS, CASES, REFUSED, WRAPPED

import geffect_fast as gf
from geffect_fast.errors import GEffectError
from geffect_fast.report.tables.check import verdict

pytestmark = pytest.mark.slow

ONE, SEVERAL = 1, 4
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def smallest(name):
    """The architecture of a row with one layer, where the row has two of one kind."""
    row = ARCHITECTURES[name]
    # RWKV's initial weights divide by the number of layers less one.
    alike = name != "rwkv" and not any(isinstance(v, list) for v in row.settings.values())
    fewer = {k: 1 for k in LAYERS if alike and row.settings.get(k) == 2}
    return build(replace(row, settings=row.settings | fewer))


OF_EACH_RULE = {(row.layout, row.generic): name for name, row in ARCHITECTURES.items()}.values()
"""One architecture of every layout and set of kinds that the generic rule serves."""

MODELS = {name: (lambda name=name: smallest(name)) for name in ARCHITECTURES}
MODELS |= {name: (lambda case=case: case.build(torch.float32)) for name, case in CASES.items()}


TABLES = (ARCHITECTURES, ADAPTERS, WRAPPED)
ONE_OF_EACH = {
    (number, case.layout, bool(case.generic)): name
    for number, table in enumerate(TABLES)
    for name, case in table.items()
}.values()
"""One of every layout with and without the generic rule, of every table."""


def rows(n):
    """Short rows of two lengths."""
    return samples([4, 5, 4, 5][:n], 1)


def profiled(model, n):
    return gf.profile(model, None, forget=rows(n), retain=rows(n), objectives=["ga"])


def checked(model, n):
    return gf.check(model, None, data=rows(n), samples=n)


def both_serve(model, n):
    """The result of the check."""
    result, found = profiled(model, n), checked(model, n)
    assert found.exact, verdict(found)
    assert result.attrs["layout"] == found.layout
    assert result.attrs["covered_parameters"] == found.coverage.covered_parameters
    return found


@pytest.mark.parametrize("name", [*OF_EACH_RULE, *CASES])
def test_both_serve_it(name):
    """Both serve it by the rules of its table; `test_architectures.py` has all architectures."""
    found = both_serve(MODELS[name](), SEVERAL)
    generic = {row.kind for row in found.kinds if "generic" in row.rules}
    assert generic <= set((ARCHITECTURES | CASES)[name].generic)
    assert all("generic" in row.rules or not row.rules or row.kind not in generic
               for row in found.kinds)  # fmt: skip


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_both_serve_a_single_row(name):
    both_serve(MODELS[name](), ONE)


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_it_by_one_line(name):
    build_it, message = REFUSED[name]
    model = build_it(torch.float32)
    with pytest.raises(GEffectError, match=message) as of_profile:
        profiled(model, ONE)
    with pytest.raises(GEffectError, match=f"^{re.escape(str(of_profile.value))}$"):
        checked(model, SEVERAL)
    assert "\n" not in str(of_profile.value)


@pytest.mark.parametrize("n", [ONE, SEVERAL])
def test_norms_in_fp32_inside_fp64_are_no_missed_share(n):
    profiled(build("gemma4", torch.float64), n)
