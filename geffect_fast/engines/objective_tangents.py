"""How objectives' token terms move with the model's outputs, by reverse mode twice.

The gradient of `sum_t c_t term_t` by the outputs is linear in `c`, with the Jacobian `J` of the
terms as its matrix. Its derivative by `c` along tangents `o'` of the outputs is therefore `J o'`:

    term'_t = d/dc_t < grad_o (c . term), o' >

So what the terms hold constant (`detach`, `no_grad`) is constant as it is in training, and code
with a derivative in reverse mode alone serves too. Source: J. Townsend, "A new trick for
calculating Jacobian vector products", 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, Outputs

TOLERANCE = 1e-3
"""Relative to the sum of the sizes of the terms' derivatives: rounding of sums in fp32."""


def term_tangents(
    objective: Objective,
    outputs: Outputs,
    batch: Batch,
    reference: Outputs | None,
    along: Sequence[Outputs],
) -> Tensor:
    """Derivatives of an objective's token terms `(M, total_tokens)` fp64.

    Args:
        objective: whose terms.
        outputs: the model's, detached.
        batch: on the model's device.
        reference: what the objective compares with.
        along: the outputs' derivatives along M directions.

    Raises:
        InputError: the terms' code has a gradient that cannot itself be differentiated.
    """
    leaves = tuple(x.detach().requires_grad_() for x in outputs.tensors())
    with torch.enable_grad():
        own = Outputs.of(leaves, outputs.logits is not None)
        terms = objective.token_terms(own, batch, reference).double()
        if not terms.requires_grad:
            return terms.new_zeros(len(along), len(terms))
        weights = torch.ones_like(terms, requires_grad=True)
        slopes = torch.autograd.grad(
            terms, leaves, grad_outputs=weights, create_graph=True, allow_unused=True
        )
    used = [i for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
    found = []
    for moved in along:
        tangents = moved.tensors()
        change = None
        if used:
            into = [slopes[i] for i in used], [weights], [tangents[i] for i in used]
            change = torch.autograd.grad(*into, retain_graph=True, allow_unused=True)[0]
        change = torch.zeros_like(terms) if change is None else change
        _check(objective, change, slopes, tangents)
        found.append(change)
    return torch.stack(found)


def _check(
    objective: Objective,
    change: Tensor,
    slopes: Sequence[Tensor | None],
    tangents: Sequence[Tensor],
) -> None:
    """Raise `InputError` where the terms' derivatives do not add up to that of their sum."""
    expected = change.new_zeros(())
    for slope, tangent in zip(slopes, tangents, strict=True):
        if slope is not None:
            expected = expected + (slope.detach().double() * tangent.double()).sum()
    if (change.sum() - expected).abs() > TOLERANCE * (change.abs().sum() + expected.abs()):
        raise InputError(
            f"objective {objective}: the gradient of its token_terms has no derivative, so the "
            "forward engine cannot tell the terms apart; use engine='reverse'"
        )
