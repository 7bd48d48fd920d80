"""Bad arguments to `profile`: one line that names the culprit."""

from __future__ import annotations

import pytest
import torch
from models import build, samples

import geffect_fast as gf
from geffect_fast.errors import GEffectError, InputError, NonFiniteError, UnsupportedModelError

GOOD = {
    "forget": samples([5, 9], 1),
    "retain": samples([7], 2),
    "objectives": ["ga"],
}

BAD = {
    "unknown objective": ({"objectives": ["gaa"]}, "ga"),
    "no objective": ({"objectives": []}, "objectives"),
    "the same twice": ({"objectives": ["npo", "npo(beta=0.1)"]}, "npo(beta=0.1)"),
    "axis": ({"resolve": ("parameter", "layer")}, "layer"),
    "engine": ({"engine": "sideways"}, "sideways"),
    "reduction": ({"reduction": "mean"}, "mean"),
    "budget": ({"token_budget": 0}, "token_budget"),
    "risk": ({"risk": "npo"}, "risk"),
    "risk by a reference": ({"risk": "rr"}, "risk"),
    "no refusals": ({"objectives": ["ga + po"]}, "refusals"),
    "no alternatives": ({"objectives": ["altpo"]}, "'altpo' needs refusals"),
    "empty forget": ({"forget": []}, "forget"),
    "probe name": ({"probes": {"unlearn": samples([4])}}, "unlearn"),
    "vocabulary": ({"retain": [{"input_ids": [1, 999], "labels": [-100, 999]}]}, "999"),
    "layer": ({"objectives": ["rmu(layer=40)"]}, "layer"),
    "layer to mask": ({"objectives": ["rmu_mask(layer=4)"]}, "at most 3, the model's last, got 4"),
    "layer to retain": ({"objectives": ["rr(layer=4)"]}, "at most 3, the model's last, got 4"),
    "all skipped": ({"objectives": ["ceu(skip=8)"]}, "no answer has more than 8 tokens"),
    "no eps": ({"objectives": ["pdu"]}, "needs a value for eps"),
    "no tokenizer": ({"forget": [{"question": "a?", "answer": "b"}]}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_that_names_the_culprit(case):
    change, named = BAD[case]
    with pytest.raises(GEffectError) as caught:
        gf.profile(build("llama"), None, **(GOOD | change))
    message = str(caught.value)
    assert named in message
    assert "\n" not in message


def test_model_that_is_no_model():
    with pytest.raises(InputError, match="model"):
        gf.profile("some/folder", None, **GOOD)


def test_active_dropout_is_refused():
    model = build("gpt2").train()
    with pytest.raises(InputError, match=r"dropout.*eval\(\)"):
        gf.profile(model, None, **GOOD)


def test_active_dropout_in_the_reference_is_refused():
    reference = build("gpt2").train()
    with pytest.raises(InputError, match=r"reference_model.*dropout"):
        gf.profile(
            build("gpt2"), None, **(GOOD | {"objectives": ["npo"]}), reference_model=reference
        )


def test_train_mode_without_dropout_is_fine():
    model = build("llama").train()
    assert gf.profile(model, None, **GOOD).sizes["sample"] == 2
    assert model.training


def test_everything_frozen_is_refused():
    model = build("llama").requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):
        gf.profile(model, None, **GOOD)


def test_weights_that_are_not_finite():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        gf.profile(model, None, **GOOD)


def test_gradients_that_are_not_finite():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e30)
        model.model.norm.weight.mul_(1e30)
    with pytest.raises(NonFiniteError, match="finite"):
        gf.profile(model, None, **GOOD)


class LeakyLlama(torch.nn.Module):
    """Uses its embedding's weight once more, outside the embedding's own forward."""

    def __init__(self):
        super().__init__()
        self.inner = build("llama")
        self.config = self.inner.config

    def forward(self, input_ids, position_ids=None, use_cache=None):
        answer = self.inner(input_ids=input_ids, position_ids=position_ids)
        table = self.inner.model.embed_tokens.weight
        answer.logits = answer.logits + table[input_ids] @ table.T
        return answer


def test_a_use_that_no_module_saw_is_refused_not_left_out():
    with pytest.raises(UnsupportedModelError, match="embed_tokens"):
        gf.profile(LeakyLlama(), None, **GOOD)


def test_whole_gradients_are_exact_all_the_same():
    result = gf.profile(LeakyLlama(), None, **(GOOD | {"resolve": ("parameter",)}))
    e = result.g_effect.sel(risk="unlearn", objective="ga")
    norm = result.parameter_risk_grad_norm.sel(risk="unlearn")
    assert abs(float((e + norm**2).sum())) < 1e-4 * float((norm**2).sum())
