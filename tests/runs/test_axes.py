"""Where a parameter sits, read off its name."""

from __future__ import annotations

from collections import Counter

import pytest
from models import ARCHITECTURES, build

from geffect_fast.runs.axes import block_of, group_of, kind_of, parameter_coordinates

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
    # A block and a kind name one parameter; GPT-2 calls two layers of a block `c_proj`.
    pairs = Counter(zip(blocks.tolist(), kinds, strict=True))
    assert {kind.split(".")[0] for (_, kind), n in pairs.items() if n > 1} <= {"c_proj"}
    outside = {g for g, b in zip(groups, blocks, strict=True) if b == -1}
    assert {"embedding", "final_norm"} <= outside <= {"embedding", "final_norm", "lm_head"}


def test_no_parameters():
    assert parameter_coordinates([])["parameter"] == []
