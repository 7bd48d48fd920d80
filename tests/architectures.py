"""Small causal language models of transformers: adding an architecture is adding a row.

`tests/runs/test_architectures.py` compares every row with plain autograd; `docs/models.md` has
the same rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

VOCAB = 61


@dataclass(frozen=True)
class Architecture:
    """How to make a model of one kind, and how it is expected to be served.

    Attributes:
        config: the configuration's class in transformers, less `Config`.
        settings: its arguments.
        layout: how samples may share a forward.
        generic: the kinds of parameters that take the generic rule; all others have a fast one.
    """

    config: str
    settings: dict[str, Any]
    layout: str = "packed"
    generic: tuple[str, ...] = ()

    def __call__(self) -> nn.Module:
        import transformers

        make = getattr(transformers, f"{self.config}Config")
        config = make(**copy.deepcopy(self.settings))  # some write into what they are given
        return transformers.AutoModelForCausalLM.from_config(config)


IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = IDS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT = IDS | {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 4}  # shorter than most samples
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERTS = EXPERTS | {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}

FUSED = ("experts.down_proj", "experts.gate_up_proj")
ROUTED = (*FUSED, "gate")

ARCHITECTURES: dict[str, Architecture] = {
    # ---- dense, rotary positions ----
    "llama": Architecture("Llama", SMALL | {"num_hidden_layers": 3}),
    "llama_tied": Architecture(
        "Llama",
        SMALL
        | {
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral": Architecture("Mistral", SMALL | WINDOW),
    "qwen2": Architecture("Qwen2", SMALL),
    "qwen3": Architecture("Qwen3", SMALL | HEADS),
    "phi": Architecture("Phi", SMALL | {"num_attention_heads": 2, "num_key_value_heads": 2}),
    "phi3": Architecture("Phi3", SMALL),
    "gpt_neox": Architecture("GPTNeoX", SMALL),
    "gptj": Architecture("GPTJ", GPT | {"rotary_dim": 4}),
    "codegen": Architecture("CodeGen", GPT | {"rotary_dim": 4}),
    "stablelm": Architecture(
        "StableLm", SMALL | {"qk_layernorm": True, "use_parallel_residual": True}
    ),
    "starcoder2": Architecture("Starcoder2", SMALL | WINDOW | {"use_bias": True}),
    "olmo": Architecture("Olmo", SMALL | {"clip_qkv": 0.5}),
    "olmo2": Architecture("Olmo2", SMALL),
    "olmo3": Architecture("Olmo3", SMALL | WINDOW),
    "nemotron": Architecture("Nemotron", SMALL),
    "glm4": Architecture("Glm4", SMALL | HEADS),
    "smollm3": Architecture("SmolLM3", SMALL | {"no_rope_layers": [1, 0]}),
    "bitnet": Architecture("BitNet", SMALL),
    "ernie4_5": Architecture("Ernie4_5", SMALL | {"use_bias": True}),
    # ---- embeddings, residuals and logits that are scaled or capped ----
    "gemma": Architecture("Gemma", SMALL | HEADS | {"num_key_value_heads": 1}),
    "gemma2": Architecture(
        "Gemma2",
        SMALL | HEADS | {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16},
    ),
    "granite": Architecture(
        "Granite",
        SMALL
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
    "cohere2": Architecture("Cohere2", SMALL | WINDOW | {"logit_scale": 0.25}),
    # ---- learned positions ----
    "gpt2": Architecture("GPT2", GPT),
    "gpt_bigcode": Architecture("GPTBigCode", GPT),
    "gpt_neo": Architecture(
        "GPTNeo",
        IDS
        | {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 128,
        },
    ),
    "opt": Architecture(
        "OPT",
        IDS
        | {
            "pad_token_id": 5,  # a token that samples hold: its row of the table has no gradient
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 12,
            "do_layer_norm_before": False,
        },
        layout="equal_length",
        generic=("embed_positions",),
    ),
    # ---- positions by a bias on attention ----
    "bloom": Architecture(
        "Bloom", IDS | {"hidden_size": 16, "n_layer": 2, "n_head": 4}, layout="equal_length"
    ),
    "mpt": Architecture(
        "Mpt",
        {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        layout="equal_length",
    ),
    # ---- mixtures of experts, stacked in one parameter ----
    "mixtral": Architecture(
        "Mixtral", SMALL | LOCAL_EXPERTS | {"num_local_experts": 3}, generic=ROUTED
    ),
    "qwen2_moe": Architecture(
        "Qwen2Moe", SMALL | EXPERTS | {"shared_expert_intermediate_size": 12}, generic=ROUTED
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe", SMALL | HEADS | EXPERTS | {"norm_topk_prob": True}, generic=ROUTED
    ),
    "olmoe": Architecture("Olmoe", SMALL | EXPERTS, generic=ROUTED),
    "deepseek_v2": Architecture(
        "DeepseekV2", SMALL | LATENT_ATTENTION | SHARED_EXPERTS, generic=ROUTED
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3", SMALL | LATENT_ATTENTION | SHARED_EXPERTS, generic=ROUTED
    ),
    "glm4_moe": Architecture("Glm4Moe", SMALL | HEADS | SHARED_EXPERTS, generic=ROUTED),
    "granitemoe": Architecture(
        "GraniteMoe",
        SMALL | LOCAL_EXPERTS | {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
        generic=(*FUSED, "router"),
    ),
    "phimoe": Architecture("Phimoe", SMALL | LOCAL_EXPERTS, generic=(*FUSED, "router")),
}
