"""Adapters (LoRA) that are trained in place of a model's own weights."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import nn

from geffect_fast.errors import InputError, in_one_line
from geffect_fast.unlearn_settings import Training


def with_adapter(model: nn.Module, config: Training) -> Any:
    """Put a new adapter into a model and freeze all other weights.

    The adapter changes no output yet. Its first weights are drawn by torch, from the seed of the
    training.

    Args:
        model: a model of transformers; changed in place.
        config: the training, which gives rank, scale, dropout and modules of the adapter.

    Raises:
        InputError: peft is missing, the model is an adapter already, or there is nothing to adapt.
    """
    assert config.lora_rank is not None
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora_rank: needs peft, which is not installed; pip install peft")
    import peft

    if isinstance(model, peft.PeftModel):
        raise InputError(
            "lora_rank: the model is an adapter already, which is trained on; leave lora_rank out"
        )
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from attributes that peft reads
            return peft.get_peft_model(model, settings).eval()
    except (ValueError, TypeError, AttributeError) as error:
        named = ", ".join(config.lora_targets) or "linear layers"
        raise InputError(
            f"lora_rank: {type(model).__name__} has no {named} to adapt "
            f"({in_one_line(error)}); give lora_targets, or leave lora_rank out"
        ) from error
