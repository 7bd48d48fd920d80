"""Objectives on the whole predicted distribution: kl, undial, ceu.

Each objective is a mean over the positions that predict a label. The mean is of a divergence
between the model's distribution `p` and a detached target `q`: `KL(q || p)`, or the cross-entropy
`-sum_v q_v log p_v`, which differs from `KL(q || p)` by a constant.
Source: Dong et al., arXiv 2402.10052 (undial); Yang, arXiv 2503.01224 (ceu).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Need, Objective, Outputs, required
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.registry import register
from geffect_fast.precision import widened


def model_logits(objective: Objective, outputs: Outputs) -> Tensor:
    """The model's logits `(n_targets, vocab)`, fp32 or better."""
    return widened(required(objective, outputs.logits, "the model's logits"))


def both_logits(
    objective: Objective, outputs: Outputs, reference: Outputs | None
) -> tuple[Tensor, Tensor]:
    """The model's and the reference's logits `(n_targets, vocab)`, fp32 or better.

    Raises:
        InputError: logits are missing, or the vocabularies differ.
    """
    model = model_logits(objective, outputs)
    given = None if reference is None else reference.logits
    frozen = required(objective, given, "the reference model's logits")
    if frozen.shape != model.shape:
        raise InputError(
            f"objective {objective}: the reference model predicts {frozen.shape[-1]} tokens and "
            f"the model {model.shape[-1]}; give a reference of the same vocabulary"
        )
    return model, widened(frozen.detach())


def on_targets(batch: Batch, values: Tensor) -> Tensor:
    """`values` `(n_targets,)` at the positions that predict a label, `(total_tokens,)`, else 0."""
    return values.new_zeros(batch.total_tokens).index_copy(0, batch.target_index, values)


@register("kl")
@dataclass(frozen=True)
class KL(Objective):
    """`mean KL(p_reference || p)` over the positions of the retain rows that predict a label."""

    on: ClassVar[Literal["forget", "retain"]] = "retain"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference_logits"})

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        model, frozen = (z.log_softmax(dim=-1) for z in both_logits(self, outputs, reference))
        divergence = kl_div(model, frozen, reduction="none", log_target=True).sum(dim=-1)
        return (batch.target_weight()[batch.target_index] * divergence).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        model, frozen = (z.log_softmax(dim=-1) for z in both_logits(self, outputs, reference))
        divergence = (frozen.exp() * (frozen - model)).sum(dim=-1)
        return on_targets(batch, batch.target_weight()[batch.target_index] * divergence)


@register("undial")
@dataclass(frozen=True)
class UNDIAL(Objective):
    """Self-distillation: `mean -sum_v q_v log p_v` with `q = softmax(z_reference - beta e_y)`.

    The target is the frozen model's distribution with the label's logit lowered by `beta`, so the
    gradient by the logits is `(softmax(z) - q) / N`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"reference_logits"})

    beta: float = parameter(10.0, at_least=0)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return self.token_terms(outputs, batch, reference).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        index = batch.target_index
        model, frozen = both_logits(self, outputs, reference)
        label = batch.targets[index, None]
        lowered = frozen.new_full(label.shape, -1.0) * self.beta  # may be -inf
        target = frozen.scatter_add(1, label, lowered).softmax(dim=-1)
        entropy = -(target * model.log_softmax(dim=-1)).sum(dim=-1)
        return on_targets(batch, batch.target_weight()[index] * entropy)


@register("ceu")
@dataclass(frozen=True)
class CEU(Objective):
    """Cross-entropy unlearning: `mean -sum_v q_v log p_v`, `q = softmax(z with z_y = -inf)`.

    The target is the model's own distribution without the label, held constant. The gradient is
    that of gradient ascent with the weight `p / (1 - p)` on each label token. The first `skip`
    label tokens of every answer are left out and not counted in the mean.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    skip: int = parameter(1, at_least=0)

    def cross_entropy(self, outputs: Outputs, batch: Batch) -> Tensor:
        """`-sum_v q_v log p_v` `(n_targets,)`."""
        logits = model_logits(self, outputs)
        label = batch.targets[batch.target_index, None]
        target = logits.detach().scatter(1, label, -torch.inf).softmax(dim=-1)
        return -(target * logits.log_softmax(dim=-1)).sum(dim=-1)

    def target_weight(self, batch: Batch) -> Tensor:
        """The weight of each token in the mean over the tokens that are not skipped.

        Raises:
            InputError: no token is left in the whole data set.
        """
        if batch.totals.n_targets_after("answer", self.skip) == 0:
            raise InputError(
                f"objective {self}: no answer has more than {self.skip} tokens, so none is left; "
                "lower skip"
            )
        return batch.target_weight(skip=self.skip)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        entropy = on_targets(batch, self.cross_entropy(outputs, batch))
        return (self.target_weight(batch) * entropy).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        # Two forms of the same gradient. The cross-entropy's is a difference of two distributions
        # that agree ever better as p falls; the weight 1 / (1 - p) rounds badly as p nears 1.
        logprob = outputs.token_logprob
        p = logprob.detach().double().exp().clamp(max=0.5)
        entropy = on_targets(batch, self.cross_entropy(outputs, batch))
        terms = torch.where(p < 0.5, p / (1 - p) * logprob, entropy)
        return self.target_weight(batch) * terms
