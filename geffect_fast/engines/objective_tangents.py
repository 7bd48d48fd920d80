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

from geffect_fast.capture.precision import widened
from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.trying import no_memory

TOLERANCE = 1e-3
"""Relative to the sum of the sizes of the terms' derivatives: rounding of sums in fp32."""

SMALLEST_SLOPE = torch.finfo(torch.float32).tiny / TOLERANCE
"""A slope below loses in fp32 as much as is told wrong by; one of 0 in all places says nothing."""

ELSEWHERE = 0.75
"""By what outputs are multiplied where code is tried: kl, say, has no gradient but rounding at the
outputs of its own reference, and nothing could be compared there."""


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
    terms, weights, slopes = _slopes(objective, outputs, batch, reference)
    found = []
    for moved in along:
        pairs = [
            (slope, widened(tangent))
            for slope, tangent in zip(slopes, moved.tensors(), strict=True)
            if slope is not None and slope.requires_grad
        ]
        found.append(_derivative(objective, pairs, weights) if pairs else torch.zeros_like(terms))
    return torch.stack(found)


def terms_disagree(
    objective: Objective, outputs: Outputs, batch: Batch, reference: Outputs | None, moved: Outputs
) -> Tensor:
    """Whether the terms' derivatives add up to that of their sum: `(2,)` bool on the device.

    The first says that they do not, the second that there is nothing to tell by: derivatives that
    fp32 hardly holds, as those of a weight `p^alpha` of an unlikely token at a large alpha are.

    Args:
        objective, outputs, batch, reference: as `term_tangents`.
        moved: the outputs' derivatives along a direction.
    """
    tensors = tuple(ELSEWHERE * x for x in outputs.tensors())
    shifted = Outputs.of(tensors, outputs.logits is not None)
    change = term_tangents(objective, shifted, batch, reference, [moved])[0]
    expected, length = change.new_zeros(()), change.new_zeros(())
    slopes = _slopes(objective, shifted, batch, reference)[2]
    for slope, tangent in zip(slopes, moved.tensors(), strict=True):
        if slope is not None:
            expected = expected + (slope.detach().double() * tangent.double()).sum()
            length = length + tangent.double().abs().sum()
    size = change.abs().sum() + expected.abs()
    wrong = (change.sum() - expected).abs() > TOLERANCE * size
    nothing = size <= SMALLEST_SLOPE * length
    return torch.stack([wrong & ~nothing, nothing])


def _slopes(
    objective: Objective, outputs: Outputs, batch: Batch, reference: Outputs | None
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Terms, weights of 1, and the gradient of their product by each output, to be differentiated
    by the weights."""
    # In fp32 at least: gradients rounded to bf16 would not add up.
    leaves = tuple(widened(x.detach()).requires_grad_() for x in outputs.tensors())
    with torch.enable_grad():
        own = Outputs.of(leaves, outputs.logits is not None)
        terms = objective.token_terms(own, batch, reference).double()
        weights = torch.ones_like(terms, requires_grad=True)
        if not terms.requires_grad:
            return terms, weights, [None] * len(leaves)
        slopes = torch.autograd.grad(
            terms, leaves, grad_outputs=weights, create_graph=True, allow_unused=True
        )
    return terms, weights, slopes


def _derivative(
    objective: Objective, pairs: Sequence[tuple[Tensor, Tensor]], weights: Tensor
) -> Tensor:
    """By the weights, of the sum of products of slopes and tangents."""
    slopes, tangents = zip(*pairs, strict=True)
    try:
        change = torch.autograd.grad(slopes, weights, tangents, retain_graph=True)[0]
    except RuntimeError as error:
        if no_memory(error):
            raise
        raise no_derivative(objective) from error
    return change


def no_derivative(objective: Objective) -> InputError:
    """That an objective's terms have no derivative of their gradient, or a wrong one."""
    return InputError(
        f"objective {objective}: the gradient of its token_terms has no derivative, so the "
        "forward engine cannot tell the terms apart; use engine='reverse'"
    )
