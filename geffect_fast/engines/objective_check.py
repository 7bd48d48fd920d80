"""Whether an objective's terms have the same derivative in forward mode as in reverse mode.

They have not where their code has no forward-mode rule, or drops tangents in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import grad

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, Outputs

TOLERANCE = 1e-3
"""Relative to the sum of the sizes of the terms' derivatives: rounding of sums in fp32."""

_SAYS = ("forward mode", "forward AD", "functorch", "vmap")
"""What torch's errors hold where code has no forward-mode rule."""


@contextmanager
def named(objective: Objective) -> Iterator[None]:
    """Errors of differentiating inside become one line that names the objective."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in _SAYS):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"objective {objective}: token_terms cannot be differentiated in forward mode "
            f"({reason}); use engine='reverse'"
        ) from error


def linearised(
    objective: Objective, outputs: Outputs, batch: Batch, reference: Outputs | None
) -> Tensor:
    """A scalar, linear in the outputs, with the derivative that reverse mode gives the terms."""
    logits = () if outputs.logits is None else (outputs.logits,)
    states = outputs.hidden_states or ()
    tensors = (outputs.token_logprob, *logits, *states)

    def total(token_logprob: Tensor, *rest: Tensor) -> Tensor:
        own = Outputs(
            token_logprob, rest[0] if logits else None, rest[len(logits) :] if states else None
        )
        return objective.token_terms(own, batch, reference).double().sum()

    slopes = grad(total, argnums=tuple(range(len(tensors))))(*(x.detach() for x in tensors))
    products = [
        (slope.detach().double() * x.double()).sum()
        for slope, x in zip(slopes, tensors, strict=True)
    ]
    return torch.stack(products).sum()


def check_same(objective: Objective, terms: Tensor, expected: Tensor) -> None:
    """Raise `InputError` where the derivatives differ.

    Args:
        objective: whose they are.
        terms: `(M, total_tokens)`, of its terms, in forward mode.
        expected: `(M,)`, of `linearised`.
    """
    limit = TOLERANCE * (terms.abs().sum(1) + expected.abs())
    if not bool(((terms.sum(1) - expected).abs() <= limit).all() | ~expected.isfinite().all()):
        raise InputError(
            f"objective {objective}: in forward mode token_terms has another derivative than in "
            "reverse mode, so it runs code that drops tangents; use engine='reverse'"
        )
