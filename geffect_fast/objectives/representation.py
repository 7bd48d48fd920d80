"""Objectives on hidden states: rmu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Need, Objective, Outputs, required
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.registry import register


@register("rmu")
@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection: `mean over label positions of mean_d (h - c u)^2`.

    `h` is the hidden state of `layer` (0 the embeddings) and `u ~ U[0, 1)^d`, drawn on the CPU from
    `seed` so that it is the same on every device; with `normalize`, `u / |u|` takes its place.
    Source: Li et al., arXiv 2403.03218; Wang et al., arXiv 2502.19301 (not normalised).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"hidden_states"})

    layer: int = parameter(7, at_least=0)
    c: float = parameter(2.0, at_least=0)
    normalize: bool = False
    seed: int = parameter(0, at_least=0)

    def control(self, hidden: Tensor) -> Tensor:
        """The target `c u` of hidden states `(total_tokens, d)`, `(d,)`, fp32 or better."""
        generator = torch.Generator().manual_seed(self.seed)
        u = torch.rand(hidden.shape[-1], generator=generator, dtype=torch.float32).to(hidden)
        return self.c * (u / u.norm() if self.normalize else u)

    def hidden(self, outputs: Outputs) -> Tensor:
        """The hidden states of `layer`, `(total_tokens, d)`, fp32 or better.

        Raises:
            InputError: the model has no such layer.
        """
        states = required(self, outputs.hidden_states, "hidden states")
        if self.layer >= len(states):
            raise InputError(
                f"objective rmu: layer must be at least 0 and at most {len(states) - 1} "
                f"for this model, got {self.layer}"
            )
        state = states[self.layer]
        return state.to(torch.promote_types(state.dtype, torch.float32))

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        mask = batch.label_mask()
        hidden = self.hidden(outputs)
        away = hidden[mask] - self.control(hidden)
        return (batch.label_weight()[mask] * away.square().mean(dim=1)).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        hidden = self.hidden(outputs)
        return batch.label_weight() * (hidden - self.control(hidden)).pow(2).mean(dim=-1)
