"""Refusals of `control`: one line each, with nothing written."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from bad_input.case import snapshot
from control_models import (
    COMMAND,
    RETAIN,
    adapter_on,
)

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.demo import Size, make_model
from geffect_fast.errors import GEffectError


def changed(model, change):
    model = copy.deepcopy(model)
    change(model)
    return model


def poison(model):
    model.lm_head.weight.data[0, 0] = float("nan")


def too_large(model):
    model.lm_head.weight.data.fill_(3e38)


def other_theta(model):
    model.config.rms_norm_eps = 0.1


def bad_call(**more):
    def call(original, unlearned, tokenizer):
        given = {"retain": RETAIN, "grid": 2, "tolerance": 0.4} | more
        gf.control(
            given.pop("original", original), given.pop("unlearned", unlearned), tokenizer, **given
        )

    return call


def between(change):
    return lambda o, u, t: bad_call(unlearned=changed(u, change))(o, u, t)


def size_of(hidden, layers=2):
    return lambda o, u, t: bad_call(unlearned=make_model(t, Size(hidden=hidden, n_layers=layers)))(
        o, u, t
    )


REFUSED = {
    "the original itself": (lambda o, u, t: bad_call(unlearned=o)(o, u, t), "the original itself"),
    "equal weights": (
        lambda o, u, t: bad_call(unlearned=copy.deepcopy(o))(o, u, t),
        "nothing to mix",
    ),
    "another width": (size_of(16), "and the original's 3"),
    "another depth": (size_of(32, 3), "only the unlearned model has model.layers.2."),
    "another vocabulary": (between(lambda m: m.resize_token_embeddings(400)), "400 x 32"),
    "another precision": (between(lambda m: m.to(torch.bfloat16)), "--dtype float32"),
    "NaN": (between(poison), "lm_head.weight holds 1 NaN"),
    "another config": (between(other_theta), "rms_norm_eps = 0.1"),
    "another kind": (bad_call(unlearned=torch.nn.Linear(2, 2)), "unlearned"),
    "tau 0": (bad_call(tau=0), "tau"),
    "tau above 1": (bad_call(tau=1.2), "tau"),
    "tau NaN": (bad_call(tau=math.nan), "tau"),
    "tolerance 0": (bad_call(tolerance=0), "tolerance"),
    "no grid": (bad_call(grid=0), "grid"),
    "a loss": (bad_call(metric="nll"), "metric nll: retention needs a metric between 0 and 1"),
    "several": (bad_call(metric="nll,probability"), "names several metrics"),
    "unknown metric": (bad_call(metric="probabilty"), "'probability'"),
    "membership": (bad_call(metric="min_k"), "no number on retain"),
    "no perturbed answers": (
        bad_call(
            metric="truth_ratio",
            retain=[{k: r[k] for k in ("question", "answer")} for r in RETAIN],
        ),
        "no number on retain",
    ),
    "forget metrics without forget": (bad_call(metrics="min_k"), "reads the forget data"),
    "retrained without forget": (
        lambda o, u, t: bad_call(retain_model=u)(o, u, t),
        "retain_model: it is compared on the forget data",
    ),
    "no models": (bad_call(unlearned={}), "give a model"),
    "a model twice": (bad_call(unlearned=["a", "a"]), "listed twice"),
    "a folder that is there": (bad_call(save="."), "is there already"),
    "no such place": (bad_call(save="nowhere/at/all"), "make it first"),
    "no folder's name": (
        lambda o, u, t: bad_call(unlearned={"a/b": u}, save="new")(o, u, t),
        "no name of a folder",
    ),
    "an unknown setting": (bad_call(gird=3), "did you mean 'grid'"),
    "nothing to keep": (
        lambda o, u, t: bad_call(
            original=make_model(t, Size(hidden=32, n_layers=2)).eval(),
        )(o, u, t),
        "nothing to keep",
    ),
    "adapter of another base": (
        lambda o, u, t: bad_call(unlearned=adapter_on(u))(o, u, t),
        "its base model is not the original",
    ),
    "DoRA": (
        lambda o, u, t: bad_call(unlearned=adapter_on(o, use_dora=True))(o, u, t),
        "of the kind DoRA",
    ),
    "biases": (
        lambda o, u, t: bad_call(unlearned=adapter_on(o, bias="all"))(o, u, t),
        "biases of the model too",
    ),
    "biases of an adapter": (
        lambda o, u, t: bad_call(unlearned=adapter_on(o, lora_bias=True))(o, u, t),
        "biases of its own too (lora_bias)",
    ),
    "logits that are not finite": (
        lambda o, u, t: bad_call(original=changed(o, too_large))(o, u, t),
        "the original gives its answer",
    ),
    "utility without probes": (bad_call(metric="model_utility"), "--probe real_authors"),
    "a whole model and an adapter": (
        lambda o, u, t: bad_call(original=adapter_on(o))(o, u, t),
        "merge the adapter into its base",
    ),
    "an adapter that adds nothing": (
        lambda o, u, t: bad_call(
            unlearned=peft.get_peft_model(
                copy.deepcopy(o), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
            )
        )(o, u, t),
        "nothing to mix",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, original, unlearned, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = REFUSED[name]
    with pytest.raises(GEffectError) as caught:
        call(original, unlearned, tokenizer)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


APART = "--save and --out must be different folders, neither inside the other"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--unlearned", "ascent", "--unlearned", "ascent"], "listed twice"),
        (["--unlearned", "nowhere/at/all"], "unlearned all nowhere/at/all does not exist"),
        ([], "--unlearned is missing"),
        (["--unlearned", "ascent", "--tau", "0"], "--tau"),
        (["--unlearned", "ascent", "--metrics", "min_k"], "reads the forget data"),
        (["--unlearned", "ascent", "--save", "gentler"], "--save gentler is there already"),
        (["--unlearned", "original"], "nothing to mix"),
        (["--unlearned", "ascent", "--save", "run"], APART),
        (["--unlearned", "ascent", "--save", "run/models"], APART),
        (["--unlearned", "ascent", "--save", "../here/run"], APART),
        (["--unlearned", "ascent", "--save", "new", "--out", "new/run"], APART),
        (["--unlearned", "ascent", "--data-format", "csv"], "retain.jsonl"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(here, capsys, more, said):
    before = snapshot(here)
    assert main([*COMMAND, "--out", "run", *more, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert snapshot(here) == before and not (here / "run").exists()
