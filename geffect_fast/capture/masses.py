"""Sizes and squares of per-sample gradients, and sizes of the parts that oppose another gradient.

All are computed from factors. A linear layer's gradient at one place is one outer product, whose
sizes are products too. With `S` the signs of the other gradient `R` and `Z = (R == 0)`,

    mass       sum_ij |g_i a_j|        = |g|_1 |a|_1
    along      sum_ij g_i a_j S_ij     = g^T S a
    unsigned   sum_ij |g_i a_j| Z_ij   = |g|^T Z |a|
    opposing   (mass - unsigned - along) / 2

A sum of outer products has no such form, so the gradient is formed, one sample at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from geffect_fast.capture.factors import (
    Factor,
    Lookup,
    Outer,
    RowSum,
    n_samples,
    summed_gradient,
)
from geffect_fast.capture.products import in_own_precision, inner, sum_of, table_cells
from geffect_fast.capture.segments import Offsets, segment_sum
from geffect_fast.precision import widened


@in_own_precision
def opposed_masses(factors: list[Factor], signs: Tensor, zeros: bool) -> Tensor:
    """Sizes of the samples' gradients of one parameter, and of the part that opposes another.

    Args:
        factors: all factors of the parameter.
        signs: signs of the other gradient, -1, 0 and 1, of the parameter's shape.
        zeros: whether any of the signs is 0.

    Returns:
        `(2, n_samples)` fp64: sums of absolute elements, and sums of only those absolute elements
        whose sign is opposite to the other gradient's. The second is at most the first.
    """
    if all(isinstance(f, RowSum) for f in factors):
        sums = sum_of([f.sums for f in factors if isinstance(f, RowSum)])
        return _compared(sums, signs)
    outers = [f for f in factors if isinstance(f, Outer)]
    lookups = [f for f in factors if isinstance(f, Lookup)]
    of_rows: list[Outer | Lookup] = [*outers, *lookups]
    single = all(max(f.cu.lengths, default=0) <= 1 for f in of_rows)
    if not single or len(outers) > 1 or len(lookups) > 1 or len(of_rows) < len(factors):
        formed = (summed_gradient(factors, i, signs.shape) for i in range(n_samples(factors[0])))
        return torch.cat([_compared(gradient[None], signs) for gradient in formed], dim=1)
    mass = sum_of([_sizes(f) for f in of_rows])
    opposing = mass - sum_of([inner(f, signs[None])[0].double() for f in of_rows])
    unsigned = (signs == 0).to(signs.dtype) if zeros else None
    if unsigned is not None:
        sizes = (inner(_with_sizes(f), unsigned[None])[0].double() for f in of_rows)
        opposing -= sum_of([*sizes])
    if outers and lookups:
        # Both factors meet in the row that a sample looked up, where their sizes do not add up.
        ids, more = _beyond_outer(outers[0], lookups[0])
        mass += more.sum(1)
        opposing += more.sum(1)
        if unsigned is not None:
            opposing -= (more * unsigned[ids]).sum(1)
    return torch.stack([mass, (opposing / 2).clamp(min=0).minimum(mass)])


def _compared(gradients: Tensor, signs: Tensor) -> Tensor:
    """`opposed_masses` of gradients that are formed, `(n, ...)`."""
    gradients = gradients.flatten(1)
    sizes, against = gradients.abs().double(), gradients.sign() * signs.flatten() < 0
    return torch.stack([sizes.sum(1), (sizes * against).sum(1)])


def _sizes(factor: Outer | Lookup) -> Tensor:
    """Sums of absolute elements `(n_samples,)` fp64 where a sample has one row at most."""
    sizes = factor.g.abs().sum(1, dtype=torch.float64)
    if isinstance(factor, Outer):
        sizes = sizes * factor.a.abs().sum(1, dtype=torch.float64)
    return segment_sum(sizes, factor.cu)


def _with_sizes(factor: Outer | Lookup) -> Outer | Lookup:
    """The factor whose gradients are the sizes of this one's."""
    if isinstance(factor, Outer):
        return replace(factor, a=factor.a.abs(), g=factor.g.abs())
    return replace(factor, g=factor.g.abs())


def _beyond_outer(outer: Outer, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Excess of a table's sizes over both factors' sizes, in the row that each sample looked up.

    Returns:
        The numbers of the rows, `(n_samples,)`, and the excess, `(n_samples, d)` fp64, 0 or below.
    """
    entries, width = (outer.a, outer.g) if outer.transposed else (outer.g, outer.a)
    ids = lookup.ids.new_zeros(len(lookup.cu))
    looked_up = lookup.g.new_zeros(len(ids), lookup.g.shape[1], dtype=torch.float64)
    product = torch.zeros_like(looked_up)
    at = _not_empty(lookup.cu, ids.device)
    ids[at], looked_up[at] = lookup.ids, lookup.g.double()
    at = _not_empty(outer.cu, ids.device)
    product[at] = entries.gather(1, ids[at, None]).double() * width.double()
    return ids, (product + looked_up).abs() - product.abs() - looked_up.abs()


def _not_empty(cu: Offsets, device: torch.device) -> Tensor:
    """The numbers of the samples that have a row."""
    return torch.tensor([i for i, length in enumerate(cu.lengths) if length], device=device)


@in_own_precision
def squared_gradients(factors: list[Factor], shape: torch.Size) -> Tensor:
    """`sum_i grad_i^2` of one parameter, entry by entry, of its `shape`, fp32 or fp64.

    The square of a sum over a sample's tokens has no closed form, so each sample's gradient of this
    one parameter is formed, squared and let go of. Of a table only the rows that the sample looked
    up are formed.

    Args:
        factors: all factors of the parameter.
        shape: the parameter's shape.
    """
    first = factors[0]
    if len(factors) == 1 and isinstance(first, RowSum):
        return first.sums.square().sum(0).view(shape)
    if all(isinstance(factor, Lookup) for factor in factors):
        return _of_table([f for f in factors if isinstance(f, Lookup)])
    total = summed_gradient(factors, 0, shape).square()
    for i in range(1, n_samples(first)):
        gradient = summed_gradient(factors, i, shape)
        total.addcmul_(gradient, gradient)
    return total


def _of_table(lookups: list[Lookup]) -> Tensor:
    """`squared_gradients` of a table, `(n_entries, d)`.

    The gradients that a sample looked up under one id are added up before they are squared.
    """
    n_entries = lookups[0].n_entries
    g = widened(torch.cat([f.g for f in lookups]))
    cells, cell = torch.unique(table_cells(lookups), return_inverse=True)
    sums = g.new_zeros(len(cells), g.shape[1]).index_add_(0, cell, g)
    return g.new_zeros(n_entries, g.shape[1]).index_add_(0, cells % n_entries, sums.square())
