"""Objectives made of re-weighted log-likelihoods: ga, nll, gd, po, wga, satimp, token_weights.

With `l = -log p` of a label token and `mean` the mean that the batch's reduction asks for, every
one of these objectives is `-mean w l` or `mean l`, with the weight `w` detached.
Source: Wang et al., arXiv 2502.19301; Maini et al., arXiv 2401.06121; Yang et al., arXiv
2505.11953 (satimp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from geffect_fast.data.batch import Batch, Role
from geffect_fast.objectives.base import WEIGHTS, Composite, Need, Objective, Outputs, required
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.registry import register


def mean_nll(outputs: Outputs, batch: Batch, role: Role = "answer") -> Tensor:
    """This batch's share of the mean negative log-likelihood of the labels of `role`, a scalar."""
    positions = batch.target_positions(role)
    nll = -outputs.token_logprob[positions]
    return (batch.target_weight(role)[positions] * nll).sum()


def probability_power(token_logprob: Tensor, alpha: float) -> Tensor:
    """Detached `p ** alpha` `(total_tokens,)` fp64, from the logarithm: `p` may underflow."""
    return (alpha * token_logprob.detach().double()).exp()


@register("ga")
@dataclass(frozen=True)
class GA(Objective):
    """Gradient ascent: `-mean l`, the negative log-likelihood turned around."""

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return -mean_nll(outputs, batch)

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return batch.target_weight() * outputs.token_logprob


@register("nll")
@dataclass(frozen=True)
class NLL(Objective):
    """Negative log-likelihood `mean l` of the retain rows; on any rows, the usual risk."""

    on: ClassVar[Literal["forget", "retain"]] = "retain"

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return mean_nll(outputs, batch)

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return -batch.target_weight() * outputs.token_logprob


@register("gd")
@dataclass(frozen=True)
class GD(Composite):
    """Gradient difference: `gamma * ga + alpha * nll`, up on forget and down on retain rows."""

    gamma: float = parameter(1.0, at_least=0)
    alpha: float = parameter(1.0, at_least=0)

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((self.gamma, GA()), (self.alpha, NLL()))


@register("po")
@dataclass(frozen=True)
class PO(Objective):
    """Preference for a refusal: `mean l` of the alternative answer to the forget question."""

    roles: ClassVar[tuple[Role, ...]] = ("alternative",)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return mean_nll(outputs, batch, "alternative")

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return -batch.target_weight("alternative") * outputs.token_logprob


@register("wga")
@dataclass(frozen=True)
class WGA(Objective):
    """Weighted gradient ascent: `-mean p^alpha l`, which spares tokens already forgotten."""

    alpha: float = parameter(1.0, at_least=0)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        weight = probability_power(outputs.token_logprob, self.alpha)
        return -(batch.target_weight() * weight * -outputs.token_logprob).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        weight = probability_power(outputs.token_logprob, self.alpha)
        return batch.target_weight() * weight * outputs.token_logprob


@register("satimp")
@dataclass(frozen=True)
class SatImp(Objective):
    """Saturation and importance: `-mean p^beta1 (1 - p)^beta2 l`.

    Tokens already forgotten (`p` near 0) and tokens that the rest of the answer gives away (`p`
    near 1) are spared. The paper adds the retain rows: `satimp + nll`.
    """

    beta1: float = parameter(5.0, at_least=0)
    beta2: float = parameter(1.0, at_least=0)

    def token_weight(self, outputs: Outputs) -> Tensor:
        """`p^beta1 (1 - p)^beta2`, detached, `(total_tokens,)` fp64."""
        # rounding may leave log p above 0
        logprob = outputs.token_logprob.detach().double().clamp(max=0)
        return probability_power(logprob, self.beta1) * (-logprob.expm1()) ** self.beta2

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return -(batch.target_weight() * self.token_weight(outputs) * -outputs.token_logprob).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return batch.target_weight() * self.token_weight(outputs) * outputs.token_logprob


@register("token_weights")
@dataclass(frozen=True)
class TokenWeights(Objective):
    """Gradient ascent with a weight for every token: `-mean w l`, `w` the rows' own `weights`.

    The mean counts tokens, not weights: where all weights are 1, the objective is `ga`.
    `geffect_fast.optimal_weights` gives the weights that are best to first order.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        weight = required(self, batch.weights, WEIGHTS)
        return -mean_nll(Outputs(weight * outputs.token_logprob), batch)

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        weight = required(self, batch.weights, WEIGHTS)
        return batch.target_weight() * weight * outputs.token_logprob
