"""`profile` against plain autograd, one sample at a time, for every parameter and objective."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from models import FIVE, build, fp64_throughout, samples
from reference import close, effects, effects_of_each, n_targets

import geffect_fast as gf
from geffect_fast.engines import directions as directions_module

FORGET = [2, 17, 5, 70, 33]
RETAIN = [9, 30, 2, 12]

OBJECTIVES = {
    "ga": [(1.0, "ga", {})],
    "wga(alpha=1.5)": [(1.0, "wga", {"alpha": 1.5})],
    "npo(beta=0.1) + 1.0*kl": [(1.0, "npo", {"beta": 0.1}), (1.0, "kl", {})],
    "tnpo(beta=4)": [(1.0, "tnpo", {"beta": 4.0})],
    "wtnpo(beta=3, alpha=0.5)": [(1.0, "wtnpo", {"beta": 3.0, "alpha": 0.5})],
    "po": [(1.0, "po", {})],
    "dpo(beta=0.2)": [(1.0, "dpo", {"beta": 0.2})],
    "0.125*simnpo(beta=4.5, delta=0.5) + nll": [
        (0.125, "simnpo", {"beta": 4.5, "delta": 0.5}),
        (1.0, "nll", {}),
    ],
    "gd(gamma=0.5, alpha=2)": [(0.5, "ga", {}), (2.0, "nll", {})],
    "rmu(layer=1, c=3, seed=7)": [
        (1.0, "rmu", {"layer": 1, "c": 3.0, "seed": 7, "normalize": False})
    ],
    "rmu(layer=2, normalize=true)": [
        (1.0, "rmu", {"layer": 2, "c": 2.0, "seed": 0, "normalize": True})
    ],
    "satimp(beta1=2, beta2=0.5)": [(1.0, "satimp", {"beta1": 2.0, "beta2": 0.5})],
    "token_weights": [(1.0, "token_weights", {})],
    "ceu": [(1.0, "ceu", {"skip": 1})],
    "undial(beta=3)": [(1.0, "undial", {"beta": 3.0})],
    "altpo(beta=0.3, alpha=0.5)": [(1.0, "dpo", {"beta": 0.3}), (0.5, "nll", {})],
    "pdu(gamma=0.5, eps=0.3, dual=2)": [(0.5, "flattening", {}), (2.0, "nll", {})],
    "rmu_mask(layer=1, seed=2) + 3*rr(layer=2)": [
        (1.0, "rmu_mask", {"layer": 1, "seed": 2}),
        (3.0, "rr", {"layer": 2}),
    ],
}


def data(prompt: int = 3):
    forget, retain = samples(FORGET, 1, prompt), samples(RETAIN, 2, prompt)
    alternatives = [[a] for a in samples([n + 4 for n in FORGET], 3, prompt)]
    alternatives[2] += samples([6, 4], 4, prompt)
    for i, (row, other) in enumerate(zip(forget, alternatives, strict=True)):
        row["alternative"] = other
        row["weights"] = [(i + j) % 4 / 2 for j in range(n_targets([row]))]
    return forget, retain, alternatives


def run(model, forget, retain, objectives, **kwargs):
    return gf.profile(model, None, forget=forget, retain=retain, objectives=objectives, **kwargs)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), *((architecture, torch.float64) for architecture in FIVE)],
    ids=str,
)
def test_equals_one_sample_at_a_time(architecture, dtype):
    forget, retain, alternatives = data()
    wide = fp64_throughout() if dtype == torch.float64 else contextlib.nullcontext()
    with wide:
        model, other = build(architecture, dtype), build(architecture, dtype, seed=1)
        result = run(
            model, forget, retain, list(OBJECTIVES), reference_model=other, token_budget=80
        )
        assert result.attrs["layout"] == "packed"
        plain = effects_of_each(model, other, OBJECTIVES.values(), forget, retain, alternatives)
    for found, expected in zip(result.g_effect.values, plain, strict=True):
        close(found, expected, 1e-5 if dtype == torch.float32 else 1e-10)
    assert list(result.parameter.values) == [name for name, _ in model.named_parameters()]
    assert result.sizes["sample"] == len(FORGET) + len(RETAIN)
    assert list(result.set.values) == ["forget"] * len(FORGET) + ["retain"] * len(RETAIN)
    assert list(result.sample.values) == [*range(len(FORGET)), *range(len(RETAIN))]


@pytest.mark.parametrize("reduction", ["sample", "sum"])
def test_other_reductions(reduction):
    forget, retain, alternatives = data()
    with fp64_throughout():
        model, other = build("llama", torch.float64), build("llama", torch.float64, seed=1)
        result = run(
            model,
            forget,
            retain,
            list(OBJECTIVES),
            reference_model=other,
            reduction=reduction,
            token_budget=60,
        )
        plain = effects_of_each(
            model, other, OBJECTIVES.values(), forget, retain, alternatives, reduction
        )
    for found, expected in zip(result.g_effect.values, plain, strict=True):
        close(found, expected, 1e-10)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("objectives", [["ga"], ["ga", "npo(beta=0.5)", "gd"]])
def test_one_or_several_objectives_with_and_without_norms(objectives, norms):
    """One objective takes the fused path, several the cached projections; norms add a gradient."""
    forget, retain, _ = data()
    with fp64_throughout():
        model = build("gpt2", torch.float64)
        result = run(model, forget, retain, objectives, norms=norms, token_budget=100)
        expected = effects(model, model, [(1.0, "ga", {})], forget, retain, None)
        n = result.sizes["sample"]
        close(result.g_effect[0].values, expected[..., :n], 1e-10)
    assert ("cosine" in result) == norms


def test_norms_cosines_and_values():
    forget, retain, _ = data()
    with fp64_throughout():
        model = build("phi", torch.float64)
        result = run(model, forget, retain, ["ga", "gd"])
    total = result.g_effect.sum(["parameter", "sample"])
    product = result.grad_norm * result.risk_grad_norm
    np.testing.assert_allclose(result.cosine, total / product, rtol=1e-9)
    np.testing.assert_allclose(
        (result.parameter_grad_norm**2).sum("parameter"), result.grad_norm**2, rtol=1e-12
    )
    per_parameter = result.g_effect.sum("sample") / (
        result.parameter_grad_norm * result.parameter_risk_grad_norm
    )
    heard = result.parameter_grad_norm.sel(objective="ga") > 1e-9
    np.testing.assert_allclose(
        result.parameter_cosine.sel(objective="ga")[heard],
        per_parameter.transpose("parameter", "objective", "risk").sel(objective="ga")[heard],
        rtol=1e-6,
        atol=1e-9,
    )
    risks = result.risk_value.sel(risk=["unlearn", "retain"]).values
    np.testing.assert_allclose(result.loss, [-risks[0], risks[1] - risks[0]], rtol=1e-12)


@pytest.mark.parametrize("resolve", [(), ("parameter",), ("sample",), ("parameter", "sample")])
def test_axes_sum_to_the_total(resolve):
    forget, retain, _ = data()
    with fp64_throughout():
        model = build("gemma2", torch.float64)
        full = run(model, forget, retain, ["npo(beta=0.1)+kl", "wga"]).g_effect
        result = run(model, forget, retain, ["npo(beta=0.1)+kl", "wga"], resolve=resolve).g_effect
    assert result.dims == ("objective", "risk", *resolve)
    gone = [d for d in ("parameter", "sample") if d not in resolve]
    np.testing.assert_allclose(result, full.sum(gone), rtol=1e-9, atol=1e-12)


def test_ga_on_the_risk_s_own_data():
    """Identity 1: e_u = -|grad R|^2 and e_r = -<grad R_r, grad R_u>."""
    forget, retain, _ = data()
    model = build("llama")
    result = run(model, forget, retain, ["ga"])
    e = result.g_effect.sum(["parameter", "sample"]).sel(objective="ga")
    norms = result.risk_grad_norm
    np.testing.assert_allclose(e.sel(risk="unlearn"), -(norms.sel(risk="unlearn") ** 2), rtol=1e-5)
    flipped = run(model, retain, forget, ["ga"]).g_effect.sum(["parameter", "sample"])
    np.testing.assert_allclose(
        e.sel(risk="retain"), flipped.sel(objective="ga", risk="retain"), rtol=1e-4
    )


def test_identities_between_objectives():
    forget, retain, _ = data()
    with fp64_throughout():
        model = build("llama", torch.float64)
        e = run(
            model,
            forget,
            retain,
            ["ga", "wga(alpha=0)", "tnpo(beta=2)", "wtnpo(beta=2, alpha=0)", "npo(beta=0.3)"],
        ).g_effect
        summed = run(model, forget, retain, ["ga"], reduction="sum").g_effect
    np.testing.assert_allclose(e[1], e[0], rtol=1e-12)
    np.testing.assert_allclose(e[3], e[2], rtol=1e-12)
    # At theta = reference, tnpo is ga (2 sigmoid(0) = 1), and npo is the summed ga with weight 1/B.
    # The risk of the second run is a sum too, so each risk is scaled back by its number of tokens.
    np.testing.assert_allclose(e[2], e[0], rtol=1e-12)
    for m, rows in enumerate((forget, retain)):
        tokens = sum(x != -100 for row in rows for x in row["labels"][1:])
        np.testing.assert_allclose(
            e[4, m], summed[0, m] / tokens / len(forget), rtol=1e-9, atol=1e-14
        )


def test_objectives_that_share_parts():
    """One profile of `ga` serves all of these; their norms follow from those of the parts."""
    forget, retain, _ = data()
    with fp64_throughout():
        model = build("llama", torch.float64)
        together = run(model, forget, retain, ["gd", "ga", "ga - 0.5*nll", "2*ga + wga(alpha=1)"])
        for name in together.objective.values:
            alone = run(model, forget, retain, [str(name)]).isel(objective=0)
            same = together.sel(objective=name).isel(sample=slice(0, alone.sizes["sample"]))
            for variable in ("g_effect", "loss", "grad_norm", "cosine", "parameter_grad_norm"):
                np.testing.assert_allclose(
                    same[variable], alone[variable], rtol=1e-8, atol=1e-12, err_msg=variable
                )


def test_probes_are_risks_of_their_own():
    forget, retain, _ = data()
    extra = samples([11, 6], 9)
    model = build("gpt2")
    result = run(model, forget, retain, ["ga"], probes={"general": extra})
    assert list(result.risk.values) == ["unlearn", "retain", "general"]
    as_retain = run(model, forget, extra, ["ga"])
    np.testing.assert_allclose(
        result.g_effect.sel(risk="general"),
        as_retain.g_effect.sel(risk="retain"),
        rtol=1e-4,
        atol=1e-7,
    )


def test_frozen_parameters_are_skipped_and_the_rest_is_unchanged():
    forget, retain, _ = data()
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        full = run(model, forget, retain, ["ga", "wga"])
        for name, p in model.named_parameters():
            p.requires_grad_("layers.1" in name or "layers.0.mlp" in name)
        part = run(model, forget, retain, ["ga", "wga"])
    assert all(p.grad is None for p in model.parameters())
    assert set(part.parameter.values) < set(full.parameter.values)
    np.testing.assert_allclose(
        part.g_effect, full.g_effect.sel(parameter=part.parameter), rtol=1e-9, atol=1e-13
    )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(part.parameter.values) == trainable


@pytest.mark.parametrize(
    ("settings", "checked"),
    [({}, True), ({"norms": False}, False), ({"norms": False, "resolve": ["parameter"]}, True)],
    ids=str,
)
def test_a_result_says_what_it_covers(settings, checked):
    forget, retain, _ = data()
    model = build("llama_tied")
    model.model.norm.requires_grad_(False)
    attrs = run(model, forget, retain, ["ga"], **settings).attrs
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    for what in ("covered", "trainable"):
        assert (attrs[f"{what}_parameters"], attrs[f"{what}_elements"]) == (len(sizes), sum(sizes))
    assert (attrs["frozen_parameters"], attrs["frozen_elements"]) == (1, 16)
    assert json.loads(attrs["tied"]) == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert attrs["coverage_checked"] == checked


def test_leaves_the_model_as_it_was():
    forget, retain, _ = data()
    model = build("phi")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # transformers itself leaves a hook on every block once hidden states have been asked for
    model(input_ids=torch.tensor([[3, 4]]), output_hidden_states=True)
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    run(model, forget, retain, ["ga", "kl", "rmu(layer=1)"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert hooks == [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]


def test_twice_the_same_is_bitwise_the_same():
    forget, retain, _ = data()
    model = build("gemma2")
    first = run(model, forget, retain, ["ga", "dpo"], token_budget=64)
    again = run(model, forget, retain, ["ga", "dpo"], token_budget=64)
    assert np.array_equal(first.g_effect.values, again.g_effect.values)


@pytest.fixture(scope="module")
def plain_in_bf16():
    """Effects of `ga` by plain autograd in bf16, and of the same weights in fp64."""
    forget, retain, _ = data()
    ga = [(1.0, "ga", {})]
    model = build("llama", torch.bfloat16)
    plain = effects(model, model, ga, forget, retain, None)
    with fp64_throughout():
        exact = effects(model.double(), model, ga, forget, retain, None)
    return plain[..., : len(forget)], exact[..., : len(forget)]


@pytest.mark.parametrize("directions", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objectives", [["ga"], ["ga", "po"]], ids=len)
def test_bf16_within_twice_the_error_of_plain_bf16(
    objectives, directions, plain_in_bf16, monkeypatch
):
    """The rule of low precision: at most twice the error of plain autograd in bf16.

    Directions are bf16 where bf16 products are faster, on CUDA; with several objectives the
    projections along them are kept.
    """
    monkeypatch.setattr(directions_module, "in_working_precision", lambda v, _: v.to(directions))
    forget, retain, _ = data()
    plain, exact = plain_in_bf16
    found = run(build("llama", torch.bfloat16), forget, retain, objectives)
    ours = torch.from_numpy(found.g_effect[0].values)[..., : len(forget)]
    scale = exact.abs().max()
    assert float((ours - exact).abs().max() / scale) <= 2 * float(
        (plain - exact).abs().max() / scale
    )
    assert float((ours - exact).norm()) <= 2 * float((plain - exact).norm())
