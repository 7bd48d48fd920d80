"""Derivatives of objectives' token terms along tangents of the outputs, by reverse mode twice.

The gradient of `sum_t c_t term_t` by the outputs is linear in `c`, with the Jacobian `J` of the
terms as its matrix. Its derivative by `c` along tangents `o'` of the outputs is therefore `J o'`:

    term'_t = d/dc_t < grad_o (c . term), o' >

So whatever the terms hold constant (`detach`, `no_grad`) stays constant, as it does in training,
and code that has a derivative in reverse mode alone is served too. Source: J. Townsend, "A new
trick for calculating Jacobian vector products", 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.precision import widened
from geffect_fast.trying import no_memory

TOLERANCE = 1e-3
"""Largest miss, relative to the sum of the sizes of the terms' derivatives, that the rounding of
sums in fp32 explains."""

SMALLEST_SLOPE = torch.finfo(torch.float32).tiny / TOLERANCE
"""Slopes up to this size lose in fp32 as much as TOLERANCE, so that nothing can be told by them.
Nor can it by slopes that are 0 everywhere."""

ELSEWHERE = 0.75
"""Factor of the outputs at which terms are compared. At the outputs themselves the reference's may
be the same, and there kl, for example, has a gradient of nothing but rounding."""


def term_tangents(
    objective: Objective,
    outputs: Outputs,
    batch: Batch,
    reference: Outputs | None,
    along: Sequence[Outputs],
) -> Tensor:
    """Derivatives of an objective's token terms `(M, total_tokens)` fp64.

    Args:
        objective: the objective whose terms are differentiated.
        outputs: the model's outputs, detached.
        batch: the batch, on the model's device.
        reference: the outputs that the objective compares with.
        along: the outputs' derivatives along M directions.

    Raises:
        InputError: the terms' code has a gradient that cannot itself be differentiated.
    """
    terms, weights, slopes = _slopes(objective, outputs, batch, reference)
    found = []
    for tangents in along:
        pairs = [
            (slope, widened(tangent))
            for slope, tangent in zip(slopes, tangents.tensors(), strict=True)
            if slope is not None and slope.requires_grad
        ]
        found.append(_derivative(objective, pairs, weights) if pairs else torch.zeros_like(terms))
    return torch.stack(found)


def terms_disagree(
    objective: Objective,
    outputs: Outputs,
    batch: Batch,
    reference: Outputs | None,
    tangents: Outputs,
) -> Tensor:
    """Whether the terms' derivatives miss the derivative of their sum: `(2,)` bool on the device.

    The first says that they miss it. The second says that nothing can be told, because fp32 hardly
    holds the derivatives, as with a weight `p^alpha` of an unlikely token at a large alpha.

    Args:
        objective, outputs, batch, reference: as `term_tangents` takes them.
        tangents: the outputs' derivatives along a direction.
    """
    tensors = tuple(ELSEWHERE * x for x in outputs.tensors())
    shifted = Outputs.of(tensors, outputs.logits is not None)
    change = term_tangents(objective, shifted, batch, reference, [tangents])[0]
    expected, length = change.new_zeros(()), change.new_zeros(())
    slopes = _slopes(objective, shifted, batch, reference)[2]
    for slope, tangent in zip(slopes, tangents.tensors(), strict=True):
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
    """Terms, weights of 1, and the gradient of their product by each output.

    The gradients can be differentiated by the weights. None stands for an output that no term
    reads.
    """
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
    """The derivative by the weights of the sum of products of slopes and tangents."""
    slopes, tangents = zip(*pairs, strict=True)
    try:
        change = torch.autograd.grad(slopes, weights, tangents, retain_graph=True)[0]
    except RuntimeError as error:
        if no_memory(error):
            raise
        raise no_derivative(objective) from error
    return change


def no_derivative(objective: Objective) -> InputError:
    """The error for an objective whose terms' gradient has no derivative, or a wrong one."""
    return InputError(
        f"objective {objective}: the gradient of its token_terms has no derivative, so the "
        "forward engine cannot tell the terms apart; use engine='reverse'"
    )
