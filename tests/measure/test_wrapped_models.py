"""Models inside something else: adapters of peft, compiled code, checkpoints, half precision.

Every row of the tables in `wrapped_cases.py` is compared with plain autograd, one sample at a time,
for every trainable parameter. `test_check_and_profile.py` has the refusals, and the rules used.
"""

from __future__ import annotations

import contextlib
import copy
import types

import numpy as np
import pytest
import torch
from models import build, fp64_throughout, samples
from reference import close, effects, effects_of_each
from torch import nn
from wrapped_cases import ADAPTERS, AUTOCAST, CASES, LOW, checkpointed, lora, never

import geffect_fast as gf
from geffect_fast.errors import UnsupportedModelError

FORGET, RETAIN = samples([2, 9, 5, 12, 5], 1), samples([6, 3, 6], 2)
OBJECTIVES = {
    "ga": [(1.0, "ga", {})],
    "npo(beta=0.5) + rr(layer=1)": [(1.0, "npo", {"beta": 0.5}), (1.0, "rr", {"layer": 1})],
}


class Plain:
    """A model for the reference implementation: trainable parameters, no virtual tokens."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, **kwargs):
        answer, length = self.model(input_ids=input_ids, **kwargs), input_ids.shape[1]
        logits = getattr(answer, "logits", answer)[:, -length:]
        hidden = getattr(answer, "hidden_states", None) or ()
        # A layer below all trainable parameters has gradients, which are zero.
        zero = 0 * sum(p.sum() for p in self.parameters())
        return types.SimpleNamespace(
            logits=logits, hidden_states=tuple(h[:, -length:] + zero for h in hidden)
        )

    def parameters(self):
        return (p for p in self.model.parameters() if p.requires_grad)


def names_of(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def run(model, objectives, **kwargs):
    return gf.profile(
        model, None, forget=FORGET, retain=RETAIN, objectives=objectives, token_budget=24, **kwargs
    )


def exact(result, model, reference):
    plain = effects_of_each(
        Plain(model), Plain(reference), OBJECTIVES.values(), FORGET, RETAIN, None
    )
    for found, expected in zip(result.g_effect.values, plain, strict=True):
        close(found, expected, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_sample_at_a_time(name):
    case = CASES[name]
    with fp64_throughout():
        model = case.build(torch.float64)
        inside = model if case.plain is None else case.plain(torch.float64)
        before = {k: v.clone() for k, v in inside.state_dict().items()}
        result = run(model, list(OBJECTIVES))
        exact(result, inside, inside)
    assert result.attrs["layout"] == case.layout
    assert list(result.parameter.values) == names_of(inside)
    assert all(torch.equal(v, before[k]) for k, v in inside.state_dict().items())


# ---- refusals, and the state left behind ----


def test_a_soft_prompt_has_no_position():
    with pytest.raises(UnsupportedModelError, match="soft prompt") as caught:
        run(ADAPTERS["prompt_tuning"].build(torch.float32), ["ga"], resolve=["position"])
    assert "\n" not in str(caught.value)


def state(model):
    """Everything about a model and torch that capture switches."""
    return (
        [(m.training, vars(m).get("gradient_checkpointing")) for m in model.modules()],
        [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        torch.backends.mha.get_fastpath_enabled(),
    )


def compiles():
    with pytest.raises(Exception, match="compiled"):
        torch.compile(lambda x: x + 1, backend=never)(torch.ones(2))
    return True


@pytest.mark.parametrize("fails", [False, True])
def test_checkpointing_is_on_again_afterwards(fails):
    model = checkpointed("llama", True)(torch.float32)
    before = state(model)
    with contextlib.suppress(KeyError), gf.capture(model):
        assert not any(vars(m).get("gradient_checkpointing") for m in model.modules())
        ids = torch.tensor([[3, 4, 5]])
        model(input_ids=ids).logits.sum().backward()
        if fails:
            raise KeyError
    model.zero_grad(set_to_none=True)
    run(model, ["ga"])
    assert model.is_gradient_checkpointing and state(model) == before and compiles()


def test_functions_take_compiled_models_and_their_names():
    model = build("llama")
    wrapped = torch.compile(model, backend=never)
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])}

    def loss_fn(m, b):
        logits = m(input_ids=b["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(logits.mT, b["input_ids"], reduction="none").sum(1)

    direction = {k: torch.ones_like(p) for k, p in wrapped.named_parameters()}
    assert all(name.startswith("_orig_mod.") for name in direction)
    plainly = {k: torch.ones_like(p) for k, p in model.named_parameters()}
    torch.testing.assert_close(
        gf.functional.per_sample_inner_products(wrapped, loss_fn, batch, direction),
        gf.functional.per_sample_inner_products(model, loss_fn, batch, plainly),
    )
    # also where the loss runs the compiled model instead of the given one
    torch.testing.assert_close(
        gf.functional.per_sample_grad_norms(wrapped, lambda _, b: loss_fn(wrapped, b), batch),
        gf.functional.per_sample_grad_norms(model, loss_fn, batch),
    )
    with gf.capture(wrapped) as records:
        loss_fn(wrapped, batch).sum().backward()
    assert set(records) == {name for name, _ in model.named_parameters()}


# ---- references ----


@pytest.mark.parametrize("name", ["lora", "compiled", "checkpointed_reentrant"])
def test_a_wrapped_reference_is_the_model_inside(name):
    """The reference is packed, though the wrapper names no position_ids."""
    case = CASES[name]
    with fp64_throughout():
        model = build("llama", torch.float64, seed=1)
        reference = case.build(torch.float64)
        inside = reference if case.plain is None else case.plain(torch.float64)
        result = run(model, list(OBJECTIVES), reference_model=reference)
        exact(result, model, inside)


def test_a_reference_that_cannot_be_packed_is_refused():
    reference = ADAPTERS["prompt_tuning"].build(torch.float32)
    with pytest.raises(UnsupportedModelError, match="takes no position_ids"):
        run(build("llama"), ["npo"], reference_model=reference)


def test_without_a_reference_npo_compares_with_the_adapted_model():
    """The reference is `model` as it is, its adapter included."""
    with fp64_throughout():
        model = lora()(torch.float64)
        found = run(model, ["npo(beta=1)"])
        reference = copy.deepcopy(model)
        given = run(model, ["npo(beta=1)"], reference_model=reference)
    np.testing.assert_allclose(found.g_effect, given.g_effect, rtol=1e-9, atol=1e-14)


# ---- low precision ----

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half an ulp: the rounding that no method avoids."""

ALSO_IN_FP16 = ("llama", "fp32_norms", "half_lora_on_fp32")
"""Cases tested in fp16 too, by the precisions that they mix. The rules are those of bf16."""


def within_twice_plain(model, half_ulp, layout="packed"):
    """Root mean square error of every parameter's effects, against an fp64 copy of the model."""

    def by_autograd(m):
        found = effects(Plain(m), Plain(m), [(1.0, "ga", {})], FORGET, RETAIN, None)
        return found[..., : len(FORGET)]

    result = run(model, ["ga"])
    assert result.attrs["layout"] == layout
    ours = torch.from_numpy(result.g_effect[0].values)
    rough = by_autograd(model)
    with fp64_throughout(), torch.autocast("cpu", enabled=False):
        exact = by_autograd(copy.deepcopy(model).eval().double())
    scale = exact.abs().amax((0, 2), keepdim=True).clamp(min=1e-3 * float(exact.abs().max()))

    def error(found):
        return ((found - exact) / scale).square().mean((0, 2)).sqrt()

    assert bool((error(ours) <= 2 * error(rough) + half_ulp).all())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in LOW), *((name, torch.float16) for name in ALSO_IN_FP16)],
    ids=str,
)
def test_half_precision_within_twice_the_error_of_plain_autograd(name, dtype):
    layout = "equal_length" if name == "prefix_tuning" else "packed"
    within_twice_plain(LOW[name](dtype), HALF[dtype], layout)


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_within_twice_the_error_of_plain_autograd(name):
    model = AUTOCAST[name](torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        within_twice_plain(model, HALF[torch.bfloat16])
