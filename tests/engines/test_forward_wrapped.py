"""The forward engine on models inside something else: every row of `measure/wrapped_cases.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines.forward_cases import close
from measure.wrapped_cases import AUTOCAST, CASES
from models import build, fp64_throughout, samples

import geffect_fast as gf
from geffect_fast.engines.dual import model as dual_model
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.measure import prepare

pytestmark = pytest.mark.slow

FORGET, RETAIN = samples([5, 5], 1), samples([6], 2)


def run(model, engine, **kwargs):
    settings = {"objectives": ["wga"], "resolve": ["sample"], "norms": False}
    return gf.profile(
        model, None, forget=FORGET, retain=RETAIN, engine=engine, **(settings | kwargs)
    )


def slots(model):
    """Every parameter at every place where a module holds it, by all names of the module."""
    return {
        (where, key): p
        for where, module in model.named_modules(remove_duplicate=False)
        for key, p in module._parameters.items()
    }


def state(model):
    """The switches that the engine sets during a pass."""
    return (
        [(m.training, vars(m).get("gradient_checkpointing")) for m in model.modules()],
        [vars(m).get("forward") for m in model.modules()],
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [dict(vars(m.config)) for m in model.modules() if hasattr(m, "config")],
    )


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.forward is None])
def test_forward_equals_reverse(name):
    with fp64_throughout():
        model = CASES[name].build(torch.float64)
        expected = run(model, "reverse")
        held, before = slots(model), state(model)
        found = run(model, "forward")
        close(found.g_effect, expected.g_effect, 1e-10)
    assert found.attrs["layout"] == CASES[name].layout
    now = slots(model)
    assert now.keys() == held.keys() and all(now[slot] is p for slot, p in held.items())
    assert state(model) == before


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.forward is not None])
def test_what_forward_mode_cannot_pass_is_named(name):
    model = CASES[name].build(torch.float32)
    held, before = slots(model), state(model)
    message = rf"^engine forward: module '.*' \({CASES[name].forward}\) has no forward-mode deriv"
    with pytest.raises(UnsupportedModelError, match=message):
        run(model, "forward")
    now = slots(model)
    assert all(now[slot] is p for slot, p in held.items()) and state(model) == before


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name):
    """The error is at most twice the reverse engine's under autocast, plus that of bf16 itself."""
    model = AUTOCAST[name](torch.float32)
    errors = {}
    exact = run(model, "reverse").g_effect
    for engine in ("reverse", "forward"):
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model, engine).g_effect
        errors[engine] = float(np.abs(found - exact).max() / np.abs(exact).max())
    assert 1e-4 < errors["forward"] <= 2 * errors["reverse"] + 2**-8


def test_frozen_parameters_do_not_move():
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        for name, p in model.named_parameters():
            p.requires_grad_("layers.1" in name or "layers.0.mlp" in name)
        found = run(model, "forward", resolve=["group", "sample"])
        expected = run(model, "reverse", resolve=["group", "sample"])
    close(found.g_effect, expected.g_effect, 1e-10)
    assert list(found.group.values) == ["shallow", "middle"]


@pytest.mark.parametrize("where", ["model", "terms", "loss"])
def test_an_error_inside_leaves_everything_as_it_was(where, monkeypatch):
    """Errors from outside the package leave everything as it was, too."""
    model = CASES["checkpointed_adapter"].build(torch.float32)
    held, before = slots(model), state(model)
    objective = gf.objectives.WGA(alpha=0.5)

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    if where == "model":
        monkeypatch.setattr(dual_model, "model_outputs", stop)
        monkeypatch.setattr(prepare, "forward_mode_problem", lambda *_: None)
    else:
        name = {"terms": "token_terms", "loss": "loss"}[where]
        monkeypatch.setattr(gf.objectives.WGA, name, stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, "forward", objectives=[objective])
    monkeypatch.undo()
    now = slots(model)
    assert all(now[slot] is p for slot, p in held.items()) and state(model) == before
    assert torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0
    close(run(model, "forward").g_effect, run(model, "reverse").g_effect, 1e-4)
