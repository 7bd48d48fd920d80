"""The place of a parameter in a model, read from its name."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from architectures import ARCHITECTURES
from models import build

from geffect_fast.results.groups import block_of, group_of, kind_of, parameter_coordinates

PEFT = "base_model.model.model"


@pytest.mark.parametrize(
    ("name", "block", "kind", "group"),
    [
        ("model.embed_tokens.weight", -1, "embed_tokens", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", 0, "q_proj", "shallow"),
        ("model.layers.2.self_attn.q_proj.bias", 2, "q_proj.bias", "shallow"),
        ("model.layers.3.input_layernorm.weight", 3, "input_layernorm", "middle"),
        ("model.layers.8.mlp.down_proj.weight", 8, "down_proj", "deep"),
        ("model.layers.5.mlp.experts.7.w1.weight", 5, "w1", "middle"),
        ("model.layers.5.mlp.experts.7.weight", 5, "experts", "middle"),
        ("model.layers.5.mlp.experts.gate_up_proj", 5, "experts.gate_up_proj", "middle"),
        ("model.norm.weight", -1, "norm", "final_norm"),
        ("transformer.ln_f.bias", -1, "ln_f.bias", "final_norm"),
        ("transformer.wpe.weight", -1, "wpe", "embedding"),
        ("lm_head.weight", -1, "lm_head", "lm_head"),
        ("gpt_neox.embed_in.weight", -1, "embed_in", "embedding"),
        ("gpt_neox.embed_out.weight", -1, "embed_out", "lm_head"),
        ("gpt_neox.final_layer_norm.bias", -1, "final_layer_norm.bias", "final_norm"),
        ("transformer.h.0.attn.c_attn.bias", 0, "c_attn.bias", "shallow"),
        ("transformer.blocks.7.ffn.experts.mlp.v1", 7, "mlp.v1", "deep"),
        ("transformer.word_embeddings_layernorm.bias", -1, "word_embeddings_layernorm.bias",
         "embedding"),
        ("backbone.layers.4.mixer.A_log", 4, "mixer.A_log", "middle"),
        ("backbone.norm_f.weight", -1, "norm_f", "final_norm"),
        ("backbone.embeddings.weight", -1, "embeddings", "embedding"),
        ("model.decoder.embed_positions.weight", -1, "embed_positions", "embedding"),
        ("model.decoder.project_in.weight", -1, "project_in", "embedding"),
        ("model.decoder.project_out.weight", -1, "project_out", "lm_head"),
        ("model.embedding_norm.weight", -1, "embedding_norm", "final_norm"),
        ("model.per_layer_model_projection.weight", -1, "per_layer_model_projection", "embedding"),
        ("weight", -1, "weight", "lm_head"),
        (f"{PEFT}.layers.3.self_attn.q_proj.lora_A.default.weight", 3, "q_proj.lora_A", "middle"),
        (f"{PEFT}.layers.3.self_attn.q_proj.lora_B.mine.bias", 3, "q_proj.lora_B.bias", "middle"),
        (f"{PEFT}.layers.3.self_attn.q_proj.base_layer.bias", 3, "q_proj.bias", "middle"),
        (f"{PEFT}.layers.3.mlp.experts.7.w1.ia3_l.default", 3, "w1.ia3_l", "middle"),
        (f"{PEFT}.embed_tokens.lora_embedding_A.default", -1, "embed_tokens.lora_embedding_A",
         "embedding"),
        (f"{PEFT}.embed_tokens.token_adapter.trainable_tokens_delta.default", -1,
         "embed_tokens.trainable_tokens_delta", "embedding"),
        ("base_model.model.lm_head.modules_to_save.default.weight", -1, "lm_head.modules_to_save",
         "lm_head"),
        ("prompt_encoder.default.embedding.weight", -1, "embedding", "embedding"),
        ("0.weight", 0, "weight", "shallow"),
    ],
)  # fmt: skip
def test_names(name, block, kind, group):
    assert (block_of(name), kind_of(name), group_of(name, 9)) == (block, kind, group)


@pytest.mark.parametrize(
    ("n_blocks", "groups"),
    [(1, "s"), (2, "sm"), (3, "smd"), (4, "ssmd"), (7, "sssmmdd"), (9, "sssmmmddd")],
)
def test_thirds_by_depth(n_blocks, groups):
    found = [group_of(f"h.{block}.w", n_blocks)[0] for block in range(n_blocks)]
    assert "".join(found) == groups


# A block and a kind name one parameter, with one exception: two layers of a GPT-2 block are
# `c_proj`.
SHARED_KINDS = {
    "gpt2": {"c_proj"},
    "gpt_bigcode": {"c_proj"},
    "stablelm": {"norms"},
    "jetmoe": {"input_linear", "layer", "output_linear"},
    "mamba2": {"norm"},
    "rwkv": {"key", "receptance", "value"},
    "zamba2": {"gate_up_proj_adapter_list", "input_layernorm"},
    "nemotron_h": {"norm"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_coordinates_of_every_architecture(architecture):
    model = build(architecture)
    names = [name for name, _ in model.named_parameters()]
    coords = parameter_coordinates(names)
    assert coords["parameter"] == names
    blocks, kinds, groups = (coords[c][1] for c in ("block", "kind", "group"))
    assert {c for c, _ in (coords[k] for k in ("block", "kind", "group"))} == {"parameter"}
    assert len(blocks) == len(kinds) == len(groups) == len(names)
    n_layers = model.config.num_hidden_layers
    assert set(blocks) == {-1, *range(n_layers)}
    pairs = Counter(zip(blocks.tolist(), kinds, strict=True))
    shared = {kind.removesuffix(".bias") for (_, kind), n in pairs.items() if n > 1}
    assert shared == SHARED_KINDS.get(architecture, set())
    outside = {g for g, b in zip(groups, blocks, strict=True) if b == -1}
    assert "embedding" in outside and outside <= {"embedding", "final_norm", "lm_head"}
    last = any("norm" in kind or "ln_" in kind for b, kind in pairs if b == -1)
    assert ("final_norm" in outside) == last


def test_no_parameters():
    assert parameter_coordinates([])["parameter"] == []


def test_layers_and_what_lies_outside_of_them_add_up(dataset):
    """As docs/concepts.md shows: block -1 is no layer, and its parts are told apart by group."""
    effect = dataset["g_effect"]
    page = (Path(__file__).parents[2] / "docs/concepts.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:layers|outside) = result\..+)$", page, re.MULTILINE)
    found = {"result": dataset}
    for line in lines:
        exec(line, found)
    layers, outside = found["layers"], found["outside"]
    assert layers["block"].values.tolist() == [0, 1, 2, 3]
    assert set(outside["group"].values) == {"embedding", "final_norm", "lm_head"}
    np.testing.assert_allclose(
        layers.sum("block") + outside.sum("group"), effect.sum("parameter"), rtol=1e-12
    )
