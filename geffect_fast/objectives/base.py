"""What an objective is: which data it reads, what it needs, and its per-token terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from geffect_fast.data.batch import Batch, Role

Need = Literal["reference", "reference_logits", "hidden_states"]


@dataclass(frozen=True)
class Outputs:
    """What a model says about a batch; the reference model's outputs have the same shape.

    Attributes:
        token_logprob: `(total_tokens,)` log-probability of `batch.targets`, fp32 or better, 0 where
            there is no target; differentiable for the model, detached for the reference.
        logits: `(n_targets, vocab)` logits at `batch.target_index`; None where nobody asked.
        hidden_states: `(total_tokens, d)` each, index 0 the embeddings, as transformers counts
            them; None where nobody asked.
    """

    token_logprob: Tensor
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Objective:
    """Something to descend on; its share on one batch is `loss`, summed over batches the whole.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters.

    Class attributes:
        name: what it is called in objective strings.
        on: the data it reads, `forget` or `retain`.
        roles: which sequences of a sample it reads.
        needs: what must be computed for it besides the log-probabilities of the labels.
    """

    name: ClassVar[str]
    on: ClassVar[Literal["forget", "retain"]] = "forget"
    roles: ClassVar[tuple[Role, ...]] = ("answer",)
    needs: ClassVar[frozenset[Need]] = frozenset()

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        """This batch's share of the objective, a scalar: the published formula itself."""
        raise NotImplementedError(f"{type(self).__name__} must define loss()")

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        """Per-token terms `(total_tokens,)` whose sum has the gradient of `loss`."""
        raise NotImplementedError(f"{type(self).__name__} must define token_terms()")

    def parts(self) -> tuple[tuple[float, Objective], ...]:
        """The weighted sum this objective is: `((coefficient, objective), ...)`, here itself alone."""
        return ((1.0, self),)
