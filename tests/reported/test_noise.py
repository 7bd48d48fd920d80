"""Publicly reported errors: references that are the model, and intervals of the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import build, samples

import geffect_fast as gf
from geffect_fast.errors import GEffectWarning
from geffect_fast.results.intervals import bounds, row_weights

SETS = {"forget": samples([9, 7, 11, 8], 1), "retain": samples([8, 10, 9], 2)}


@pytest.mark.parametrize(
    ("source", "objective"),
    [
        # policy and reference are the same, and the loss is a constant
        ("eric-mitchell/direct-preference-optimization#46", "npo(beta=0.5)"),
        # the model that npo takes as reference
        ("franciscoliu/MLLMU-Bench#22", "npo(beta=0.1)"),
        # the divergence from the model before unlearning, which is the model itself
        ("locuslab/open-unlearning#75", "ga + 1.0*kl"),
    ],
)
def test_a_reference_that_is_the_model_is_said(source, objective):
    model = build("llama", dtype=torch.float64)
    with pytest.warns(GEffectWarning, match="reference: the model itself"):
        result = gf.profile(model, None, **SETS, objectives=[objective])
    assert result.attrs["reference_is_model"] == 1, source


def test_the_same_answers_have_the_same_interval():
    """lmarena/arena-hard-auto#8: a copy of a model's answers got another interval than they."""
    model = build("llama", dtype=torch.float64)
    one, two = (gf.profile(model, None, **SETS, objectives=["ga"]) for _ in range(2))
    for name in ("g_effect_low", "g_effect_high", "collateral_high", "risk_value_low"):
        np.testing.assert_array_equal(one[name], two[name])


def test_the_interval_is_that_of_the_statistic_of_each_draw():
    """py-why/EconML#715: the statistic of each draw, then its spread; no mean of rows' spreads."""
    rows = np.random.default_rng(0).normal(3.0, 1.0, 50)
    low, high = bounds(row_weights(["forget"] * 50) @ rows / 50)
    assert (high - low) / 2 == pytest.approx(2.01 * rows.std(ddof=1) / 50**0.5, rel=0.12)
