"""Objectives with a constraint and its multiplier: pdu.

Source: Entesari et al., arXiv 2506.05314.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Composite, Need, Objective, Outputs
from geffect_fast.objectives.divergence import model_logits, on_targets
from geffect_fast.objectives.likelihood import NLL
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.registry import register


@dataclass(frozen=True)
class LogitFlattening(Objective):
    """`mean (max_v z_v - mean_v z_v)^2` over the positions of the forget rows that predict a label.

    The value is least where all logits are equal, that is, where the prediction is uniform.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"logits"})

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return self.token_terms(outputs, batch, reference).sum()

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        logits = model_logits(self, outputs)
        excess = logits.amax(dim=-1) - logits.mean(dim=-1)
        return batch.target_weight() * on_targets(batch, excess.square())


@dataclass(frozen=True)
class NLLConstraint(NLL):
    """`mean (l - eps)` on the retain rows: positive where the likelihood there falls short."""

    eps: float = parameter(at_least=0)

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        return super().loss(outputs, batch, reference) - self.eps * batch.target_weight().sum()


@register("pdu")
@dataclass(frozen=True)
class PDU(Composite):
    """Primal-dual unlearning: `gamma mean (max z - mean z)^2 + dual (NLL_retain - eps)`.

    The Lagrangian of flat logits on the forget rows under the constraint `NLL_retain <= eps`.
    Training alternates between steps on it and steps on its multiplier,

        dual <- max(0, dual + step (NLL_retain - eps))

    so a profile, which looks at one model, looks at one `dual`: `updated` gives the objective after
    a dual step. `dual` starts at 1 and is held there while training warms up (five epochs).
    """

    gamma: float = parameter(1.0, at_least=0)
    eps: float = parameter(None, at_least=0)  # required, though it follows a default
    step: float = parameter(1.0, at_least=0)
    dual: float = parameter(1.0, at_least=0)

    def __post_init__(self) -> None:
        if self.eps is None:
            raise InputError("objective pdu needs a value for eps")
        super().__post_init__()

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((self.gamma, LogitFlattening()), (self.dual, NLLConstraint(self.eps)))

    def updated(self, retain_nll: float) -> PDU:
        """The objective after a dual step, given the mean NLL of the retain rows."""
        # in this order max keeps a NaN, which the check of `dual` then reports
        return replace(self, dual=max(self.dual + self.step * (retain_nll - self.eps), 0.0))
