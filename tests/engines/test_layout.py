"""Models that cannot be packed are detected, and profiled exactly all the same."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from models import FIVE, build, fp64_throughout, samples
from reference import effects
from small_models import (
    Answer,
    Dropping,
    IgnoresPositions,
    Logits,
    Routed,
    SecondHead,
    WithoutPositions,
    ready,
)

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import tokenize_rows
from geffect_fast.engines.known_models import choose_layout
from geffect_fast.errors import UnsupportedModelError

FORGET, RETAIN = [5, 2, 9, 5], [6, 9, 6]

MODELS = {
    "bloom": (ARCHITECTURES["bloom"], "equal_length"),
    "without_positions": (WithoutPositions, "equal_length"),
    "ignores_positions": (IgnoresPositions, "equal_length"),
    "routed": (Routed, "single"),
    "second_head": (SecondHead, "single"),
}

OBJECTIVES = {
    "ga": [(1.0, "ga", {})],
    "dpo(beta=0.2)": [(1.0, "dpo", {"beta": 0.2})],
    "npo(beta=0.1) + kl": [(1.0, "npo", {"beta": 0.1}), (1.0, "kl", {})],
    "po + 0.5*nll": [(1.0, "po", {}), (0.5, "nll", {})],
}


def layout_of(model, lengths=(9, 12, 4)):
    rows = samples(list(lengths), 1)
    return choose_layout(Plan.of(model), tokenize_rows(rows, None, name="forget"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_layout_of_models_that_cannot_be_packed(name, dtype):
    builder, layout = MODELS[name]
    assert layout_of(ready(builder, dtype)) == layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FIVE)
def test_layout_of_models_that_can(name, dtype):
    assert layout_of(build(name, dtype)) == "packed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_that_take_from_each_other_are_run_alone(dtype):
    """A router with a capacity is exact where one sequence runs at a time, as for all but pairs."""
    forget, retain, _ = data()
    model = ready(Dropping, dtype)
    result = gf.profile(model, None, forget=forget, retain=retain, objectives=["gd"])
    assert result.attrs["layout"] == "single"
    objective = [(1.0, "ga", {}), (1.0, "nll", {})]
    expected = effects(Logits(model), Logits(model), objective, forget, retain, None)
    scale = 1e-5 if dtype == torch.float32 else 1e-10
    found = torch.from_numpy(result.g_effect[0].values)
    torch.testing.assert_close(found, expected, rtol=0, atol=scale * float(expected.abs().max()))


def test_layout_from_one_short_sample():
    assert layout_of(build("llama"), [2]) == "packed"
    assert layout_of(ready(ARCHITECTURES["bloom"]), [3]) == "equal_length"


def data():
    forget, retain = samples(FORGET, 1, 2), samples(RETAIN, 2, 2)
    alternatives = [[a] for a in samples([n + 3 - 2 * (i % 2) for i, n in enumerate(FORGET)], 3, 1)]
    alternatives[0] += samples([4, 8], 4, 1)
    rows = [row | {"alternative": other} for row, other in zip(forget, alternatives, strict=True)]
    return rows, retain, alternatives


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_profile_equals_one_sample_at_a_time(name, norms):
    builder, layout = MODELS[name]
    forget, retain, alternatives = data()
    with fp64_throughout():
        model, other = ready(builder), ready(builder, seed=1)
        result = gf.profile(
            model,
            None,
            forget=forget,
            retain=retain,
            objectives=list(OBJECTIVES),
            reference_model=other,
            norms=norms,
            token_budget=40,
        )
        assert result.attrs["layout"] == layout
        for k, objective in enumerate(OBJECTIVES.values()):
            expected = effects(
                Logits(model), Logits(other), objective, forget, retain, alternatives
            )
            found = torch.from_numpy(result.g_effect[k].values)
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max())
            )


def test_an_answer_that_cannot_be_watched_is_refused_also_without_norms():
    """The whole model would have to be run again for one of its weights."""
    forget, retain, _ = data()

    def opaque():
        model = SecondHead()
        model.answer = Answer
        return model

    message = "module 'SecondHead' returns no tensor that can be watched, but Answer"
    with pytest.raises(UnsupportedModelError, match=message):
        gf.profile(
            ready(opaque), None, forget=forget, retain=retain, objectives=["ga"], norms=False
        )


def test_trying_leaves_the_model_as_it_was():
    model = ready(Routed)
    model.mix.weight.requires_grad_(False)
    asking = [p.requires_grad for p in model.parameters()]
    layout_of(model)
    assert asking == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
