"""The jobs of bench_gpu_engines.py: the model, batches of a training step, and the profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from bench_sweep import SWEEP
from torch import Tensor, nn

Rows = list[dict[str, list[int]]]

SEVEN = [
    "ga",
    "wga(alpha=1)",
    "npo(beta=0.1)",
    "tnpo(beta=4)",
    "wtnpo(beta=4, alpha=1)",
    "simnpo(beta=2.5)",
    "rmu(layer=3, c=2)",
]
SWEPT = [objective for variants in SWEEP.values() for objective in variants]


class Job(NamedTuple):
    """A profile: its name in the table, its objectives, and its other arguments."""

    name: str
    objectives: list[str]
    arguments: dict[str, Any]


BY_BOTH = ("parameter", "sample")
JOBS = [
    Job(
        "reverse, 1 objective, parameter x sample",
        ["ga"],
        {"engine": "reverse", "resolve": BY_BOTH, "norms": False},
    ),
    Job(
        "forward, 21 objectives, sample x token",
        SWEPT,
        {"engine": "forward", "resolve": ("sample", "token")},
    ),
    Job(
        "forward, 1 objective, sample x token",
        ["ga"],
        {"engine": "forward", "resolve": ("sample", "token")},
    ),
    Job(
        "reverse, 7 objectives, parameter x sample",
        SEVEN,
        {"engine": "reverse", "resolve": BY_BOTH, "norms": False},
    ),
    Job(
        "reverse, 1 objective, parameter x sample, norms",
        ["ga"],
        {"engine": "reverse", "resolve": BY_BOTH},
    ),
    Job("auto, 21 objectives, sample", SWEPT, {"resolve": ("sample",), "norms": False}),
]


def make_model(device: torch.device, tiny: bool, seed: int) -> nn.Module:
    """A Llama with random weights in bf16; a tiny one in fp32, which a CPU is faster in."""
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    if tiny:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192}
    config = transformers.LlamaConfig(
        **size,
        **heads,
        head_dim=size["hidden_size"] // heads["num_attention_heads"],
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def padded(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """A batch as a data collator makes it."""
    longest = max(len(row["labels"]) for row in rows)

    def filled(key: str, value: int) -> Tensor:
        lists = [row[key] + [value] * (longest - len(row[key])) for row in rows]
        return torch.tensor(lists, device=device)

    lengths = torch.tensor([[len(row["labels"])] for row in rows], device=device)
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", -100),
        "attention_mask": (torch.arange(longest, device=device) < lengths).long(),
    }


def packed(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """A batch as one row; positions restart with every sample, which attends to itself alone."""
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in (-100, *row["labels"][1:])]
    positions = [place for row in rows for place in range(len(row["labels"]))]
    made = (torch.tensor([each], device=device) for each in (ids, labels, positions))
    return dict(zip(("input_ids", "labels", "position_ids"), made, strict=True))


LAYOUTS = {"packed": packed, "padded": padded}


def train(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
    """Run forward and backward of some batches, add up their gradients, and drop them."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
