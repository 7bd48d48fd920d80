"""Numbers that are not finite, and memory that runs out."""

from __future__ import annotations

import torch
from bad_input.case import Case, check, no_memory, patched, profile, weight
from bad_input.data import call
from bad_input.models import MLP
from models import build, samples

import geffect_fast as gf


def overflowing():
    """A model whose fp16 weights are fine and whose activations overflow."""
    model = build("llama", torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    return model


def crowded(_here, patch):
    """Leave memory for a few tokens and no more."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def limited(self, x):
        return forward(self, x) if x.shape[-2] < 12 else no_memory()

    patch.setattr(LlamaMLP, "forward", limited)


CASES = [
    # ---- numbers that are not finite ----
    Case("a gradient that overflows in fp16", call(overflowing), "is not finite", "precision"),
    Case(
        "an overflow in a check",
        lambda _: gf.check(overflowing(), None, data=samples([5, 9])),
        "is not finite",
        "precision",
    ),
    Case(
        "an overflow of a checkpoint",
        profile(dtype="float16"),
        "is not finite",
        "precision",
        weight("model.norm.weight", 6e4),
    ),
    Case(
        "an objective that is infinite, without norms",
        [*profile(objectives="ga,1e308*npo"), "--no-norms"],
        "1e+308*npo",
        "check its hyper-parameters",
    ),
    Case(
        "an objective that is infinite",
        profile(objectives="ga,1e308*npo"),
        "1e+308*npo",
        "hyper-parameters",
    ),
    Case(
        "an objective beyond numbers",
        profile(objectives="ga,rmu(layer=1, c=1e30)"),
        "rmu(layer=1, c=1e+30)",
        "hyper-parameters",
    ),
    # ---- memory ----
    Case(
        "no memory for a model",
        profile(),
        "/model does not fit in memory",
        "use --dtype bfloat16",
        patched("transformers.AutoModelForCausalLM.from_pretrained", MemoryError()),
    ),
    Case(
        "no memory for a forward",
        profile(token_budget="960"),
        "which is one sample a batch",
        "shorten the longest samples",
        crowded,
    ),
    Case(
        "no memory for a forward of a check",
        check("--token-budget", "960"),
        "which is one sample a batch",
        "shorten the longest samples",
        crowded,
    ),
    Case(
        "no memory for a forward of one sample",
        profile(token_budget="1"),
        "a token budget of 1, which is one sample a batch",
        "shorten the longest samples",
        crowded,
    ),
    Case(
        "no memory at all",
        profile(token_budget="960"),
        "which is one sample a batch",
        "use --dtype bfloat16",
        patched(MLP, no_memory),
    ),
    Case(
        "no memory for a backward",
        profile(token_budget="960"),
        "which is one sample a batch",
        "give fewer objectives",
        patched("geffect_fast.engines.reverse.backwards", no_memory),
    ),
    Case(
        "no memory on a GPU",
        call(token_budget=961),
        "a token budget of 961",
        "such as --token-budget 480",
        patched(
            "geffect_fast.engines.directions.add_gradients",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        ),
    ),
    Case(
        "no memory for plain autograd",
        check("--token-budget", "960"),
        "a token budget of 960, which is one sample a batch",
        "shorten the longest samples",
        patched("geffect_fast.measure.check.plain_numbers", MemoryError()),
    ),
]
