"""Rows, commands, adapters and mixtures that tests of `control` share."""

from __future__ import annotations

import copy

import peft
import torch

import geffect_fast as gf
from geffect_fast.demo.authors import make_fictitious_authors

ROWS = make_fictitious_authors(2, seed=3)
FORGET, RETAIN = ROWS[:4], ROWS[4:9]
TAUS = (0.5, 0.8, 0.95, 1.0)
ASKED = {"retain": RETAIN, "forget": FORGET, "metric": "probability", "tau": 0.8}
ASKED |= {"tolerance": 1 / 64, "grid": 8}
"""Settings of the result that most tests look at."""


COMMAND = ["control", "--original", "original", "--retain", "retain.jsonl", "--grid", "4"]
COMMAND += ["--metric", "probability", "--tolerance", "0.1"]


def retention(model, tokenizer, metric="extraction_strength"):
    found = gf.evaluate(model, tokenizer, forget=FORGET[:1], retain=RETAIN, metrics=metric)
    return float(found.value.sel(set="retain")[0])


def by_hand(original, unlearned, alpha):
    """A model whose weights are the mixture of two models' by the formula, in fp64."""
    model = copy.deepcopy(original)
    one, other = dict(original.named_parameters()), dict(unlearned.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1 - alpha) * one[name].double() + alpha * other[name].double())
    return model


def logits(model):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapter_on(base, seed=3, **settings):
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"]} | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def merged(model):
    return copy.deepcopy(model).merge_and_unload()
