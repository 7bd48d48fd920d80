"""Effects in an optimizer's metric, against changes of the risks by its real step, in fp64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lion import Lion
from models import build, fp64_throughout, samples

import geffect_fast as gf
from geffect_fast.errors import InputError, UnsupportedModelError

FORGET, RETAIN = samples([5, 9, 3, 12], 1, 2), samples([7, 4, 6], 2, 2)
DATA = {"forget": FORGET, "retain": RETAIN}
EXTENT = 1e-5
"""The part of a step that finite differences take."""


def two_groups(model, **more):
    """Parameter groups: matrices at one learning rate with decay, the rest at another without."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices} | more, {"params": others, "lr": 3e-4, "weight_decay": 0.0}]


OPTIMIZERS = {
    "sgd": ("sgd", lambda m: torch.optim.SGD(m.parameters(), lr=1e-2)),
    "momentum": (
        "sgd",
        lambda m: torch.optim.SGD(
            two_groups(m, weight_decay=0.3), lr=1e-3, momentum=0.9, dampening=0.25
        ),
    ),
    "nesterov": (
        "sgd",
        lambda m: torch.optim.SGD(
            m.parameters(), lr=1e-3, momentum=0.8, nesterov=True, weight_decay=0.1
        ),
    ),
    "adam": ("adam", lambda m: torch.optim.Adam(m.parameters(), lr=1e-3)),
    "adam, coupled decay, amsgrad": (
        "adam",
        lambda m: torch.optim.Adam(
            two_groups(m, weight_decay=0.2), lr=1e-3, betas=(0.8, 0.95), amsgrad=True
        ),
    ),
    "adamw": (
        "adamw",
        lambda m: torch.optim.AdamW(
            two_groups(m, weight_decay=0.5), lr=1e-3, betas=(0.85, 0.98), eps=1e-6
        ),
    ),
    "lion": ("lion", lambda m: Lion(two_groups(m, weight_decay=0.5), lr=1e-4)),
}


def loss_of(model, rows):
    """The mean negative log-likelihood of the rows' answers, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        kept = labels[1:] != -100
        total = total - found[kept].gather(1, labels[1:][kept][:, None]).sum()
        count += int(kept.sum())
    return total / count


def stepped(model, optimizer, rows, times=1):
    """Train by gradient ascent on rows."""
    for _ in range(times):
        optimizer.zero_grad()
        (-loss_of(model, rows)).backward()
        optimizer.step()
    optimizer.zero_grad()


def changes_along(model, step):
    """Changes of the risks along a step, by finite differences, per unit of the step."""
    found = []
    for rows in (FORGET, RETAIN):
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p.add_(step[name], alpha=sign * EXTENT)
                sides.append(float(loss_of(moved, rows)))
        found.append((sides[0] - sides[1]) / (2 * EXTENT))
    return np.array(found)


def real_step(model, optimizer):
    """The move of one more step of the optimizer; model and optimizer stay as they are."""
    other = copy.deepcopy({"model": model, "optimizer": optimizer})
    stepped(other["model"], other["optimizer"], FORGET)
    before = dict(model.named_parameters())
    return {n: (p - before[n]).detach() for n, p in other["model"].named_parameters()}


def profile(model, metric, optimizer=None, objectives=("ga",), **more):
    options = {"resolve": ("parameter", "sample"), "token_budget": 40} | more
    return gf.profile(
        model,
        None,
        **DATA,
        objectives=list(objectives),
        metric=metric,
        optimizer=optimizer,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "times", "engine"),
    [
        *((name, times, "reverse") for name in OPTIMIZERS for times in (0, 4)),
        *((name, 4, "forward") for name in ("adamw", "lion")),
    ],
)
def test_prediction_is_the_change_along_the_real_step(name, times, engine):
    metric, made = OPTIMIZERS[name]
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        optimizer = made(model)
        stepped(model, optimizer, FORGET[:2], times)
        resolve = ("parameter", "sample") if engine == "reverse" else ("group", "token")
        result = profile(model, metric, optimizer, engine=engine, resolve=resolve)
        expected = changes_along(model, real_step(model, optimizer))
    predicted = result.predicted_change.sel(objective="ga").values
    np.testing.assert_allclose(predicted, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    # The terms add up to the whole.
    by = "parameter" if engine == "reverse" else "group"
    terms = result.momentum_effect.sum(by) + result.decay_effect.sum(by)
    within = [d for d in result.g_effect.dims if d not in ("objective", "risk")]
    total = result.g_effect.sum(within).sel(objective="ga") + terms
    np.testing.assert_allclose(total, result.step_total.sel(objective="ga"), rtol=1e-12)
    rate = float(result.step_learning_rate)
    np.testing.assert_allclose(predicted, -rate * total, rtol=1e-12)
    assert result.attrs["metric"] == metric
    assert ("estimated" in result.attrs["metric_state"]) == (times == 0 and metric != "sgd")


def diagonal_of(model, seed=3):
    torch.manual_seed(seed)
    return {name: torch.rand_like(p) for name, p in model.named_parameters()}


def test_equals_one_sample_at_a_time_and_norms_are_in_the_metric():
    with fp64_throughout():
        model = build("llama", torch.float64)
        diagonal = diagonal_of(model)
        diagonal["lm_head.weight"][3:5] = 0.0  # a change of 0 has no relative error
        result = profile(model, diagonal, norms=True)
        parameters = dict(model.named_parameters())

        def gradient(rows):
            grads = torch.autograd.grad(loss_of(model, rows), list(parameters.values()))
            return dict(zip(parameters, grads, strict=True))

        directions = [gradient(FORGET), gradient(RETAIN)]
        counts = [len([x for x in row["labels"][1:] if x != -100]) for row in FORGET]
        for row, (sample, count) in enumerate(zip(FORGET, counts, strict=True)):
            own = gradient([sample])
            for m, v in enumerate(directions):
                expected = [
                    -float((v[n] * diagonal[n] * own[n]).sum()) * count / sum(counts)
                    for n in parameters
                ]
                np.testing.assert_allclose(
                    result.g_effect[0, m, :, row], expected, rtol=1e-9, atol=1e-14
                )
    squares = sum(float((diagonal[n] * directions[0][n].square()).sum()) for n in parameters)
    assert float(result.grad_norm[0]) == pytest.approx(squares**0.5, rel=1e-10)
    assert float(result.risk_grad_norm[0]) == pytest.approx(squares**0.5, rel=1e-10)
    assert float(result.cosine[0, 0]) == pytest.approx(-1.0)
    assert result.attrs["metric"] == "diagonal" and result.attrs["coverage_checked"] == 1
    assert not result.momentum_effect.any() and not result.decay_effect.any()
    assert "predicted_change" not in result


def test_sums_over_axes_are_the_total_and_both_engines_agree():
    objectives = ["ga", "npo(beta=0.5) + kl", "gd"]
    with fp64_throughout():
        model, other = build("gpt2", torch.float64), build("gpt2", torch.float64, seed=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        stepped(model, optimizer, FORGET, 2)
        totals, step_totals = [], []
        for resolve, engine in (
            ((), "reverse"),
            (("parameter",), "reverse"),
            (("parameter", "sample", "position"), "reverse"),
            (("group", "sample", "token"), "forward"),
            (("sample",), "forward"),
        ):
            result = profile(
                model,
                "adamw",
                optimizer,
                objectives,
                resolve=resolve,
                engine=engine,
                reference_model=other,
            )
            within = [d for d in result.g_effect.dims if d not in ("objective", "risk")]
            totals.append(result.g_effect.sum(within).values)
            step_totals.append(result.step_total.values)
            assert result.attrs["metric_of"] == ", ".join(objectives)
    for other_total, step_total in zip(totals[1:], step_totals[1:], strict=True):
        np.testing.assert_allclose(other_total, totals[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(step_total, step_totals[0], rtol=1e-9, atol=1e-12)


def test_of_several_objectives_one_is_said_to_take_the_step():
    with fp64_throughout():
        model = build("llama", torch.float64)
        optimizer = Lion(model.parameters())
        stepped(model, optimizer, FORGET, 1)
        alone = profile(model, "lion", optimizer)
        both = profile(model, "lion", optimizer, ["wga(alpha=1)", "ga"], step_of="ga")
    assert both.attrs["metric_of"] == alone.attrs["metric_of"] == "ga"
    np.testing.assert_allclose(
        both.g_effect.sel(objective="ga"), alone.g_effect.sel(objective="ga"), rtol=1e-9
    )


def test_intervals_are_in_the_metric():
    """A metric that is a number scales the intervals: at half of every gradient, half as wide."""
    model = build("llama")
    half = {name: torch.tensor(0.5) for name, _ in model.named_parameters()}
    plain = gf.profile(model, None, **DATA, objectives=["ga"], token_budget=40)
    scaled = profile(model, half)
    for name in ("g_effect", "g_effect_low", "g_effect_high"):
        np.testing.assert_allclose(scaled[name], 0.5 * plain[name], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(scaled.collateral_low, plain.collateral_low, rtol=1e-4)


def test_model_and_optimizer_are_left_as_they_were():
    model = build("llama")
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer, FORGET, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    profile(model, "adam", optimizer)
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
    for number, state in before[1]["state"].items():
        assert all(torch.equal(after[1]["state"][number][k], v) for k, v in state.items())
    assert after[1]["param_groups"] == before[1]["param_groups"]


@pytest.mark.parametrize(
    ("metric", "optimizer", "said"),
    [
        ("adagrad", None, "metric: unknown 'adagrad'; choose from sgd, adam, adamw, lion"),
        (None, torch.optim.Adam, "optimizer: goes with metric"),
        ("adam", torch.optim.Adagrad, "Adagrad is of no kind that is known; use one of sgd"),
        ("adam", torch.optim.NAdam, "NAdam is of no kind that is known"),
        ("adam", torch.optim.AdamW, "AdamW is adamw, and metric is adam; give metric=adamw"),
        ("sgd", lambda p: torch.optim.SGD(p, maximize=True), "optimizer: it maximizes"),
    ],
)
def test_bad_metrics_and_optimizers(metric, optimizer, said):
    model = build("llama")
    made = None if optimizer is None else optimizer(list(model.parameters()))
    with pytest.raises(InputError, match=said) as raised:
        profile(model, metric, made)
    assert "\n" not in str(raised.value)


def test_state_of_another_model_is_refused_by_name():
    model, other = build("llama"), build("llama", seed=1)
    with pytest.raises(InputError, match=r"does not hold 'model.embed_tokens.weight'"):
        profile(model, "adam", torch.optim.Adam(other.parameters()))
    some = torch.optim.Adam([p for n, p in model.named_parameters() if "norm" not in n])
    with pytest.raises(InputError, match=r"does not hold 'model.layers.0.input_layernorm.weight'"):
        profile(model, "adam", some)
    optimizer = torch.optim.Adam(model.parameters())
    stepped(model, optimizer, FORGET)
    optimizer.state[model.lm_head.weight]["exp_avg"] = torch.zeros(3, 2)
    with pytest.raises(InputError, match=r"exp_avg of 'lm_head.weight' has shape \(3, 2\)"):
        profile(model, "adam", optimizer)


def test_bad_diagonals_and_objectives():
    model = build("llama")
    good = diagonal_of(model)
    for changed, said in (
        ({"no_such": torch.ones(1)}, "no trainable parameter 'no_such'"),
        ({"lm_head.weight": torch.ones(2)}, r"a tensor of shape \(2,\)"),
        ({"lm_head.weight": None}, "no tensor for 'lm_head.weight'"),
        ({"lm_head.weight": torch.tensor(-1.0)}, "'lm_head.weight' has a value that is negative"),
        ({"lm_head.weight": torch.tensor(torch.inf)}, "'lm_head.weight' has a value"),
    ):
        with pytest.raises(InputError, match=said):
            profile(model, good | changed)
    with pytest.raises(InputError, match="optimizer: a diagonal is given"):
        profile(model, good, torch.optim.Adam(model.parameters()))
    with pytest.raises(InputError, match="step_of: 'nll' is not among the objectives: ga"):
        profile(model, "adam", step_of="nll")
    with pytest.raises(InputError, match="it takes the sign of one gradient"):
        profile(model, "lion", None, ["ga", "wga(alpha=1)"])


# ---- second order ----


def second_differences(model, step, rows, extent=1e-3):
    """A risk's second derivative along a step, of fourth order in the extent (Richardson)."""

    def value(at):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(step[name], alpha=at)
            return float(loss_of(moved, rows))

    middle = value(0.0)
    wide, narrow = ((value(h) - 2 * middle + value(-h)) / h**2 for h in (2 * extent, extent))
    return (4 * narrow - wide) / 3


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "gemma2"])
def test_curvature_is_the_second_difference_along_the_real_step(architecture):
    with fp64_throughout():
        model = build(architecture, torch.float64)
        optimizer = torch.optim.AdamW(two_groups(model, weight_decay=0.5), lr=1e-2)
        stepped(model, optimizer, FORGET[:2], 2)
        result = profile(model, "adamw", optimizer, second_order=True)
        step = real_step(model, optimizer)  # the step is - lr u
        for risk, rows in (("unlearn", FORGET), ("retain", RETAIN)):
            curvature = float(result.step_curvature.sel(objective="ga", risk=risk))
            rate = float(result.step_learning_rate)
            expected = second_differences(model, step, rows)
            assert rate**2 * curvature == pytest.approx(expected, rel=1e-5)
            first = float(result.predicted_change.sel(objective="ga", risk=risk))
            second = float(result.predicted_change_second.sel(objective="ga", risk=risk))
            assert second == pytest.approx(first + rate**2 / 2 * curvature, rel=1e-9)
        assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


def test_the_second_order_comes_closer_to_what_happens():
    with fp64_throughout():
        model = build("llama", torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        stepped(model, optimizer, FORGET, 1)
        result = profile(
            model, "adamw", optimizer, ["ga", "wga(alpha=1)"], step_of="ga", second_order=True
        )
        before = [loss_of(model, rows).item() for rows in (FORGET, RETAIN)]
        stepped(model, optimizer, FORGET, 1)
        after = [loss_of(model, rows).item() for rows in (FORGET, RETAIN)]
    measured = np.array(after) - before
    off = {
        name: np.abs(result[name].sel(objective="ga").values - measured)
        for name in ("predicted_change", "predicted_change_second")
    }
    assert (off["predicted_change_second"] < 0.3 * off["predicted_change"]).all()


def test_without_a_metric_the_curvature_is_along_the_gradient():
    with fp64_throughout():
        model = build("llama", torch.float64)
        result = profile(model, None, second_order=True)
        gradient = torch.autograd.grad(-loss_of(model, FORGET), list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        step = dict(zip(names, gradient, strict=True))
        expected = second_differences(model, step, RETAIN)
    assert float(result.step_curvature.sel(risk="retain")[0]) == pytest.approx(expected, rel=1e-4)
    assert "predicted_change_second" not in result and "metric" not in result.attrs


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


def test_what_cannot_be_differentiated_twice_is_refused(monkeypatch):
    model = build("llama")
    with pytest.raises(InputError, match="second_order: risk is 'wga"):
        profile(model, None, second_order=True, risk="wga(alpha=1)")
    with pytest.raises(InputError, match="second_order: weights of 16 bits"):
        profile(build("llama").bfloat16(), None, second_order=True)
    norm = model.model.norm
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: OnceDifferentiable.apply(plain(x)))
    with pytest.raises(UnsupportedModelError, match="loses second derivatives"):
        profile(model, None, second_order=True, engine="reverse")


# ---- conflicts ----


@pytest.mark.parametrize(
    ("engine", "resolve"),
    [("reverse", ("parameter", "sample")), ("forward", ("group",)), ("reverse", ())],
)
def test_the_share_that_opposes_the_retain_gradient_is_counted_by_size(engine, resolve):
    with fp64_throughout():
        model = build("llama", torch.float64)
        names = [name for name, _ in model.named_parameters()]
        result = profile(
            model, None, None, ["ga", "gd"], engine=engine, resolve=resolve, conflicts=True
        )
        own, other = (
            torch.autograd.grad(sign * loss_of(model, rows), list(model.parameters()))
            for sign, rows in ((-1, FORGET), (1, RETAIN))
        )
    found = result.conflict_share.sel(objective="ga")
    by = next((axis for axis in ("parameter", "group") if axis in resolve), None)
    opposed = [float(g.abs()[g * r < 0].sum()) for g, r in zip(own, other, strict=True)]
    whole = [float(g.abs().sum()) for g in own]
    if by == "parameter":
        expected = {n: a / b for n, a, b in zip(names, opposed, whole, strict=True)}
        for name in names:
            assert float(found.sel(parameter=name)) == pytest.approx(expected[name], rel=1e-9)
    elif by is None:
        assert float(found) == pytest.approx(sum(opposed) / sum(whole), rel=1e-9)
    else:
        at = [i for i, name in enumerate(names) if name == "lm_head.weight"]
        share = sum(opposed[i] for i in at) / sum(whole[i] for i in at)
        assert float(found.sel(group="lm_head")) == pytest.approx(share, rel=1e-9)
    counts = [len([x for x in row["labels"][1:] if x != -100]) for row in RETAIN]
    squares = 0.0
    for row, count in zip(RETAIN, counts, strict=True):
        with fp64_throughout():
            grads = torch.autograd.grad(loss_of(model, [row]), list(model.parameters()))
        squares += sum(float(g.square().sum()) for g in grads) * (count / sum(counts)) ** 2
    trace = result.fisher_trace.sel(risk="retain").sum()
    assert float(trace) == pytest.approx(squares, rel=1e-9)
    gd = result.conflict_share.sel(objective="gd")
    assert not np.allclose(gd, found) and ((gd >= 0) & (gd <= 1)).all()
