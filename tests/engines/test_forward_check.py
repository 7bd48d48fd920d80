"""Models that forward mode cannot pass are refused before any work; the message names the cause."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import build, fp64_throughout, samples
from small_models import (
    Dropping,
    Halve,
    IgnoresPositions,
    Routed,
    SecondHead,
    WithoutPositions,
    ready,
)
from torch import nn

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import tokenize_rows
from geffect_fast.engines import forward_check
from geffect_fast.engines.forward_check import forward_mode_problem
from geffect_fast.errors import UnsupportedModelError

FORGET, RETAIN = samples([6, 9], 1), samples([5], 2)


@torch.library.custom_op("geffect_fast_tests::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


halve.register_autograd(lambda ctx, grad: grad / 2)
halve.register_fake(torch.empty_like)
torch.library.register_vmap(halve, lambda info, dims, x: (halve(x), dims[0]))


class Modern(torch.autograd.Function):
    """An operation that functorch can look into, but without `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Wrong(Modern):
    """An operation whose `jvp` forgets the factor."""

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


class Act(nn.Module):
    """An activation that halves its input first, in one of several ways."""

    def __init__(self, halved):
        super().__init__()
        self.halved = halved

    def forward(self, x):
        return F.silu(self.halved(x))


def broken(halved, dtype=torch.float32):
    """A model with the activation in one of three blocks; other ways to the logits are intact."""
    model = build("llama", dtype)
    model.model.layers[1].mlp.act_fn = Act(halved)
    return model


def problem(model, layout="packed"):
    rows = tokenize_rows(FORGET, None, name="forget")
    return forward_mode_problem(Plan.of(model), rows, layout)


def run(model, **settings):
    given = {"objectives": ["ga"], "resolve": ["group"], "norms": False, "engine": "forward"}
    return gf.profile(model, None, forget=FORGET, retain=RETAIN, **(given | settings))


MODULE = r"module 'model\.layers\.1\.mlp\.act_fn' \(Act\) has no forward-mode derivative: "
LOST = (
    r"parameter 'model\.layers\.1\.mlp\.gate_proj\.weight': forward mode gives {} times "
    r"the derivative that reverse mode gives, so some code between this parameter and the logits "
    r"drops tangents$"
)
PROBLEMS = {
    "custom op": (halve, LOST.format("0")),
    "function": (Halve.apply, MODULE),
    "modern function": (Modern.apply, MODULE + "You must implement the jvp function"),
    "wrong derivative": (Wrong.apply, LOST.format(r"(2|2\.00\d|1\.99\d)")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("custom op", dtype) for dtype in forward_check.TOLERANCE]
    + [(name, torch.float32) for name in ("function", "modern function")]
    + [("wrong derivative", torch.bfloat16)],
    ids=str,
)
def test_code_that_forward_mode_does_not_pass(name, dtype):
    """Half precision is refused too, where one lost share is less than the rounding of all."""
    halved, message = PROBLEMS[name]
    found = problem(broken(halved, dtype))
    assert re.match(message, found), found
    assert "\n" not in found and len(found) < 350


@pytest.mark.parametrize("name", ["custom op", "modern function"])
def test_a_profile_says_so_before_any_work_or_is_served_by_the_other_engine(name, monkeypatch):
    halved, message = PROBLEMS[name]
    model, several = broken(halved), ["ga", "wga", "npo", "tnpo", "satimp", "simnpo"]
    auto = run(model, engine="auto", objectives=several, resolve=["sample"])
    assert auto.attrs["engine"] == "reverse"
    assert re.match(message, auto.attrs["engine_reason"])
    expected = run(model, engine="reverse", objectives=several, resolve=["sample"])
    assert (auto.g_effect.values == expected.g_effect.values).all()
    monkeypatch.setattr(
        "geffect_fast.measure.profiler.accumulate_gradients", None
    )  # the first work
    refused = f"^engine forward: {message.rstrip('$')}.*; use engine='reverse', without 'token'$"
    for settings in ({}, {"resolve": ["token"], "engine": "auto"}):
        with pytest.raises(UnsupportedModelError, match=refused):
            run(model, **settings)


@pytest.mark.parametrize("how", ["activation", "weight"])
def test_data_is_constant_to_both_engines(how):
    class Reads(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            if how == "activation":
                return self.linear(x * x.data.sigmoid())
            return self.linear(x) + F.linear(x, self.linear.weight.data)

    with fp64_throughout():
        model = build("llama", torch.float64)
        mlp = model.model.layers[1].mlp
        mlp.down_proj = Reads(mlp.down_proj)
        assert problem(model) is None
        torch.testing.assert_close(
            torch.from_numpy(run(model).g_effect.values),
            torch.from_numpy(run(model, engine="reverse").g_effect.values),
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize("kind", [WithoutPositions, IgnoresPositions, Routed, Dropping, SecondHead])
def test_other_models_pass(kind):
    """Answers of other kinds, routing by hand, assignments in place, weights used elsewhere."""
    model = ready(kind)
    found, expected = (run(model, engine=engine, resolve=["sample"]) for engine in
                       ("forward", "reverse"))  # fmt: skip
    assert found.attrs["engine"] == "forward"
    torch.testing.assert_close(
        torch.from_numpy(found.g_effect.values),
        torch.from_numpy(expected.g_effect.values),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["opt", "gpt2", "exaone4", "stablelm", "mixtral"])
def test_rounding_is_no_problem(name, dtype):
    """A key's bias has a gradient of pure rounding error, which is no reason to refuse."""
    assert problem(build(name, dtype), "equal_length" if name == "opt" else "packed") is None


def test_nothing_to_compare():
    """Every gradient is zero, as before the first step of some adapters."""

    class Zero(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.inner(x) + 0 * self.weight

    model = build("llama").requires_grad_(False)
    model.model.norm = Zero(model.model.norm)
    assert problem(model) is None
    assert not run(model).g_effect.values.any()


@pytest.mark.parametrize("name", [None, "function", "wrong derivative"])
def test_the_trial_does_not_disturb(name):
    model = build("llama") if name is None else broken(PROBLEMS[name][0])
    model.lm_head.weight.requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(2)

    def state():
        return [
            (
                m.training,
                dict(m._forward_hooks),
                dict(m._forward_pre_hooks),
                [(k, id(p)) for k, p in m._parameters.items()],
                [(p.requires_grad, p.grad) for p in m.parameters(recurse=False)],
                vars(m).get("forward"),
                dict(vars(m.config)) if hasattr(m, "config") else None,
            )
            for m in model.modules()
        ]

    torch.manual_seed(5)
    before = state()
    assert (problem(model) is None) == (name is None)
    assert state() == before
    assert torch.equal(torch.rand(2), expected)
    assert torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0
