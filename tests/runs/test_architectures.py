"""Every architecture of the table is exact, for every parameter and sample, by the rules it names.

A row that falls back to a slower rule or layout fails, as does one that is not exact.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from architectures import ARCHITECTURES
from models import build, fp64_throughout, samples
from reference import close, effects

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import tokenize_rows
from geffect_fast.objectives import resolve
from geffect_fast.runs.axes import kind_of
from geffect_fast.runs.captured import CapturedNumbers

FORGET, RETAIN = [2, 17, 7, 7], [9, 13]

OBJECTIVES = {
    "npo(beta=0.1) + kl": [(1.0, "npo", {"beta": 0.1}), (1.0, "kl", {})],
    "wga(alpha=1)": [(1.0, "wga", {"alpha": 1.0})],
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_effects_equal_one_sample_at_a_time(name, dtype):
    forget, retain = samples(FORGET, 1, 2), samples(RETAIN, 2, 2)
    with fp64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
        model, other = build(name, dtype), build(name, dtype, seed=1)
        result = gf.profile(
            model,
            None,
            forget=forget,
            retain=retain,
            objectives=list(OBJECTIVES),
            reference_model=other,
            token_budget=30,
        )
        for k, objective in enumerate(OBJECTIVES.values()):
            expected = effects(model, other, objective, forget, retain, None)
            close(result.g_effect[k].values, expected, TOLERANCE[dtype])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(result.parameter.values) == trainable
    assert result.attrs["layout"] == ARCHITECTURES[name].layout


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rules(name):
    row, model = ARCHITECTURES[name], build(name)
    rows = tokenize_rows(samples(FORGET, 1), None, name="forget")
    rules = CapturedNumbers(Plan.of(model), rows, [resolve("ga")], None, row.layout).rules()
    generic = {kind_of(name) for name, served in rules.items() if "generic" in served}
    assert generic == set(row.generic)
    assert rules.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
