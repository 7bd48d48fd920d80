"""Objectives that compare answers: npo, tnpo, wtnpo, dpo, altpo, simnpo.

With `l = -log p` of a label token, `S_i` its sum over sample `i`, `S0_i` the same under the frozen
reference and `r_i = S0_i - S_i` the log-ratio. npo, dpo and simnpo are means over samples of a
function of the whole sequence: their token terms are the detached derivative times `log p`.
Source: Zhang et al., arXiv 2404.05868 (npo); Wang et al., arXiv 2502.19301 (tnpo, wtnpo);
Rafailov et al., arXiv 2305.18290 (dpo); Mekala et al., arXiv 2409.13474 (altpo); Fan et al., arXiv
2410.07163 (simnpo).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from geffect_fast.data.batch import IGNORE, Batch, Role
from geffect_fast.objectives.base import Composite, Need, Objective, Outputs, required
from geffect_fast.objectives.likelihood import NLL, probability_power
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.registry import register


class _Referenced(Objective):
    """An objective that reads the reference model's log-probabilities of the labels."""

    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def token_log_ratio(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        """`log p - log p0`, `(total_tokens,)` fp64."""
        frozen = required(self, reference, "the reference model's log-probabilities")
        return outputs.token_logprob.double() - frozen.token_logprob.double()

    def sample_log_ratio(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        """`r_i = sum_t (log p - log p0)` over the answer's label tokens, `(n_samples,)` fp64."""
        return batch.sample_sum(self.token_log_ratio(outputs, reference), batch.target_mask())


@register("npo")
@dataclass(frozen=True)
class NPO(_Referenced):
    """Negative preference optimisation: `-(2/beta) mean_B log sigmoid(beta (S_i - S0_i))`."""

    beta: float = parameter(0.1, above=0)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        margin = -self.sample_log_ratio(outputs, batch, reference)
        return -2 / self.beta * batch.sample_weight() * logsigmoid(self.beta * margin).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        ratio = self.sample_log_ratio(outputs, batch, reference).detach()
        weight = 2 * batch.sample_weight() * (self.beta * ratio).sigmoid()
        return batch.spread(weight) * batch.target_mask() * outputs.token_logprob


@register("tnpo")
@dataclass(frozen=True)
class TNPO(_Referenced):
    """Token-wise npo: `-mean w l` with `w = 2 sigmoid(beta (log p - log p0))`."""

    beta: float = parameter(4.0, above=0)

    def token_weight(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        """`w`, detached, `(total_tokens,)` fp64."""
        ratio = self.token_log_ratio(outputs, reference).detach()
        return 2 * (self.beta * ratio).sigmoid()

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        weight = self.token_weight(outputs, reference)
        return -(batch.target_weight() * weight * -outputs.token_logprob).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        weight = self.token_weight(outputs, reference)
        return batch.target_weight() * weight * outputs.token_logprob


@register("wtnpo")
@dataclass(frozen=True)
class WTNPO(TNPO):
    """Weighted token-wise npo: tnpo with `w = 2 p^alpha sigmoid(beta (log p - log p0))`."""

    alpha: float = parameter(1.5, at_least=0)

    def token_weight(self, outputs: Outputs, reference: Outputs | None) -> Tensor:
        power = probability_power(outputs.token_logprob, self.alpha)
        return power * super().token_weight(outputs, reference)


@register("dpo")
@dataclass(frozen=True)
class DPO(_Referenced):
    """Direct preference optimisation: `-(2/beta) mean_B log sigmoid(beta (r_win - r_lose))`.

    The alternative answer wins, the sample's own answer loses. Each of several alternatives makes a
    pair, and a sample's value is the mean over its pairs. Where nothing wins, the factor `2/beta`
    makes the objective npo.
    """

    roles: ClassVar[tuple[Role, ...]] = ("answer", "alternative")

    beta: float = parameter(0.1, above=0)

    def margin(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        """`r_win - r_lose` with each sequence as the winner, `(n_sequences,)` fp64.

        A sample's own answer stands for no winner at all, `r_win = 0`.
        """
        ratio = self.token_log_ratio(outputs, reference)
        win = batch.sequence_sum(ratio, batch.target_mask("alternative"))
        lose = self.sample_log_ratio(outputs, batch, reference)
        return win - lose[batch.sequence_sample]

    def pair_weight(self, batch: Batch) -> Tensor:
        """The weight of each winning sequence's pair, `(n_sequences,)` fp64.

        A sample's pairs share its weight; its answer is a pair only where it has no alternative.
        """
        sample = batch.sequence_sample
        wins = batch.plays("alternative").double()
        n_wins = wins.new_zeros(batch.n_samples).index_add(0, sample, wins)[sample]
        return batch.sample_weight() * torch.where(n_wins == 0, 1.0, wins / n_wins.clamp(min=1))

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        score = logsigmoid(self.beta * self.margin(outputs, batch, reference))
        return -2 / self.beta * (self.pair_weight(batch) * score).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        margin = self.margin(outputs, batch, reference).detach()
        up = 2 * self.pair_weight(batch) * (-self.beta * margin).sigmoid()
        down = up.new_zeros(batch.n_samples).index_add(0, batch.sequence_sample, up)
        weight = torch.where(
            batch.role_mask("answer"), batch.spread(down), -up[batch.token_sequence()]
        )
        return (batch.targets != IGNORE) * weight * outputs.token_logprob


@register("altpo")
@dataclass(frozen=True)
class AltPO(Composite):
    """Alternate preference optimisation: `dpo(beta) + alpha * nll`.

    The winners are plausible other answers to the question, not refusals: give a row several as a
    list in its field `alternative` (the paper generates five).
    """

    beta: float = parameter(0.1, above=0)
    alpha: float = parameter(1.0, at_least=0)

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((1.0, DPO(self.beta)), (self.alpha, NLL()))


@register("simnpo")
@dataclass(frozen=True)
class SimNPO(Objective):
    """npo without a reference: `-(2/beta) mean_B log sigmoid(beta (S_i/n_i - delta))`.

    A sample without label tokens has `S_i/n_i = 0`.
    """

    beta: float = parameter(4.5, above=0)
    delta: float = parameter(0.0)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        mask = batch.target_mask()
        mean_nll = batch.sample_sum(-outputs.token_logprob.double(), mask) / self._n_targets(batch)
        score = logsigmoid(self.beta * (mean_nll - self.delta))
        return -2 / self.beta * batch.sample_weight() * score.sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        mask = batch.target_mask()
        logprob = outputs.token_logprob.double()
        n_targets = self._n_targets(batch)
        mean_logprob = batch.sample_sum(logprob.detach(), mask) / n_targets
        excess = (self.beta * (mean_logprob + self.delta)).sigmoid()
        return batch.spread(2 * batch.sample_weight() * excess / n_targets) * mask * logprob

    @staticmethod
    def _n_targets(batch: Batch) -> Tensor:
        """Label tokens of each sample, at least 1, `(n_samples,)` fp64."""
        mask = batch.target_mask()
        return batch.sample_sum(mask.double(), mask).clamp(min=1)
