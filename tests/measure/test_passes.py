"""The number of forward and backward passes that a profile takes."""

from __future__ import annotations

from collections import Counter
from functools import wraps

import pytest
import torch
from models import build, samples
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import geffect_fast as gf

FORGET, RETAIN = samples([9, 12, 4, 7], 1), samples([7, 11, 5], 2)
REVERSE = {"engine": "reverse", "resolve": ("parameter", "sample")}
FORWARD = {"engine": "forward", "resolve": ("sample", "token"), "norms": False}


@pytest.fixture
def passes(monkeypatch):
    """Counts of forward passes of whole models, and of backward passes from their logits."""
    count = Counter()

    def arrived(_g):
        count["backward"] += 1

    def counted(forward):
        @wraps(forward)
        def run(self, *args, **kwargs):
            count["forward"] += 1
            answer = forward(self, *args, **kwargs)
            # The forward engine enables gradients, though nothing asks for a gradient.
            if answer.logits.requires_grad:
                answer.logits.register_hook(arrived)
            return answer

        return run

    for kind in (LlamaForCausalLM, Gemma2ForCausalLM):
        monkeypatch.setattr(kind, "forward", counted(kind.forward))
    return count


def profile(model, **settings):
    return gf.profile(model, None, forget=FORGET, retain=RETAIN, objectives=["npo"], **settings)


@pytest.mark.parametrize("norms", [True, False])
def test_reverse_takes_two_risk_gradients_and_one_pass(passes, norms):
    result = profile(build("llama"), norms=norms, **REVERSE)
    assert passes == {"forward": 3, "backward": 3}
    assert result.attrs["engine"] == "reverse" and result.attrs["layout"] == "packed"


def test_the_second_profile_of_a_model_that_was_tried_takes_as_many(passes):
    model = build("gemma2")
    first = profile(model, **REVERSE)
    assert passes["forward"] > 3
    passes.clear()
    second = profile(model, **REVERSE)
    assert passes == {"forward": 3, "backward": 3}
    assert first.g_effect.identical(second.g_effect)


def test_forward_takes_two_risk_gradients_and_one_dual_pass(passes):
    """A first profile also tries forward mode on a few tokens: one backward, one dual pass."""
    model = build("llama")
    profile(model, **FORWARD)
    assert passes == {"forward": 3 + 2, "backward": 2 + 1}
    passes.clear()
    result = profile(model, **FORWARD)
    assert passes == {"forward": 3, "backward": 2}
    assert result.attrs["engine"] == "forward"


def test_forward_mode_is_tried_again_on_other_weights(passes):
    model = build("llama")
    profile(model, **FORWARD)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    passes.clear()
    profile(model, **FORWARD)
    assert passes == {"forward": 3 + 2, "backward": 2 + 1}
