"""Every rule against the same rule written out on flat vectors, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from explicit import Explicit, OfRows, flat, trained
from models import build, fp64_throughout, samples

from geffect_fast.errors import InputError
from geffect_fast.updates import Updater, parse

FORGET = samples([7, 12], 1, 2)
RETAIN = [*samples([9, 9], 2, 3), {key: row[2:8] for key, row in FORGET[1].items()}]
"""Retain rows, one of them a part of a forget row, so that gradients conflict."""
SMOOTHINGS = [
    "sam(rho=0.05)",
    "sam(rho=0)",
    "sam(rho=0, sigma=0.02, draws=3)",
    "sam(rho=0.05, sigma=0.02, draws=2)",
    "sam(rho=0.05, sigma=0.02, ascent=false)",
    "sam(rho=0.05, ascent=false, penalty=0.5)",
    "sam(rho=0.05, penalty=0.5)",
    "sam(rho=0.05, ascent=false, curvature=2)",
    "sam(rho=0.05, sigma=0.01, penalty=0.2, curvature=1)",
]
RULES = [
    "sgd",
    "orthograd(rank_tol=1e-10)",
    "gru",
    "gru(gamma=0.3)",
    "gu",
    "blur",
    "pcgrad",
    "pcgrad(by_tensor=false)",
    "pcgrad(both=true)",
    "pcgrad(by_tensor=false, both=true)",
    "sago",
    *SMOOTHINGS,
]
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.002),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.002, weight_decay=0.1),
}


def steps(text, make, *, weight=1.0, n=10, architecture="llama_tied"):
    """Weights after every step, by the rule and by the rule written out."""
    rule = parse(text)
    model = build(architecture, torch.float64)
    other = copy.deepcopy(model)
    updater, explicit = Updater(rule, model), Explicit(other, FORGET, RETAIN, weight)
    ours, theirs = make(trained(model)), make(trained(other))
    arguments = {
        k: v for k, v in rule.parameters().items() if k not in ("rank_tol", "room", "seed")
    }
    for number in range(n):
        ours.zero_grad()
        updater.update(OfRows(model, FORGET, RETAIN, retain_weight=weight), ours)
        ours.step()
        explicit.number = number
        g = getattr(explicit, rule.name)(theirs, **arguments)
        for p, piece in zip(
            trained(other), g.split([p.numel() for p in trained(other)]), strict=True
        ):
            p.grad = piece.view_as(p).clone()
        theirs.step()
        yield flat(trained(model), trained(model)), flat(trained(other), trained(other))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("text", RULES)
def test_ten_steps_are_those_of_the_rule_written_out(text, optimizer):
    with fp64_throughout():
        first = None
        for ours, theirs in steps(text, OPTIMIZERS[optimizer]):
            first = ours if first is None else first
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        assert float((ours - first).abs().max()) > 1e-3


@pytest.mark.parametrize("text", [t for t in RULES if t not in ("sgd", "sam(rho=0)")])
def test_a_rule_is_not_the_plain_gradient(text):
    """The rows are such that every rule changes the gradient."""
    model = build("llama_tied", torch.float64)
    explicit = Explicit(model, FORGET, RETAIN)
    optimizer = OPTIMIZERS["adam"](trained(model))
    Updater(parse(text), model).update(OfRows(model, FORGET, RETAIN), optimizer)
    found, plain = flat([p.grad for p in trained(model)], trained(model)), explicit.sgd(None)
    assert float((found - plain).norm() / plain.norm()) > 1e-3


def test_the_plain_gradient_is_the_plain_gradient():
    model = build("llama_tied", torch.float64)
    Updater(parse("sam(rho=0)"), model).update(OfRows(model, FORGET, RETAIN))
    found = flat([p.grad for p in trained(model)], trained(model))
    torch.testing.assert_close(found, Explicit(model, FORGET, RETAIN).sgd(None))


@pytest.mark.parametrize("text", ["orthograd(rank_tol=1e-10)", "gru", "gu", "pcgrad"])
def test_a_retain_loss_that_is_only_protected_is_not_descended_on(text):
    with fp64_throughout():
        for ours, theirs in steps(text, OPTIMIZERS["adamw"], weight=0.0, n=3):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight", [0.5, 2.0])
@pytest.mark.parametrize("text", ["orthograd", "blur", "sago", "pcgrad(both=true)", "sam"])
def test_a_weight_of_the_retain_loss_counts(text, weight):
    with fp64_throughout():
        for ours, theirs in steps(text, OPTIMIZERS["sgd"], weight=weight, n=2):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_every_rule_is_tested():
    from geffect_fast.updates import available

    assert {parse(text).name for text in RULES} == {*available()}


def test_a_penalty_is_that_of_autograd():
    """(f1 - f) / rho is the gradient of |f|, as differentiating twice finds it, up to O(rho)."""
    with fp64_throughout():
        model = build("llama", torch.float64)
        model.set_attn_implementation("eager")
        explicit = Explicit(model, FORGET, RETAIN, 0.0)
        f = explicit.f()
        loss = explicit.forget_loss()
        first = torch.autograd.grad(loss, trained(model), create_graph=True)
        norm = torch.cat([g.flatten() for g in first]).norm()
        exact = flat(torch.autograd.grad(norm, trained(model)), trained(model))
        rule = parse("sam(rho=1e-5, ascent=false, penalty=3)")
        Updater(rule, model).update(OfRows(model, FORGET, RETAIN, retain_weight=0.0))
        found = (flat([p.grad for p in trained(model)], trained(model)) - f) / 3
        assert float((found - exact).norm() / exact.norm()) < 1e-3


def test_a_curvature_is_that_of_autograd():
    """The gradient of |f(theta + e) - f(theta)|^2 at a fixed e, as autograd finds it."""
    with fp64_throughout():
        model = build("llama", torch.float64)
        model.set_attn_implementation("eager")
        explicit = Explicit(model, FORGET, RETAIN, 0.0)
        f, rho = explicit.f(), 1e-4
        pieces = (rho * f / f.norm()).split([p.numel() for p in trained(model)])
        named = dict(model.named_parameters())
        moved = {k: p + e.view_as(p) for (k, p), e in zip(named.items(), pieces, strict=True)}

        def gradients(weights):
            loss = torch.func.functional_call(
                explicit, {f"model.{k}": v for k, v in weights.items()}, ()
            )
            return torch.autograd.grad(loss, [*weights.values()], create_graph=True)

        differences = [x - y for x, y in zip(gradients(moved), gradients(named), strict=True)]
        square = sum(d.square().sum() for d in differences)
        exact = flat(torch.autograd.grad(square, trained(model)), trained(model))
        rule = parse(f"sam(rho={rho}, ascent=false, curvature=10)")
        Updater(rule, model).update(OfRows(model, FORGET, RETAIN, retain_weight=0.0))
        found = (flat([p.grad for p in trained(model)], trained(model)) - f) / 10
        assert float((found - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("sgd", ["forget", "retain"]),
        ("orthograd", ["forget"]),
        ("gru", ["forget", "retain"]),
        ("sam", ["forget", "retain", "forget"]),
        ("sam(ascent=false, penalty=1)", ["forget", "retain", "forget"]),
        ("sam(penalty=1)", ["forget", "retain", "forget"]),
        ("sam(curvature=1, penalty=1)", ["forget", "retain", *["forget"] * 3]),
        ("sam(rho=0, sigma=0.1, draws=4)", ["forget", "retain", *["forget"] * 4]),
    ],
)
def test_no_pass_is_taken_twice(text, passes):
    model = build("llama")
    losses = OfRows(model, FORGET, RETAIN)
    Updater(parse(text), model).update(losses)
    assert losses.passes == passes


@pytest.mark.parametrize("text", RULES)
def test_weights_are_bitwise_what_they_were(text):
    """Moving and moving back rounds no weight; the value is the objective's."""
    model = build("llama")
    before = flat(trained(model), trained(model)).clone()
    losses = OfRows(model, FORGET, RETAIN)
    value = Updater(parse(text), model).update(losses, OPTIMIZERS["adam"](trained(model)))
    assert torch.equal(flat(trained(model), trained(model)), before)
    explicit = Explicit(model, FORGET, RETAIN)
    expected = float(explicit.forget_loss() + explicit.retain_loss())
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", ["sgd", "orthograd", "gru", "gu", "pcgrad", "blur", "sago", "sam"])
def test_frozen_parameters_take_no_part(text):
    """Inner products and norms are of trained parameters only, such as an adapter's."""
    with fp64_throughout():
        model = build("llama", torch.float64)
        for name, p in model.named_parameters():
            p.requires_grad_("q_proj" in name or "norm" in name)
        rule = parse(text)
        optimizer = OPTIMIZERS["adam"](trained(model))
        Updater(rule, model).update(OfRows(model, FORGET, RETAIN), optimizer)
        found = flat([p.grad for p in trained(model)], trained(model))
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        expected = getattr(Explicit(model, FORGET, RETAIN), rule.name)(optimizer)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_what_is_remembered_goes_on():
    """A rule's memory is saved and loaded, and belongs to one rule and one model."""
    model = build("llama", torch.float64)
    first, second = (Updater(parse("gru(gamma=0.3)"), model) for _ in range(2))

    def gradient(updater, retain):
        updater.update(OfRows(model, FORGET, retain))
        found = flat([p.grad for p in trained(model)], trained(model))
        for p in trained(model):
            p.grad = None
        return found

    gradient(first, RETAIN)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    anew = Updater(parse("gru(gamma=0.3)"), model)
    more = [*samples([5, 8], 7, 2), RETAIN[2]]
    assert torch.equal(gradient(first, more), gradient(second, more))
    assert second.updates == 2
    assert not torch.equal(gradient(first, more), gradient(anew, more))
    with pytest.raises(InputError, match=r"the state is of gru\(gamma=0.3\); resume with that"):
        Updater(parse("gru"), model).load_state_dict(first.state_dict())
    with pytest.raises(InputError, match=r"smoothed gradient of .* is of another model"):
        Updater(first.rule, build("gpt2")).load_state_dict(first.state_dict())


def test_a_failed_update_leaves_nothing():
    model = build("llama")
    updater = Updater(parse("gru"), model)

    class Fails(OfRows):
        def retain(self):
            super().retain()
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        updater.update(Fails(model, FORGET, RETAIN))
    assert all(p.grad is None for p in model.parameters())
    assert updater.updates == 0 and updater.state_dict()["memory"] == {}


def test_what_a_rule_does_not_declare_it_does_not_get():
    model = build("llama")

    class Undeclared(type(parse("sgd"))):
        def apply(self, step):
            step.row_products(step.forget(), 1.0)

    with pytest.raises(AssertionError, match="does not declare retain_rows"):
        Updater(Undeclared(), model).update(OfRows(model, FORGET, RETAIN))


@pytest.mark.parametrize("text", ["blur", "sago"])
def test_a_rule_that_adds_the_retain_gradient_needs_a_retain_part(text):
    model = build("llama")
    with pytest.raises(InputError, match="the objective has no retain part; add one"):
        Updater(parse(text), model).update(OfRows(model, FORGET, RETAIN, retain_weight=0.0))


def test_weights_that_a_move_is_lost_in_are_refused():
    with pytest.raises(InputError, match="in bfloat16 rounds away; train in float32"):
        Updater(parse("sam"), build("llama", torch.bfloat16))


class TestOptimizers:
    def test_one_that_it_does_not_know(self):
        model = build("llama")
        with pytest.raises(InputError, match="does not know that of Adagrad; use sgd, adam"):
            Updater(parse("gu"), model).check(torch.optim.Adagrad(model.parameters()))
        Updater(parse("gru"), model).check(torch.optim.Adagrad(model.parameters()))

    def test_none(self):
        model = build("llama")
        with pytest.raises(InputError, match="does not know that of no optimizer"):
            Updater(parse("gu"), model).update(OfRows(model, FORGET, RETAIN))

    def test_that_of_another_model(self):
        model = build("llama")
        other = torch.optim.AdamW(build("llama").parameters())
        with pytest.raises(InputError, match=r"does not hold '.*' of the model; make it from"):
            Updater(parse("gu"), model).check(other)

    def test_the_state_of_another_model(self):
        model = build("llama")
        optimizer = torch.optim.AdamW(model.parameters())
        p = next(model.parameters())
        optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg_sq": torch.ones(3)}
        with pytest.raises(InputError, match=r"has shape \(3,\).*of another model: give this"):
            Updater(parse("gu"), model).check(optimizer)
