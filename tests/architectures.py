"""Small causal language models of transformers, one row of a table each.

`tests/measure/test_architectures.py` compares every row with plain autograd; `docs/models.md` has
the same rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from torch import nn

VOCAB = 61
PADDING = 10
"""A token that samples hold. As the padding token, its row of the embedding has no gradient."""


@dataclass(frozen=True)
class Architecture:
    """A model of one kind: how to make it, and how it is expected to be served.

    Attributes:
        config: the configuration's class in transformers, less `Config`.
        settings: its arguments.
        layout: how samples may share a forward.
        generic: the kinds of parameters that take the generic rule; all others have a fast one.
        forward: the class of the module that forward mode cannot pass; None: it passes all.
    """

    config: str
    settings: dict[str, Any]
    layout: str = "packed"
    generic: tuple[str, ...] = ()
    forward: str | None = None

    def __call__(self) -> nn.Module:
        import transformers

        make = getattr(transformers, f"{self.config}Config")
        config = make(**copy.deepcopy(self.settings))  # some configurations change their arguments
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

# The masks of this model know packed sequences from transformers 5.24 on.
FALCON_LAYOUT = "packed" if Version(transformers.__version__) >= Version("5.24") else "equal_length"
FALCON = IDS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

FUSED = ("experts.down_proj", "experts.gate_up_proj")
ROUTED = (*FUSED, "gate")
CONVOLVED = ("conv1d", "conv1d.bias")
MAMBA2_KINDS = ("mamba.A_log", "mamba.D", "mamba.dt_bias", *CONVOLVED)

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
    "exaone4": Architecture("Exaone4", SMALL | WINDOW | {"sliding_window_pattern": 2}),
    "hunyuan_dense": Architecture("HunYuanDenseV1", SMALL | HEADS),
    "persimmon": Architecture(
        "Persimmon", SMALL | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}
    ),
    "apertus": Architecture("Apertus", SMALL, generic=("act_fn.alpha_n", "act_fn.alpha_p")),
    "falcon": Architecture(
        "Falcon",
        FALCON | {"alibi": False, "multi_query": True, "parallel_attn": True},
        layout=FALCON_LAYOUT,
    ),
    "falcon_new": Architecture(
        "Falcon",
        FALCON | {"alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True},
        layout=FALCON_LAYOUT,
    ),
    # ---- embeddings, residuals and logits that are scaled or capped ----
    "gemma": Architecture("Gemma", SMALL | HEADS | {"num_key_value_heads": 1}),
    "gemma2": Architecture(
        "Gemma2",
        SMALL | HEADS | {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16},
    ),
    "gemma3": Architecture(
        "Gemma3Text",
        SMALL | HEADS | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma4": Architecture(
        "Gemma4Text",
        SMALL
        | HEADS
        | WINDOW
        | PER_LAYER
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
        },
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
    "cohere": Architecture(
        "Cohere",
        SMALL | {"logit_scale": 0.25, "use_qk_norm": True},
        generic=("k_norm", "q_norm"),
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
            "pad_token_id": PADDING,
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
        "Bloom",
        IDS | {"hidden_size": 16, "n_layer": 2, "n_head": 4},
        layout="equal_length",
        forward="BloomGelu",
    ),
    "mpt": Architecture(
        "Mpt",
        {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        layout="equal_length",
    ),
    "falcon_alibi": Architecture(
        "Falcon",
        FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        layout="equal_length",
    ),
    # ---- mixtures of experts, stacked in one parameter ----
    "mixtral": Architecture("Mixtral", SMALL | LOCAL_EXPERTS, generic=ROUTED),
    "qwen2_moe": Architecture(
        "Qwen2Moe", SMALL | EXPERTS | {"shared_expert_intermediate_size": 12}, generic=ROUTED
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe", SMALL | HEADS | EXPERTS | {"norm_topk_prob": True}, generic=ROUTED
    ),
    "olmoe": Architecture(
        "Olmoe", SMALL | EXPERTS | {"output_router_logits": True}, generic=ROUTED
    ),
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
    "granitemoeshared": Architecture(
        "GraniteMoeShared",
        SMALL | LOCAL_EXPERTS | {"shared_intermediate_size": 12, "residual_multiplier": 0.5},
        generic=(*FUSED, "router"),
    ),
    "ernie4_5_moe": Architecture(
        "Ernie4_5_Moe",
        SMALL
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 12,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
        },
        generic=ROUTED,
    ),
    "hunyuan_moe": Architecture(
        "HunYuanMoEV1", SMALL | HEADS | {"num_experts": 4, "moe_topk": 2}, generic=FUSED
    ),
    "minimax_m2": Architecture("MiniMaxM2", SMALL | HEADS | LOCAL_EXPERTS, generic=ROUTED),
    "gpt_oss": Architecture(
        "GptOss",
        SMALL | HEADS | WINDOW | LOCAL_EXPERTS,
        layout="equal_length",
        generic=(
            *FUSED,
            "experts.down_proj_bias",
            "experts.gate_up_proj_bias",
            "router",
            "router.bias",
            "self_attn.sinks",
        ),
    ),
    "dbrx": Architecture(
        "Dbrx",
        {
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 12,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 16,
            },
        },
        generic=("mlp.v1", "mlp.w1", "mlp.w2"),
    ),
    "llama4": Architecture(
        "Llama4Text",
        SMALL
        | HEADS
        | LOCAL_EXPERTS
        | {
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 24,
            "attention_chunk_size": 8,
            "moe_layers": [1],
        },
        layout="single",
        generic=(*FUSED, "router"),
    ),
    "jetmoe": Architecture(
        "JetMoe",
        SMALL | LOCAL_EXPERTS | {"kv_channels": 4},
        layout="single",
        generic=("experts.bias", "input_linear", "mlp.bias", "output_linear"),
    ),
    # ---- state spaces and other recurrences, alone and beside attention ----
    "mamba": Architecture(
        "Mamba",
        IDS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        layout="equal_length",
        generic=("mixer.A_log", "mixer.D", *CONVOLVED, "dt_proj", "dt_proj.bias"),
    ),
    "mamba2": Architecture(
        "Mamba2",
        IDS
        | {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        layout="equal_length",
        generic=("mixer.A_log", "mixer.D", "mixer.dt_bias", *CONVOLVED, "norm"),
    ),
    "rwkv": Architecture(
        "Rwkv",
        IDS
        | {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "attention_hidden_size": 16,
            "context_length": 128,
            "use_cache": False,  # else tensors that a backward needs change in place
        },
        layout="equal_length",
        generic=(
            *(f"attention.time_{x}" for x in ("decay", "first", "mix_key", "mix_value")),
            "attention.time_mix_receptance",
            "feed_forward.time_mix_key",
            "feed_forward.time_mix_receptance",
        ),
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemma",
        SMALL | {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4},
        layout="equal_length",
        generic=(
            "conv_1d",
            "conv_1d.bias",
            "rg_lru.recurrent_param",
            *(f"rg_lru.{x}_gate_{y}" for x in ("input", "recurrent") for y in ("bias", "weight")),
        ),
        forward="RecurrentGemmaRglru",
    ),
    "jamba": Architecture(
        "Jamba",
        SMALL
        | {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
            "use_mamba_kernels": False,
        },
        layout="equal_length",
        generic=(
            *FUSED,
            "router",
            "mamba.A_log",
            "mamba.D",
            *CONVOLVED,
            "dt_proj",
            "dt_proj.bias",
        ),
    ),
    "bamba": Architecture(
        "Bamba",
        SMALL | MAMBA2 | {"attn_layer_indices": [1]},
        layout="equal_length",
        generic=(*MAMBA2_KINDS, "norm"),
    ),
    "falcon_h1": Architecture(
        "FalconH1",
        SMALL | HEADS | MAMBA2 | {"mamba_d_ssm": 32},
        layout="equal_length",
        generic=MAMBA2_KINDS,
    ),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybrid",
        SMALL
        | MAMBA2
        | LOCAL_EXPERTS
        | {"shared_intermediate_size": 12, "layer_types": ["mamba", "attention"]},
        layout="equal_length",
        generic=(*FUSED, "router", *MAMBA2_KINDS, "norm"),
    ),
    "zamba2": Architecture(
        "Zamba2",
        SMALL
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "mamba_d_state": 4,
            "n_mamba_heads": 4,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "use_mamba_kernels": False,
        },
        layout="equal_length",
        generic=(*MAMBA2_KINDS, "norm"),
    ),
    "nemotron_h": Architecture(
        "NemotronH",
        SMALL
        | HEADS
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "chunk_size": 8,
        },
        layout="equal_length",
        generic=("mixer.A_log", "mixer.D", "mixer.dt_bias", *CONVOLVED, "norm"),
    ),
    "lfm2": Architecture(
        "Lfm2",
        SMALL
        | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8},
        layout="equal_length",
        generic=("conv",),
    ),
    "qwen3_next": Architecture(
        "Qwen3Next",
        SMALL
        | HEADS
        | EXPERTS
        | {
            "shared_expert_intermediate_size": 12,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        layout="single",
        generic=(*ROUTED, "linear_attn.A_log", "linear_attn.dt_bias", "conv1d", "norm"),
    ),
}
