"""Inner products of the generic rule: a jvp a direction where this is exact, else vjps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build, samples
from torch import Tensor, nn

import geffect_fast as gf
from geffect_fast.capture import Explicit, Plan, Recorder, Segments
from geffect_fast.capture.generic_rule import _in_groups
from geffect_fast.capture.products import inner
from geffect_fast.capture.segments import Rows

N, T, D = 6, 4, 5


class Silent(torch.autograd.Function):
    """A product with a backward, whose forward-mode rule says that nothing moves."""

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, -2).sum(0)

    @staticmethod
    def jvp(ctx, x_t, w_t):
        return torch.zeros_like(ctx.saved_tensors[0])


class Reverse(torch.autograd.Function):
    """The same product without any forward-mode rule."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    backward = Silent.backward


class Scaled(nn.Module):
    """`tanh(x * w)`, where the module itself uses `w` once, so that no fast rule fits."""

    def __init__(self, product):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D))
        self.product = product

    def forward(self, x):
        return torch.tanh(self.product(x, self.w)).cumsum(-2)


class Model(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.scaled = Scaled(product)

    def forward(self, x):
        return self.scaled(self.first(x))


PRODUCTS = {
    "jvp": (lambda x, w: x * w, True),
    "silent": (Silent.apply, False),
    "none": (Reverse.apply, False),
}


def watched_factor(factor):
    """The same factor, and a list of the samples whose gradients are asked for one by one."""
    asked = []

    def vjp(i):
        if i is not None:
            asked.append(i)
        return factor.vjp(i)

    return Explicit(vjp, factor.jvp, factor.n_samples), asked


def explicit_factor(model: nn.Module, x: Tensor, per_token: bool) -> Explicit:
    plan = Plan.of(model)
    found = {}
    axis = Segments.tokens((N, T)) if per_token else Segments.rectangular((N, T))
    with plan.frozen(), Recorder(plan, lambda n, f, _: found.update({n: f}), axis) as recorder:
        (model(x) ** 2).sum().backward(inputs=recorder.roots)
        recorder.finish()
        (factor,) = found["scaled.w"]
    assert isinstance(factor, Explicit)
    return factor


@pytest.mark.parametrize("per_token", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_equals_a_vjp_a_sample(name, per_token, monkeypatch):
    product, moves = PRODUCTS[name]
    torch.manual_seed(0)
    model, x = Model(product).double().eval(), torch.randn(N, T, D, dtype=torch.float64)
    directions = torch.randn(2, D, dtype=torch.float64)
    factor = explicit_factor(model, x, per_token)
    n = N * T if per_token else N
    assert factor.n_samples == n
    expected = torch.stack([directions @ factor.vjp(i) for i in range(n)], dim=1)
    watched, asked = watched_factor(factor)
    torch.testing.assert_close(inner(watched, directions), expected, rtol=1e-10, atol=1e-12)
    assert asked == ([] if moves else list(range(n)))
    # With as many directions as samples, vjps are not dearer.
    many = torch.randn(n, D, dtype=torch.float64)
    inner(watched, many)
    assert asked[-n:] == list(range(n))


def test_samples_equal_plain_autograd():
    torch.manual_seed(0)
    model, x = Model(PRODUCTS["jvp"][0]).double().eval(), torch.randn(N, T, D, dtype=torch.float64)
    directions = torch.randn(2, D, dtype=torch.float64)
    found = inner(explicit_factor(model, x, False), directions)
    for i in range(N):
        (grad,) = torch.autograd.grad((model(x[i : i + 1]) ** 2).sum(), [model.scaled.w])
        torch.testing.assert_close(found[:, i], directions @ grad, rtol=1e-10, atol=1e-12)


class Chain(nn.Module):
    """`tanh(x * w)` over and over, without a module for each weight; and a table in the end."""

    def __init__(self, depth):
        super().__init__()
        self.steps = nn.ParameterList(torch.randn(D) for _ in range(depth))
        self.table = nn.Parameter(torch.randn(D, 9 * D))

    def forward(self, x):
        for w in self.steps:
            x = torch.tanh(x * w)
        return x @ self.table


def test_small_parameters_of_a_module_share_their_backwards(monkeypatch):
    """One backward for all of them and each sample; gradients that wait are no more than one of the
    module's own, whatever the number of samples."""
    torch.manual_seed(0)
    model, x = Chain(7).double().eval(), torch.randn(N, T, D, dtype=torch.float64)
    asked = []
    grad = torch.autograd.grad

    def counted(outputs, inputs, *args, **kwargs):
        asked.append(sum(leaf.numel() for leaf in inputs))
        return grad(outputs, inputs, *args, **kwargs)

    def loss_fn(m, batch):
        return (m(batch) ** 2).sum((1, 2))

    gf.functional.per_sample_grad_norms(model, loss_fn, x)  # shows that rows belong to samples
    monkeypatch.setattr(torch.autograd, "grad", counted)
    found = gf.functional.per_sample_grad_norms(model, loss_fn, x)
    monkeypatch.undo()
    assert asked[1:] == [7 * D] * N + [9 * D * D] * N
    for i in range(N):
        own = torch.autograd.grad(loss_fn(model, x[i : i + 1]).sum(), list(model.parameters()))
        assert found[i] == pytest.approx(float(torch.cat([g.flatten() for g in own]).norm()))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 6))
def test_groups_of_parameters_take_no_more_memory_than_the_module(sizes, n):
    groups = _in_groups(sizes, n)
    assert sorted(k for group in groups for k in group) == list(range(len(sizes)))
    assert all(len(g) == 1 or n * sum(sizes[k] for k in g) <= sum(sizes) for g in groups)
    assert n > 1 or len(groups) == 1


def test_half_precision_keeps_wide_directions():
    """The samples' own vjps are taken, as rounding a direction to bf16 would cost digits."""
    torch.manual_seed(0)
    model = Model(PRODUCTS["jvp"][0]).bfloat16().eval()
    factor = explicit_factor(model, torch.randn(N, T, D, dtype=torch.bfloat16), False)
    watched, asked = watched_factor(factor)
    inner(watched, torch.randn(2, D))
    assert asked == list(range(N))


def test_experts_as_grouped_products(monkeypatch):
    """torch's grouped product has no forward-mode rule; another form of experts gives the same."""
    pytest.importorskip("transformers")
    model = build("mixtral")
    assert model.config._experts_implementation == "grouped_mm"
    masked = []
    only = Rows.only
    monkeypatch.setattr(Rows, "only", lambda self, g, i: masked.append(i) or only(self, g, i))
    rows = samples([5, 9, 7, 4, 6, 8])
    gf.profile(model, None, forget=rows, retain=rows, objectives=["ga"], resolve=("sample",))
    assert max(masked) == 1  # only the search for a layout takes vjps, of two samples
    assert model.config._experts_implementation == "grouped_mm"
