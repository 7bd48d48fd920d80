"""How objectives' token terms move with the model's outputs, by the terms' own code.

What it does on the outputs is a small part of the work, so it is differentiated one direction after
the other, by torch's own forward mode, which costs the least a function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, Outputs

TOLERANCE = 1e-3
"""Relative to the sum of the sizes of the terms' derivatives: rounding of sums in fp32."""


def term_tangents(
    objectives: Iterable[Objective],
    outputs: Outputs,
    batch: Batch,
    reference: Outputs | None,
    along: Outputs,
) -> Tensor:
    """Derivatives of the objectives' token terms `(K, total_tokens)` fp64.

    Args:
        objectives: K of them.
        outputs: the model's.
        batch: on the model's device.
        reference: what the objectives compare with.
        along: the outputs' derivatives.

    Raises:
        InputError: an objective runs code without a forward-mode derivative.
    """
    found = []
    with forward_ad.dual_level():
        pairs = zip(outputs.tensors(), along.tensors(), strict=True)
        moving = Outputs.of(
            tuple(forward_ad.make_dual(x, t) for x, t in pairs), outputs.logits is not None
        )
        for objective in objectives:
            with _named(objective):
                terms = objective.token_terms(moving, batch, reference)
            value, tangent = forward_ad.unpack_dual(terms)
            found.append(torch.zeros_like(value) if tangent is None else tangent)
    return torch.stack([tangent.double() for tangent in found])


def check_terms(
    objective: Objective,
    outputs: Outputs,
    batch: Batch,
    reference: Outputs | None,
    along: Sequence[Outputs],
    found: Tensor,
) -> None:
    """Raise `InputError` where reverse mode gives the terms another derivative.

    Code without a forward-mode rule may drop tangents in silence.

    Args:
        objective, outputs, batch, reference: as `term_tangents`.
        along: the outputs' derivatives along M directions.
        found: `(M, total_tokens)`, of `term_tangents`.
    """
    leaves = tuple(x.detach().requires_grad_() for x in outputs.tensors())
    terms = objective.token_terms(Outputs.of(leaves, outputs.logits is not None), batch, reference)
    if not terms.requires_grad:
        slopes: Sequence[Tensor | None] = [None] * len(leaves)
    else:
        slopes = torch.autograd.grad(terms.double().sum(), leaves, allow_unused=True)
    for m, moved in enumerate(along):
        products = [
            (slope.double() * t.double()).sum()
            for slope, t in zip(slopes, moved.tensors(), strict=True)
            if slope is not None
        ]
        expected = sum(products, found.new_zeros(()))
        limit = TOLERANCE * (found[m].abs().sum() + expected.abs())
        if (found[m].sum() - expected).abs() > limit:
            raise InputError(
                f"objective {objective}: in forward mode token_terms has another derivative than "
                "in reverse mode, so it runs code that drops tangents; use engine='reverse'"
            )


@contextmanager
def _named(objective: Objective) -> Iterator[None]:
    """Code that forward mode cannot pass becomes one line that names the objective."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("forward mode", "forward AD")):
            raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"objective {objective}: token_terms cannot be differentiated in forward mode "
            f"({reason}); use engine='reverse'"
        ) from error
