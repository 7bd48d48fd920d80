"""The model that benchmarks run."""

from __future__ import annotations

import torch
from torch import nn


def make_model(quick: bool) -> nn.Module:
    """A Llama of 27M parameters with random weights, or a tiny one of the same vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = (
        {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4}
        if quick
        else {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
    )
    config = LlamaConfig(
        **size,
        vocab_size=8192,
        num_attention_heads=8,
        num_key_value_heads=8,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()
