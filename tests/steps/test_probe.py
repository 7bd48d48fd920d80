"""Probes: predictions beside measured changes, token weights, and an unchanged model."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import xarray as xr
from models import build, fp64_throughout, samples

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.measure import step_metric
from geffect_fast.measure.profiler import Profiler
from geffect_fast.steps.at_rest import at_rest
from geffect_fast.steps.probe import Probe, inner_with_update, run_identity, total_effect
from geffect_fast.storage.step_store import StepStore

DATA = {"forget": samples([5, 9, 3], 1), "retain": samples([7, 4], 2)}


@pytest.fixture(autouse=True)
def in_fp64():
    with fp64_throughout():
        yield


def probe_of(model, objectives=("ga",), store=None, trained=None, **more):
    profiler = Profiler.of(
        model, None, **DATA | {"objectives": objectives, "token_budget": 64} | more
    )
    return Probe(profiler, store or StepStore(None, ""), trained=trained)


def loss_of(model):
    """`ga` on the forget rows, written out."""
    total, n = 0.0, 0
    for row in DATA["forget"]:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        kept = labels[1:] != -100
        logprob = logits[:-1].log_softmax(-1)[kept].gather(1, labels[1:][kept, None])
        total, n = total + logprob.sum(), n + len(logprob)
    return total / n


def trained(model, optimizer, probe, steps, every):
    probe.measure_at(0)
    rates = []
    for step in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        if step % every == 0:
            probe.measure_at(step, learning_rates=rates)
            rates = []
    return probe.store.combined()


# ---- predicted against measured ----


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_predictions_tend_to_what_is_measured_as_the_learning_rate_shrinks(kind):
    sizes = {"SGD": (1e-3, 1e-4, 1e-5), "AdamW": (1e-5, 1e-6, 1e-7)}[kind]
    off = []
    for lr in sizes:
        model = build("llama", torch.float64)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=lr)
        found = trained(model, optimizer, probe_of(model), steps=2, every=2)
        found = found.isel(step=slice(1, None))
        gap = abs(found.predicted_update / found.measured_change - 1)
        off.append(float(gap.max()))
        assert (found.measured_change.sel(risk="unlearn") > 0).all()
        assert (found.learning_rate == lr).all()
    # The error is of first order in the learning rate, relative to the change.
    assert off[0] < 0.2
    assert all(7 < larger / smaller < 13 for larger, smaller in itertools.pairwise(off))


def test_both_predictions_are_one_for_plain_descent_on_the_probed_data():
    model = build("llama", torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    probe = probe_of(model, ["wga(alpha=1)", "ga"], trained="ga()")
    found = trained(model, optimizer, probe, steps=3, every=1).isel(step=slice(1, None))
    np.testing.assert_allclose(found.predicted_sgd, found.predicted_update, rtol=1e-10)
    assert found.attrs["trained_objective"] == "ga"
    effects = total_effect(probe.store.combined()).sel(objective="ga")
    np.testing.assert_allclose(found.predicted_sgd, -1e-2 * effects[:-1], rtol=1e-12)


def test_learning_rates_of_updates_between_probes_add_up():
    model = build("llama", torch.float64)
    probe = probe_of(model, trained="ga")
    effect = total_effect(probe.measure_at(3)).sel(objective="ga")
    found = probe.measure_at(5, learning_rates=[0.25, 0.5])
    assert float(found.learning_rate) == 0.5
    np.testing.assert_array_equal(found.predicted_sgd, -0.75 * effect)
    np.testing.assert_array_equal(found.predicted_update, [0, 0])
    np.testing.assert_array_equal(found.measured_change, [0, 0])


def test_the_inner_product_with_an_update_in_pieces(monkeypatch):
    monkeypatch.setattr("geffect_fast.steps.probe._CHUNK", 7)
    model = build("llama", torch.float64)
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    directions = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    found = inner_with_update(dict(model.named_parameters()), before, directions)
    expected = [
        sum(((p - before[n]) * directions[n][m]).sum() for n, p in model.named_parameters())
        for m in range(2)
    ]
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-12, atol=0)


def test_in_low_precision_the_update_is_what_the_weights_became():
    model = build("llama").bfloat16()
    probe = probe_of(model)
    probe.measure_at(0)
    theta = {name: p.detach().double() for name, p in model.named_parameters()}
    directions = probe.profiler.risk_gradients()[1]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.full_like(p, 1e-3))  # lost where a weight is large
    found = probe.measure_at(1)
    expected = sum(
        directions[name].double().flatten(1) @ (p.detach().double() - theta[name]).flatten()
        for name, p in model.named_parameters()
    )
    np.testing.assert_allclose(found.predicted_update, expected.numpy(), rtol=1e-6)


# ---- weights of tokens ----


def logprobs(model, row):
    """Log-probabilities of the labels of a row, one sample at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
    labels = torch.tensor(row["labels"])
    kept = labels[1:] != -100
    return logits[:-1].log_softmax(-1)[kept].gather(1, labels[1:][kept, None])[:, 0]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"resolve": ("group",)},
        {"resolve": ("sample", "token")},
        {"resolve": ("sample",), "engine": "forward"},
        {"token_budget": 1},
    ],
    ids=["reverse", "whole gradients", "token", "forward", "one a batch"],
)
def test_weights_of_tokens_are_those_of_the_formulas(how):
    model, other = build("llama", torch.float64), build("llama", torch.float64, seed=1)
    objectives = ["ga", "wga(alpha=2)", "npo(beta=0.5)", "npo(beta=0.5) + 3*nll", "rmu(layer=1)"]
    objectives += ["ga - 2*wga(alpha=2) + rmu(layer=1)"]
    probe = probe_of(model, objectives, reference_model=other, **how)
    found = probe.measure_at(0)["token_weight"]
    assert found.dims == ("objective", "sample", "token")
    own = [logprobs(model, row) for row in DATA["forget"]]
    theirs = [logprobs(other, row) for row in DATA["forget"]]
    n, b = sum(map(len, own)), len(own)
    n_retain = sum(len(row["labels"]) - 1 for row in DATA["retain"])
    expected = np.full(found.shape, np.nan)
    for i, (logp, logp0) in enumerate(zip(own, theirs, strict=True)):
        # arXiv 2502.19301 for wga; 2404.05868 for npo: 2 p^beta / (p^beta + p0^beta) a sample
        npo = 2 / (1 + torch.exp(-0.5 * (logp.sum() - logp0.sum()))) / b
        expected[:4, i, : len(logp)] = np.stack(
            [np.full(len(logp), 1 / n), (2 * logp).exp() / n, *[np.full(len(logp), npo)] * 2]
        )
    expected[5] = expected[0] - 2 * expected[1]
    for i, row in enumerate(DATA["retain"]):
        expected[3, b + i, : len(row["labels"]) - 1] = -3 / n_retain
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found.sel(objective="rmu(layer=1)").isnull().all(), "it reads hidden states"


def test_tokens_with_weights_are_named():
    model = build("llama", torch.float64)
    found = probe_of(model, ["ga", "gd"]).measure_at(0)
    assert found["set"].values.tolist() == ["forget"] * 3 + ["retain"] * 2
    for i, row in enumerate([*DATA["forget"], *DATA["retain"]]):
        ids = [token for token in row["labels"] if token != -100]
        kept = found["token_id"].values[i]
        assert kept[kept >= 0].tolist() == ids
        of_row = found["token_weight"].isel(sample=i, objective=1)
        assert (of_row.notnull().values == (kept >= 0)).all()
    assert found["token_weight"].sel(objective="ga").isel(sample=[3, 4]).isnull().all()


def test_weights_of_alternatives_stand_behind_those_of_answers():
    rows = [row | {"alternative": samples([4, 6], 7)} for row in DATA["forget"]]
    model = build("llama", torch.float64)
    found = probe_of(model, ["ga", "po"], forget=rows).measure_at(0)
    ga, po = (found["token_weight"].sel(objective=name) for name in ("ga", "po"))
    assert (ga.notnull() == (found["sequence"] == 0)).all()
    assert (po.notnull() == (found["sequence"] > 0)).all()
    n = len(rows) * (3 + 5)
    np.testing.assert_allclose(po.values[po.notnull().values], -1 / n, rtol=1e-12)


def test_weights_by_position_are_left_out():
    found = probe_of(build("llama", torch.float64), resolve=("sample", "position")).measure_at(0)
    assert "token_weight" not in found and "position" in found.g_effect.dims


# ---- the store ----


def test_steps_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    def run(store, stop=99):
        model = build("llama", torch.float64)
        probe = probe_of(model, store=store, trained="ga")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        trained(model, optimizer, probe, steps=min(3, stop), every=1)

    whole = StepStore(None, "")
    run(whole)
    run(StepStore(tmp_path, ""), stop=1)
    measured, plain = [], Profiler.measure
    monkeypatch.setattr(
        Profiler, "measure", lambda self, **more: measured.append(0) or plain(self, **more)
    )
    again = StepStore(tmp_path, "")
    run(again)
    assert len(measured) == 2
    xr.testing.assert_identical(
        again.combined().drop_attrs(deep=False), whole.combined().drop_attrs(deep=False)
    )


def test_without_the_probe_before_nothing_is_predicted(tmp_path):
    model = build("llama", torch.float64)
    before = probe_of(model, store=StepStore(tmp_path, "")).measure_at(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    found = probe_of(model, store=StepStore(tmp_path, "")).measure_at(7, learning_rates=[1.0])
    assert found.predicted_update.isnull().all() and found.predicted_sgd.isnull().all()
    np.testing.assert_allclose(
        found.measured_change, found.risk_value - before.risk_value, rtol=1e-12
    )


def test_steps_of_another_model_are_refused(tmp_path):
    probe_of(build("llama", torch.float64), store=StepStore(tmp_path, "")).measure_at(0)
    other = probe_of(build("llama", torch.float64, seed=1), store=StepStore(tmp_path, ""))
    with pytest.raises(InputError, match="step 0 was measured of another model: risk 'unlearn'"):
        other.measure_at(0)


def test_a_run_is_told_by_its_data_objectives_settings_and_parameters():
    def identity(model="llama", more=None, **changes):
        profiler = Profiler.of(build(model), None, **DATA | {"objectives": ["ga"]} | changes)
        return run_identity(profiler, **more or {})

    found = [
        identity(),
        identity(objectives=["npo"]),
        identity(forget=samples([5, 9, 3], 8)),
        identity(retain=[*DATA["retain"], *samples([3], 9)]),
        identity(probes={"general": samples([3], 9)}),
        identity(reduction="sample"),
        identity("gpt2"),
        identity(more={"learning_rate": 1}),
        identity(more={"learning_rate": 2}),
    ]
    assert len(set(found)) == len(found)
    assert identity(token_budget=17) == found[0], "it changes rounding alone"


def test_an_objective_that_is_not_measured_cannot_be_the_trained_one():
    with pytest.raises(InputError, match="'npo' is not among the objectives measured: ga; add it"):
        probe_of(build("llama"), trained="npo")


# ---- an unchanged model ----


def test_what_is_inside_is_at_rest_and_what_was_outside_comes_back():
    model = build("llama").train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    plain = model.forward
    model._original_forward = plain
    model.forward = lambda *a, **k: plain(*a, **k)
    patched = model.forward
    kept = [model.lm_head.weight, model.model.embed_tokens.weight]
    with (
        pytest.raises(RuntimeError, match="inside"),
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        at_rest(model, kept),
    ):
        assert not any(m.training for m in model.modules())
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        asking = {id(p) for p in model.parameters() if p.requires_grad}
        assert asking == {id(p) for p in kept}
        assert model.forward == plain
        torch.randn(3)
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == [
        p is not model.lm_head.weight for p in model.parameters()
    ]
    assert model.forward is patched


def test_gradients_in_the_making_stay(tmp_path):
    model = build("llama", torch.float64)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    kept = [p.grad.clone() for p in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    probe_of(
        model, ["ga", "npo + kl"], reference_model=build("llama", torch.float64, seed=1)
    ).measure_at(0)
    assert all(torch.equal(p.grad, k) for p, k in zip(model.parameters(), kept, strict=True))
    assert all(torch.equal(v, weights[name]) for name, v in model.state_dict().items())


def test_the_probe_measures_what_a_profile_does():
    model = build("llama", torch.float64)
    found = probe_of(model, ["ga", "npo"]).measure_at(0)
    expected = gf.profile(model, None, **DATA, objectives=["ga", "npo"], token_budget=64)
    xr.testing.assert_equal(found[list(expected.data_vars)], expected)


# ---- the optimizer's step ----


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_the_optimizers_step_is_predicted_as_it_is_taken(kind):
    """With one update a probe, on the probed rows, the predicted step is the update itself."""
    model = build("llama", torch.float64)
    more = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-4, weight_decay=0.1, **more)
    probe = probe_of(model, ["wga(alpha=1)", "ga"], trained="ga")
    probe.measure_at(0, optimizer=optimizer)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        found = probe.measure_at(step, learning_rates=[1e-4], optimizer=optimizer)
        assert torch.equal(
            before["state"][0]["momentum_buffer" if more else "exp_avg"],
            next(iter(optimizer.state.values()))["momentum_buffer" if more else "exp_avg"],
        )
        np.testing.assert_allclose(found.predicted_step, found.predicted_update, rtol=1e-9)
        if kind != "SGD":
            assert not np.allclose(found.predicted_sgd, found.predicted_update, rtol=0.5)
    assert found.attrs["step_metric"] == kind.lower() and "metric" not in found.attrs


@pytest.mark.parametrize(
    ("engine", "resolve", "entries"),
    [("reverse", ("parameter", "sample"), 101), ("forward", ("group", "token"), 10**6)],
)
def test_effects_beside_are_those_of_a_profile_in_the_metric(engine, resolve, entries, monkeypatch):
    """Parameters are read in pieces of a few entries, or whole."""
    monkeypatch.setitem(step_metric.PIECE, "cpu", entries)
    model = build("llama", torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss_of(model).backward()
    optimizer.step()
    options = {"engine": engine, "resolve": resolve, "token_budget": 64, "objectives": ["ga"]}
    probe = probe_of(model, trained="ga", engine=engine, resolve=resolve)
    beside = probe.measure_at(0, optimizer=optimizer)
    alone = gf.profile(model, None, **DATA, **options, metric="adamw", optimizer=optimizer)
    plain = gf.profile(model, None, **DATA, **options)
    for found, expected in (
        (beside.step_effect, alone.g_effect.sum({"sample", "token"} & {*alone.g_effect.dims})),
        (beside.g_effect, plain.g_effect),
        (beside.momentum_effect, alone.momentum_effect),
        (beside.step_total, alone.step_total),
        (beside.risk_grad_norm, plain.risk_grad_norm),
    ):
        assert found.dims == expected.dims
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    for name in {"cosine", "g_effect_low", "collateral_high"} & {*plain}:
        np.testing.assert_allclose(beside[name], plain[name], rtol=1e-9, atol=1e-13)


def test_an_optimizer_that_is_not_known_is_named_and_the_rest_stands():
    model = build("llama", torch.float64)
    optimizer = torch.optim.Adagrad(model.parameters())
    probe = probe_of(model, trained="ga")
    found = probe.measure_at(0, optimizer=optimizer)
    assert "Adagrad is not known" in found.attrs["step_metric_note"]
    assert found.step_effect.isnull().all()
    assert found.step_effect.dims == ("objective", "risk", "parameter")
    assert found.momentum_effect.isnull().all() and found.momentum_effect.dims == (
        "risk",
        "parameter",
    )
    assert found.g_effect.notnull().all()
    assert (
        probe.measure_at(1, learning_rates=[1], optimizer=optimizer).predicted_step.isnull().all()
    )


def test_the_second_order_of_a_step_is_closer_to_what_is_measured():
    model = build("llama", torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    profiler = Profiler.of(model, None, **DATA, objectives=["ga"], token_budget=64)
    probe = Probe(profiler, StepStore(None, ""), trained="ga", second_order=True)
    probe.measure_at(0, optimizer=optimizer)
    loss_of(model).backward()
    optimizer.step()
    found = probe.measure_at(1, learning_rates=[1e-4], optimizer=optimizer).sel(risk="unlearn")
    off = {
        name: abs(float(found[name] - found.measured_change))
        for name in ("predicted_step", "predicted_second")
    }
    assert off["predicted_second"] < 0.3 * off["predicted_step"]
