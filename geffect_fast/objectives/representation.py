"""Objectives on hidden states: rmu, rmu_mask, rr.

All are means over the positions that hold a label of the mean over the `d` features of `h`, the
hidden state of `layer` (0 the embeddings, as transformers counts them). Random vectors are drawn on
the CPU from `seed`, so that they are the same in every process and on every device.
Source: Li et al., arXiv 2403.03218 (rmu with `normalize`, rr); Wang et al., arXiv 2502.19301 (rmu).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Need, Objective, Outputs, required
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.registry import register
from geffect_fast.precision import widened
from geffect_fast.transfer import on_device


def uniform(like: Tensor, seed: int) -> Tensor:
    """`u ~ U[0, 1)^d`, `(d,)`, for hidden states `(total_tokens, d)`; drawn in fp32."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(like.shape[-1], generator=generator, dtype=torch.float32)
    return on_device(drawn, like.device).to(like.dtype)


def hidden_state(objective: Objective, outputs: Outputs | None, layer: int, whose: str) -> Tensor:
    """The hidden states of `layer`, `(total_tokens, d)`, fp32 or better.

    Raises:
        InputError: there are no hidden states, or the model has no such layer. The message
            names the model by `whose`.
    """
    given = None if outputs is None else outputs.hidden_states
    states = required(objective, given, f"{whose} hidden states")
    if layer >= len(states):
        raise InputError(
            f"objective {objective.name}: layer must be at least 0 and at most {len(states) - 1}, "
            f"{whose} last, got {layer}"
        )
    return widened(states[layer])


class _HiddenState(Objective):
    """An objective that is the mean of `|error|^2 / d` over the positions that hold a label."""

    needs: ClassVar[frozenset[Need]] = frozenset({"hidden_states"})
    term_at: ClassVar[Literal["prediction", "label"]] = "label"

    def error(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        """The hidden states minus their target, `(total_tokens, d)`."""
        raise NotImplementedError

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        positions = batch.label_positions()
        squared = self.error(outputs, reference)[positions].square().mean(dim=1)
        return (batch.label_weight()[positions] * squared).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return batch.label_weight() * self.error(outputs, reference).square().mean(dim=-1)


@register("rmu")
@dataclass(frozen=True)
class RMU(_HiddenState):
    """Representation misdirection: `mean (h - c u)^2`, `u ~ U[0, 1)^d`.

    With `normalize`, `u / |u|` takes the place of `u`. The papers add the retain rows: `nll`, or
    `rr` of the same layer.
    """

    layer: int = parameter(7, at_least=0)
    c: float = parameter(2.0, at_least=0)
    normalize: bool = False
    seed: int = parameter(0, at_least=0)

    def control(self, hidden: Tensor) -> Tensor:
        """The target `c u` of hidden states `(total_tokens, d)`, `(d,)`, fp32 or better."""
        u = uniform(hidden, self.seed)
        return self.c * (u / u.norm() if self.normalize else u)

    def error(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        hidden = hidden_state(self, outputs, self.layer, "the model's")
        return hidden - self.control(hidden)


@register("rmu_mask")
@dataclass(frozen=True)
class RMUMask(_HiddenState):
    """Masked misdirection: `mean (h - sg(h) m)^2`, `m = 1[u > 0.5]`, `u ~ U[0, 1)^d`.

    `sg(h)` is `h` held constant: about half of the features, the same at every position, are pulled
    to zero, and the others are left alone.
    """

    layer: int = parameter(7, at_least=0)
    seed: int = parameter(0, at_least=0)

    def mask(self, hidden: Tensor) -> Tensor:
        """`m` for hidden states `(total_tokens, d)`, `(d,)`: 1 where a feature stays, else 0."""
        return (uniform(hidden, self.seed) > 0.5).to(hidden)

    def error(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        hidden = hidden_state(self, outputs, self.layer, "the model's")
        return hidden - hidden.detach() * self.mask(hidden)


@register("rr")
@dataclass(frozen=True)
class RR(_HiddenState):
    """Retained representations: `mean (h - h_reference)^2` on the retain rows.

    Only positions that hold a label count, so padding does not.
    """

    on: ClassVar[Literal["forget", "retain"]] = "retain"
    needs: ClassVar[frozenset[Need]] = frozenset({"hidden_states", "reference_hidden_states"})

    layer: int = parameter(7, at_least=0)

    def error(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        hidden = hidden_state(self, outputs, self.layer, "the model's")
        frozen = hidden_state(self, reference, self.layer, "the reference model's").detach()
        if frozen.shape != hidden.shape:
            raise InputError(
                f"objective {self}: the reference model's hidden states have "
                f"{frozen.shape[-1]} features and the model's {hidden.shape[-1]}; give a reference "
                "of the same width"
            )
        return hidden - frozen
