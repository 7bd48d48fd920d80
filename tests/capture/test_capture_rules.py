"""Every layer's factors against autograd, one sample at a time, in fp64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from layer_cases import CASES, VOCAB, D
from models import fp64_throughout
from torch import nn

from geffect_fast.capture import Plan, Recorder, Recording, Segments
from geffect_fast.capture.factors import summed_gradient
from geffect_fast.capture.layer_rules import Call
from geffect_fast.capture.products import inner, pairwise, squared_norms
from geffect_fast.functional import per_sample_grad_norms

TOLERANCE = 1e-10
RECTANGLE = (3, 6)
LENGTHS = (5, 1, 3)


@pytest.fixture(autouse=True)
def exact():
    with fp64_throughout():
        yield


def build(name):
    torch.manual_seed(0)
    model = CASES[name].build().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def inputs(name, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = CASES[name].reads
    if kind == "floats":
        return torch.randn(*shape, D, generator=generator, dtype=torch.float64)
    return torch.randint(0, VOCAB if kind == "ids" else D, shape, generator=generator)


def cut(x, segments):
    """Each sample's own input, `(1, length)` or `(1, length, D)`."""
    if segments.token_offsets:
        return x.split(segments.token_offsets[0].lengths, dim=1)
    return x.split(1)


def loss(y):
    return torch.sin(y + torch.arange(y.shape[-1])).sum()


def expected(model, x, segments):
    """The gradient of every sample, `(n_samples, *shape)`, by parameter name."""
    names, params = zip(*model.named_parameters(), strict=True)
    rows = []
    for own in cut(x, segments):
        grads = torch.autograd.grad(loss(model(own)), params, allow_unused=True)
        rows.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
        )
    return {name: torch.stack(g) for name, g in zip(names, zip(*rows, strict=True), strict=True)}


def record(model, x, segments, *, directions=None, frozen=True, join=True):
    """The factors of every parameter, and what was kept for them, by parameter name."""
    plan, found = Plan.of(model), {}

    def keep(name, factors, kept):
        old = found.get(name, ([], []))
        found[name] = (old[0] + factors, old[1] + kept)

    with Recorder(plan, keep, segments, Recording(join, directions=directions)) as recorder:
        if frozen:
            with plan.frozen():
                torch.autograd.grad(loss(model(x)), recorder.roots)
        else:
            torch.autograd.grad(loss(model(x)), list(model.parameters()), allow_unused=True)
        recorder.finish()
    return found


def batches(name):
    """Inputs with their sample axis: rectangular, and packed where the model can be packed."""
    rectangle = (inputs(name, RECTANGLE, 1), Segments.rectangular(RECTANGLE))
    if not CASES[name].packed:
        return [rectangle]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    return [rectangle, (inputs(name, (1, sum(LENGTHS)), 2), Segments.packed(offsets))]


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted.to(actual), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_norms_and_products(name, frozen):
    model = build(name)
    for x, segments in batches(name):
        wanted = expected(model, x, segments)
        assert any(bool(g.any()) for g in wanted.values())
        found = record(model, x, segments, frozen=frozen)
        for parameter, p in model.named_parameters():
            if parameter not in found:
                assert not wanted[parameter].any()
                continue
            factors, _ = found[parameter]
            own = wanted[parameter]
            for i in range(len(own)):
                close(summed_gradient(factors, i, p.shape), own[i])
            close(squared_norms(factors, p.shape), own.flatten(1).square().sum(1))
            v = torch.randn(2, *p.shape, generator=torch.Generator().manual_seed(5)).double()
            close(sum(inner(f, v) for f in factors), v.flatten(1) @ own.flatten(1).T)


@pytest.mark.parametrize("name", CASES)
def test_kept_projections_give_the_same_products(name):
    model = build(name)
    generator = torch.Generator().manual_seed(5)
    directions = {
        k: torch.randn(2, *p.shape, generator=generator).double()
        for k, p in model.named_parameters()
    }
    for x, segments in batches(name):
        wanted = expected(model, x, segments)
        found = record(model, x, segments, directions=directions, join=False)
        for parameter, (factors, kept) in found.items():
            v = directions[parameter]
            score = sum(inner(f, v, z) for f, z in zip(factors, kept, strict=True))
            close(score, v.flatten(1) @ wanted[parameter].flatten(1).T)


@pytest.mark.parametrize("name", CASES)
def test_all_pairs(name):
    model = build(name)
    (x, segments), *_ = batches(name)
    other = inputs(name, (2, 4), 9)
    axis = Segments.rectangular((2, 4))
    a, b = record(model, x, segments), record(model, other, axis)
    left, right = expected(model, x, segments), expected(model, other, axis)
    for parameter, p in model.named_parameters():
        if parameter in a:
            products = pairwise(a[parameter][0], b[parameter][0], p.shape)
            close(products, left[parameter].flatten(1) @ right[parameter].flatten(1).T)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.forms])
def test_the_rule_is_the_fast_one_exactly_where_it_may_be(name):
    found = record(build(name), *batches(name)[0])
    for parameter, form in CASES[name].forms.items():
        assert {type(f) for f in found[parameter][0]} == {form}


@pytest.mark.parametrize("name", CASES)
def test_one_sample_has_any_rows(name):
    """A single sample needs no sample axis: all rows belong to it, whatever the module does."""
    model = build(name)
    x = inputs(name, (1, 5), 3)
    segments = Segments.rectangular((1, 5))
    wanted = expected(model, x, segments)
    for parameter, (factors, _) in record(model, x, segments).items():
        p = model.get_parameter(parameter)
        close(summed_gradient(factors, 0, p.shape), wanted[parameter][0])


def test_two_rows_a_sample():
    model = build("tied_linear_embedding")
    x = inputs("tied_linear_embedding", (6, 4), 1)
    segments = Segments.rectangular((6, 4), rows_per_sample=2)
    single = expected(model, x, Segments.rectangular((6, 4)))
    for parameter, (factors, _) in record(model, x, segments).items():
        own = single[parameter].unflatten(0, (3, 2)).sum(1)
        shape = own.shape[1:]
        for i in range(3):
            close(summed_gradient(factors, i, shape), own[i])
        close(squared_norms(factors, shape), own.flatten(1).square().sum(1))


def test_the_page_on_a_rule_of_ones_own_is_right(monkeypatch):
    monkeypatch.setattr(Call, "rules", dict(Call.rules))
    page = Path(__file__).parents[2] / "docs" / "adding_an_architecture.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {"__name__": "my_model"}
    exec(compile("\n".join(blocks), str(page), "exec", dont_inherit=True), namespace)
    model = nn.Sequential(nn.Linear(D, D), namespace["Gain"](D)).double().eval()
    x = torch.randn(3, 4, D, dtype=torch.float64)
    assert Plan.of(model).owners["1"].rule is namespace["GainCall"]
    found = per_sample_grad_norms(
        model, lambda m, x: torch.sin(m(x)).sum((1, 2)), x, per_parameter=True
    )
    alone = [
        torch.autograd.grad(torch.sin(model(row)).sum(), model[1].weight)[0].norm() for row in x
    ]
    torch.testing.assert_close(found["1.weight"], torch.stack(alone))
