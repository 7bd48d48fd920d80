"""Models that are missing, broken, of another kind, not finite, or in an unusable state."""

from __future__ import annotations

import torch
from bad_input.case import (
    Case,
    both,
    check,
    cut,
    gone,
    holds,
    patched,
    profile,
    settings,
    weight,
)
from bad_input.data import call
from models import build, samples
from torch import nn

import geffect_fast as gf
from geffect_fast.measure.models import quiet_transformers

MLP = "transformers.models.llama.modeling_llama.LlamaMLP.forward"
CONFIG = "model/config.json"
WEIGHTS = "model/model.safetensors"
WEIGHT = "model.layers.1.self_attn.k_proj.weight"


def frozen():
    return build("llama").requires_grad_(False)


def dropping():
    return build("gpt2").train()


def normalising():
    model = build("llama")
    model.model.norm = nn.BatchNorm1d(16)
    return model


def poisoned():
    model = build("llama")
    model.get_parameter(WEIGHT).data[0, 0] = float("nan")
    return model


def small(vocab_size=8):
    """A model of one narrow layer that knows few tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def small_vocabulary(here, _patch):
    """Replace the folder's model by one that knows 50 tokens."""
    with quiet_transformers():
        small(50).save_pretrained(here / "model")


def in_place(self, x):
    """The forward of an MLP without its gate, which doubles its input in place."""
    return self.down_proj(self.up_proj(x)) + x.mul_(2)


def another_weight(name):
    """Add a weight that the model has no place for."""

    def apply(here, _patch):
        from safetensors.torch import load_file, save_file

        save_file(load_file(here / WEIGHTS) | {name: torch.ones(16)}, here / WEIGHTS)

    return apply


def deep(name, depth=200_000):
    """A JSON file of nothing but nested objects."""
    return holds(name, '{"a":' * depth + "1" + "}" * depth)


def own_code(kind):
    """A model of a kind unknown to transformers; its folder brings code that must not run."""
    return both(
        settings(CONFIG, auto_map={kind: "own.Own"}, model_type="own"),
        holds("model/own.py", "raise SystemExit('the code ran')"),
        patched("builtins.input", AssertionError("somebody was asked")),
    )


class NoLogits(nn.Module):
    """A model that answers with one number a sample."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 8)

    def forward(self, input_ids):
        return self.embed(input_ids).sum((1, 2))


CASES = [
    # ---- folders ----
    Case(
        "no such model", profile(model="./gone"), "model ./gone does not exist", "give a folder or"
    ),
    Case(
        "no such model to check",
        ["check", "--model", "gone/away/far", "--data", "forget.jsonl"],
        "model gone/away/far does not exist",
        "give a folder or a hub id",
    ),
    Case(
        "neither folder nor on the hub",
        profile(model="gone"),
        "model gone: no such folder",
        "check the id",
    ),
    Case(
        "no name of a model",
        profile(model=""),
        "--model: must not be empty",
        "give a path or a hub id",
    ),
    Case("a file as a model", profile(model=WEIGHTS), "is a file", "give the folder that holds it"),
    Case("model left out", profile(model=None), "--model is missing", "give it, or a --config"),
    Case(
        "no config",
        profile(),
        "/model: no config.json",
        "saved by save_pretrained",
        gone(CONFIG),
    ),
    Case(
        "config is no JSON",
        profile(),
        "/model: config.json is not JSON",
        "save it again",
        holds(CONFIG, "{"),
    ),
    Case(
        "config is no object",
        profile(),
        "/model: config.json must hold an object",
        "save it again",
        holds(CONFIG, "[]"),
    ),
    Case(
        "a config of a thousand million layers",
        profile(),
        "/model: its config.json asks for num_hidden_layers = 1000000000, more than 10000",
        "mend the config",
        settings(CONFIG, num_hidden_layers=10**9),
    ),
    Case(
        "a config as wide as nothing",
        profile(),
        "asks for hidden_size = 1000000000000",
        "mend the config",
        settings(CONFIG, hidden_size=10**12),
    ),
    Case(
        "a vocabulary beyond any memory",
        check(),
        "asks for vocab_size = 10000000000",
        "mend the config",
        settings(CONFIG, vocab_size=10**10),
    ),
    Case(
        "more positions than anybody reads",
        profile(),
        "asks for max_position_embeddings = 1000000000000000",
        "mend the config",
        settings(CONFIG, max_position_embeddings=10**15),
    ),
    Case(
        "layers of a model within a model",
        profile(),
        "asks for num_hidden_layers = 99999999",
        "mend the config",
        settings(CONFIG, text_config={"num_hidden_layers": 99_999_999}),
    ),
    Case(
        "a reference of too many layers",
        profile(reference="reference"),
        "reference: its config.json asks for num_hidden_layers",
        "mend the config",
        settings("reference/config.json", num_hidden_layers=10**9),
    ),
    Case("a config that is deep", profile(), "config.json is not JSON", "save it", deep(CONFIG)),
    Case(
        "an adapter's config that is deep",
        profile(),
        "adapter_config.json is not JSON",
        "save it again",
        both(gone(CONFIG), deep("model/adapter_config.json")),
    ),
    Case(
        "a model that needs code of its own",
        profile(),
        "/model: needs Python code that it brings along (auto_map), which would run with all your",
        "allow it with --trust-remote-code (trust_remote_code=True)",
        own_code("AutoConfig"),
    ),
    Case(
        "a model class that is code of its own",
        profile(),
        "/model: needs Python code that it brings along",
        "read that code, and allow it with --trust-remote-code",
        own_code("AutoModelForCausalLM"),
    ),
    Case(
        "a reference that needs code of its own",
        call(objectives=["npo"], reference_model="reference"),
        "reference reference: needs Python code",
        "trust_remote_code=True",
        settings("reference/config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
    ),
    Case(
        "a tokenizer that needs code of its own",
        profile(tokenizer="tok"),
        "tok: needs Python code that it brings along",
        "allow it with --trust-remote-code",
        both(
            holds(
                "tok/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'
            ),
            holds("tok/own.py", "raise SystemExit('the code ran')"),
            patched("builtins.input", AssertionError("somebody was asked")),
        ),
    ),
    Case(
        "no such architecture",
        profile(),
        "/model: cannot be loaded",
        "save it again with save_pretrained",
        settings(CONFIG, model_type="nothing"),
    ),
    Case(
        "a model without a head",
        profile(),
        "LlamaModel is not a causal language model",
        "give",
        settings(CONFIG, architectures=["LlamaModel"]),
    ),
    Case(
        "a translator",
        profile(),
        "not a causal language model",
        "give one that predicts next tokens",
        settings(CONFIG, architectures=None, model_type="t5"),
    ),
    Case(
        "adapters whose model is gone",
        profile(),
        "base model ./x does not exist",
        "give a folder or a hub id",
        both(
            gone(CONFIG), holds("model/adapter_config.json", '{"base_model_name_or_path": "./x"}')
        ),
    ),
    Case(
        "an adapter that is its own base",
        profile(),
        "adapter_config.json leads back to",
        "write the base model's folder",
        both(
            gone(CONFIG), holds("model/adapter_config.json", '{"base_model_name_or_path": "model"}')
        ),
    ),
    Case(
        "adapters that are each other's base",
        profile(),
        "adapter_config.json leads back to",
        "write the base model's folder",
        both(
            gone(CONFIG),
            holds("model/adapter_config.json", '{"base_model_name_or_path": "./other"}'),
            holds("other/adapter_config.json", '{"base_model_name_or_path": "other/../model"}'),
        ),
    ),
    Case(
        "a tokenizer of an adapter that is its own base",
        profile(tokenizer="own"),
        "adapter_config.json leads back to",
        "write the base model's folder",
        holds("own/adapter_config.json", '{"base_model_name_or_path": "own"}'),
    ),
    Case(
        "adapters that name no model",
        profile(),
        "adapter_config.json names no base_model_name_or_path",
        "write the base model's folder",
        both(gone(CONFIG), holds("model/adapter_config.json", "{}")),
    ),
    Case(
        "nobody's model",
        profile(model="~nobody-here/m"),
        "~nobody-here/m does not",
        "give a folder",
    ),
    # ---- weights ----
    Case("no weights", profile(), "/model: no weights", "save it again", gone(WEIGHTS)),
    Case(
        "torn weights", profile(), "weights are truncated or broken", "save it", cut(WEIGHTS, 4_000)
    ),
    Case("empty weights", profile(), "weights are truncated or broken", "save it", cut(WEIGHTS, 0)),
    Case(
        "a part of the weights missing",
        profile(),
        "model-00001-of-00002.safetensors",
        "save it again",
        both(
            gone(WEIGHTS),
            holds(
                "model/model.safetensors.index.json",
                '{"metadata": {}, "weight_map": {"w": "model-00001-of-00002.safetensors"}}',
            ),
        ),
    ),
    Case(
        "layers that were not saved",
        profile(),
        "the checkpoint lacks model.layers.3.",
        "it is incomplete or belongs",
        settings(CONFIG, num_hidden_layers=4),
    ),
    Case(
        "layers too many",
        profile(),
        "model.layers.2.",
        "num_hidden_layers",
        settings(CONFIG, num_hidden_layers=2),
    ),
    Case(
        "a bias too many",
        profile(),
        "the checkpoint holds model.layers.0.self_attn.q_proj.bias",
        "mend the config",
        another_weight("model.layers.0.self_attn.q_proj.bias"),
    ),
    Case(
        "weights of another shape",
        profile(),
        "the shapes of its weights",
        "save it again",
        settings(CONFIG, hidden_size=32),
    ),
    Case(
        "a weight that is NaN",
        profile(),
        f"/model: {WEIGHT}",
        "from a healthy checkpoint",
        weight(WEIGHT, float("nan")),
    ),
    Case(
        "an infinite weight",
        check(),
        f"/model: {WEIGHT}",
        "from a healthy",
        weight(WEIGHT, float("-inf")),
    ),
    Case(
        "a reference that is not finite",
        profile(objectives="npo", reference="reference"),
        f"/reference: {WEIGHT}",
        "from a healthy checkpoint",
        weight(WEIGHT, float("inf"), "reference"),
    ),
    Case(
        "no such reference",
        profile(reference="./gone"),
        "reference ./gone does not exist",
        "give a folder",
    ),
    Case(
        "no such reference for a check",
        check("--reference", "./gone"),
        "reference ./gone",
        "give a folder",
    ),
    Case(
        "a vocabulary smaller than the tokenizer's",
        profile(),
        "but the model knows 50 tokens",
        "use its own tokenizer",
        small_vocabulary,
    ),
    Case(
        "a torn tokenizer",
        profile(),
        "tokenizer of model ",
        "save it again",
        holds("model/tokenizer.json", "{"),
    ),
    Case(
        "no such tokenizer",
        profile(tokenizer="./gone"),
        "tokenizer ./gone does not exist",
        "give a folder",
    ),
    Case(
        "a folder without a tokenizer",
        profile(tokenizer="."),
        "here: no tokenizer files",
        "--tokenizer",
    ),
    # ---- from Python ----
    Case(
        "a path for a model",
        call(lambda: "some/folder"),
        "model: expected a loaded model, got str",
        "load it with",
    ),
    Case(
        "a path for a model to check",
        lambda _: gf.check("some/folder", None, data=samples([4])),
        "model: expected a loaded model, got str",
        "load it with",
    ),
    Case("everything frozen", call(frozen), "frozen", "requires_grad"),
    Case(
        "active dropout",
        call(dropping),
        "train mode with active dropout",
        "call model.eval() first",
    ),
    Case(
        "active dropout in the reference",
        call(lambda: build("gpt2"), objectives=["npo"], reference_model=dropping()),
        "reference_model: ",
        "call model.eval() first",
    ),
    Case(
        "batch norm",
        call(lambda: normalising().train()),
        "'model.norm' normalises",
        "call model.eval() first",
    ),
    Case(
        "no logits", call(NoLogits), "NoLogits returned no logits", "give a causal language model"
    ),
    Case(
        "a weight not finite",
        call(poisoned),
        WEIGHT,
        "healthy checkpoint",
    ),
    Case(
        "a reference that knows fewer tokens",
        call(objectives=["npo"], reference_model=small()),
        "the reference_model knows 8 tokens",
        "use its own tokenizer",
    ),
    Case(
        "a reference with logits of its own",
        call(objectives=["ga + kl"], reference_model=small(90)),
        "the reference model predicts 90 tokens",
        "give a reference of the same vocabulary",
    ),
    Case(
        "a reference of another width",
        call(objectives=["ga + rr(layer=1)"], reference_model=small(61)),
        "the reference model's hidden states have 8 features",
        "give a reference of the same width",
    ),
    Case(
        "a reference not finite",
        call(objectives=["npo"], reference_model=poisoned()),
        f"reference_model: {WEIGHT}",
        "from a healthy checkpoint",
    ),
    Case(
        "a sample longer than the model's positions",
        call(lambda: build("gpt2"), forget=samples([140])),
        "forget: row 0",
        "the model knows 128 positions; shorten or drop the row",
    ),
    # ---- models whose gradients cannot be attributed ----
    Case(
        "an input changed in place",
        check(),
        "module 'model.layers.2.mlp.up_proj': its input was changed in place",
        "change a copy instead",
        patched(MLP, in_place),
    ),
]
