"""Objectives in `profile`: the role of batches, layouts, frozen weights and references."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from models import build, fp64_throughout, samples
from reference import forget_shares

import geffect_fast as gf
from geffect_fast.measure import prepare

FORGET = [2, 17, 5, 40]
RETAIN = [9, 30, 2]

OBJECTIVES = [
    "satimp(beta1=2, beta2=0.5)",
    "token_weights",
    "ceu",
    "undial(beta=3)",
    "altpo(beta=0.3)",
    "pdu(eps=0.3)",
    "rmu_mask(layer=1, seed=2)",
    "rr(layer=2)",
    "dpo(beta=0.2)",
    "npo(beta=0.1)+kl",
    "rmu(layer=1)",
]


def data():
    forget, retain = samples(FORGET, 1, 3), samples(RETAIN, 2, 3)
    for i, row in enumerate(forget):
        row["alternative"] = samples([6, 9, 4][: 1 + i % 3], 10 + i, 3)
        row["weights"] = [(i + j) % 4 / 2 for j in range(sum(y != -100 for y in row["labels"][1:]))]
    return forget, retain


def run(model, forget, retain, objectives, **kwargs):
    return gf.profile(model, None, forget=forget, retain=retain, objectives=objectives, **kwargs)


def models():
    return build("llama", torch.float64), build("llama", torch.float64, seed=1)


@functools.cache
def in_one_batch():
    model, other = models()
    return run(model, *data(), OBJECTIVES, reference_model=other, token_budget=10**6)


@pytest.mark.parametrize(
    "layout, budget", [("packed", 30), ("packed", 1), ("equal_length", 30), ("single", 30)]
)
def test_batches_layouts_and_order_change_nothing(monkeypatch, layout, budget):
    forget, retain = data()
    order = [3, 0, 2, 1]
    with fp64_throughout():
        model, other = models()
        whole = in_one_batch()
        monkeypatch.setattr(prepare, "choose_layout", lambda *_: layout)
        cut = run(
            model,
            [forget[i] for i in order],
            retain,
            OBJECTIVES,
            reference_model=other,
            token_budget=budget,
        )
    n = len(forget)
    assert cut.attrs["layout"] == layout
    assert (np.abs(whole.g_effect).sum(["parameter", "sample"]) > 0).all()
    for part, rows in ((slice(n), order), (slice(n, None), slice(None))):
        expected = whole.g_effect[..., part][..., rows]
        np.testing.assert_allclose(cut.g_effect[..., part], expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-10)


def test_frozen_parameters_change_nothing_for_the_others():
    forget, retain = data()
    with fp64_throughout():
        model, other = models()
        full = run(model, forget, retain, OBJECTIVES, reference_model=other)
        for name, p in model.named_parameters():
            p.requires_grad_("layers.0" in name)
        part = run(model, forget, retain, OBJECTIVES, reference_model=other)
    np.testing.assert_allclose(
        part.g_effect, full.g_effect.sel(parameter=part.parameter), rtol=1e-9, atol=1e-13
    )


def test_altpo_has_an_effect_on_what_it_replaces():
    """altpo's forget rows keep their own numbers, also in the risk on the answers."""
    forget, retain = data()
    with fp64_throughout():
        model, other = models()
        result = run(model, forget, retain, ["altpo", "dpo", "nll"], reference_model=other)
    e = result.g_effect.sum("parameter")
    per_row = e.sel(objective="altpo", risk="unlearn")[: len(forget)]
    assert (np.abs(per_row) > 1e-6).all()
    np.testing.assert_allclose(
        e.sel(objective="altpo"), e.sel(objective="dpo") + e.sel(objective="nll"), rtol=1e-9
    )
    assert (np.abs(result.cosine) <= 1).all()


def test_several_alternatives_average_the_pairs_of_each():
    forget, retain = data()
    pairs = samples([6, 9], 20, 3)
    with fp64_throughout():
        model, other = models()

        def effects_of(alternatives):
            rows = [row | {"alternative": alternatives} for row in forget]
            return run(model, rows, retain, ["dpo(beta=0.5)"], reference_model=other)

        both = effects_of(pairs)
        first, second = (effects_of(pair) for pair in pairs)
    mean = (first.g_effect + second.g_effect) / 2
    np.testing.assert_allclose(both.g_effect, mean, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(both.loss, (first.loss + second.loss) / 2, rtol=1e-12)


def test_regularisers_are_at_rest_where_the_reference_is_the_model():
    forget, retain = data()
    result = run(build("llama"), forget, retain, ["rr(layer=1)", "undial(beta=0)"])
    assert not result.g_effect.sel(objective="rr(layer=1)").any()
    assert result.loss.sel(objective="rr(layer=1)") == 0
    rest = np.abs(result.g_effect.sel(objective="undial(beta=0)")).max()
    assert rest < 1e-5 * result.risk_grad_norm.max() ** 2


FIRST_ORDER = {
    "wga(alpha=1)": ("wga", {"alpha": 1.0}),
    "satimp(beta1=1, beta2=0.5)": ("satimp", {"beta1": 1.0, "beta2": 0.5}),
    "token_weights": ("token_weights", {}),
    "ceu": ("ceu", {"skip": 1}),
    "undial(beta=3)": ("undial", {"beta": 3.0}),
    "pdu(eps=0, dual=0)": ("flattening", {}),
    "altpo(beta=0.5, alpha=0)": ("dpo", {"beta": 0.5}),
    "rmu_mask(layer=2)": ("rmu_mask", {"layer": 2, "seed": 0}),
}


@functools.cache
def totals():
    """Effects `(objective, risk)` of all objectives, and the risks."""
    model, other = models()
    result = run(model, *data(), list(FIRST_ORDER), reference_model=other, resolve=())
    return result.g_effect.values, result.risk_value.values


@pytest.mark.parametrize("text", FIRST_ORDER)
def test_predicts_the_change_of_the_risk_to_first_order(text):
    """The risk after a step of size lr is R - lr e + O(lr^2): halving lr quarters the error."""
    forget, retain = data()
    alternatives = [row["alternative"] for row in forget]
    with fp64_throughout():
        effects, before = totals()
        model, other = models()
        sum(
            forget_shares(*FIRST_ORDER[text], model, other, forget, alternatives, "token")
        ).backward()
        moving = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        errors = []
        for lr in (1e-4, 5e-5):
            with torch.no_grad():
                for p, start, gradient in moving:
                    p.copy_(start - lr * gradient)
            after = run(model, forget, retain, ["ga"], resolve=()).risk_value.values
            errors.append(np.abs(after - (before - lr * effects[list(FIRST_ORDER).index(text)])))
    assert (errors[1] < 0.3 * errors[0]).all()
