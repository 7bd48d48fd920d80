"""The model and the rows that benchmarks run."""

from __future__ import annotations

import torch
from torch import nn

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4},
    "27M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6},
    "135M": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 2},
}
"""Settings by the number of parameters. The last has the widths of a model of 1B."""


def make_model(quick: bool, size: str = "27M") -> nn.Module:
    """A Llama of one of `SIZES` with random weights; where it is quick, the tiny one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES["tiny" if quick else size],
        vocab_size=8192,
        num_attention_heads=8,
        num_key_value_heads=8,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def random_rows(n: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Sequences of random tokens, all of them labelled."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(3, 8192, (n, length), generator=generator).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in drawn]
