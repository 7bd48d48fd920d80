"""Objectives that hold the whole predicted distribution: kl."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from geffect_fast.data.batch import Batch
from geffect_fast.objectives.base import Need, Objective, Outputs, required
from geffect_fast.objectives.registry import register


@register("kl")
@dataclass(frozen=True)
class KL(Objective):
    """`mean KL(p_reference || p)` over the positions of the retain rows that predict a label."""

    on: ClassVar[Literal["forget", "retain"]] = "retain"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference_logits"})

    def log_probabilities(self, outputs: Outputs | None, whose: str) -> Tensor:
        """Log-softmax of the logits, `(n_targets, vocab)`, fp32 or better."""
        given = outputs.logits if outputs is not None else None
        logits = required(self, given, f"{whose} logits")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.log_softmax(dim=-1, dtype=dtype)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        model = self.log_probabilities(outputs, "the model's")
        frozen = self.log_probabilities(reference, "the reference model's")
        divergence = kl_div(model, frozen, reduction="none", log_target=True).sum(dim=-1)
        return (batch.target_weight()[batch.target_index] * divergence).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        model = self.log_probabilities(outputs, "the model's")
        frozen = self.log_probabilities(reference, "the reference model's").detach()
        index = batch.target_index
        weighted = batch.target_weight()[index] * (frozen.exp() * (frozen - model)).sum(dim=-1)
        return weighted.new_zeros(batch.total_tokens).index_copy(0, index, weighted)
