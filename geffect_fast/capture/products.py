"""Inner products and norms of per-sample gradients, from their factors.

Formulas: a linear map's gradients satisfy `<g a^T, V> = g^T V a` and
`<g a^T, h b^T> = (g . h)(a . b)` (ghost norm; Goodfellow, arXiv 1510.01799; Li et al.,
arXiv 2110.05679). A tied embedding's cross terms follow from the second with `e(id)` for one side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from geffect_fast import ops
from geffect_fast.capture.factors import (
    Explicit,
    Factor,
    GramOuter,
    Lookup,
    Outer,
    RowSum,
    gradient,
    n_samples,
    summed_gradient,
)
from geffect_fast.capture.segments import Offsets, segment_sum, sum_between
from geffect_fast.ops import backend
from geffect_fast.ops.ieee_fp32 import ieee_fp32, products_are_ieee
from geffect_fast.precision import widened
from geffect_fast.transfer import on_device

P = ParamSpec("P")
R = TypeVar("R")

JVP_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
"""Allowed difference between a jvp and a vjp of one module, relative to the sum of sizes. The first
figure is not smaller because some fp64 models compute in fp32 inside."""


def in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, computing in the precision of its arguments, not in that of the surroundings.

    Autocast and the switches that let products of fp32 numbers drop bits are off inside.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        exact = products_are_ieee()
        if exact and not kinds:  # entering a context takes as long as many products do
            return function(*args, **kwargs)
        with ExitStack() as stack:
            if not exact:
                stack.enter_context(ieee_fp32())
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def in_working_precision(direction: Tensor, parameter: Tensor) -> Tensor:
    """`direction` in the precision in which its products with a parameter's gradients are taken.

    bf16 parameters on CUDA get bf16 directions: their products then run on tensor cores, in place
    of fp32 units that are an order of magnitude slower, and the sums stay in fp32. The inputs and
    output gradients are bf16 already, so this is one more rounding of the same size. Elsewhere
    nothing would be gained, and directions stay in fp32.
    """
    if direction.device.type == "cuda" and parameter.dtype == torch.bfloat16:
        return direction.to(torch.bfloat16)
    return direction


def _promoted(x: Tensor, y: Tensor) -> torch.dtype:
    # Asking torch goes through its dispatcher, for nearly every layer of every batch.
    return x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)


@in_own_precision
def project(a: Tensor, direction: Tensor, transposed: bool) -> Tensor:
    """`z[m, t] = V_m a_t`, the half of an inner product that is the same for all objectives.

    Args:
        a: `(rows, d_in)`.
        direction: `(M, d_out, d_in)`, or `(M, d_in, d_out)` where `transposed`.

    Returns:
        `(M, rows, d_out)`.
    """
    dtype = _promoted(a, direction)
    a, direction = a.to(dtype), direction.to(dtype)
    if transposed:
        return a @ direction
    m, d_out, d_in = direction.shape
    return (a @ direction.reshape(m * d_out, d_in).T).view(-1, m, d_out).permute(1, 0, 2)


@in_own_precision
def inner(factor: Factor, direction: Tensor, z: Tensor | None = None) -> Tensor:
    """`score[m, i] = <grad_i, V_m>`.

    Args:
        factor: a factor of one parameter.
        direction: `(M, *parameter.shape)`.
        z: `project(a, direction)` or the looked-up rows `V_m[ids]`, `(M, rows, d)`, where it is
            kept for several objectives.

    Returns:
        `(M, n_samples)`, fp64, or fp32 where that is what the kernels add up in.
    """
    if isinstance(factor, Outer):
        dtype = _promoted(factor.g, direction)
        g = factor.g.to(dtype)
        if z is not None:
            return ops.segment_dot(z.to(dtype), g, factor.cu.on(g.device))
        v = (direction.transpose(1, 2) if factor.transposed else direction).to(dtype)
        return ops.segment_bilinear(factor.a.to(dtype), g, v, factor.cu.on(g.device))
    if isinstance(factor, Lookup):
        looked_up = direction[:, factor.ids] if z is None else z
        dtype = _promoted(factor.g, looked_up)
        g = factor.g.to(dtype)
        return ops.segment_dot(looked_up.to(dtype), g, factor.cu.on(g.device))
    flat = direction.flatten(1).double()
    if isinstance(factor, RowSum):
        return flat @ factor.sums.T
    assert isinstance(factor, Explicit)
    if factor.n_samples > len(direction) + 1:
        moved = _inner_by_jvp(factor, direction, flat)
        if moved is not None:
            return moved
    score = [flat @ factor.vjp(i).flatten().double() for i in range(factor.n_samples)]
    return torch.stack(score, dim=1)


class InnerProducts:
    """A recorder's sink that computes inner products of the factors with directions.

    Args:
        direction_of: gives a parameter's directions, `(M, *shape)`, by its name; None: the
            parameter is left out.

    Attributes:
        found: parameters' names with their products `(M, n_samples)`, in the order of arrival.
    """

    def __init__(self, direction_of: Callable[[str], Tensor | None]) -> None:
        self.found: list[tuple[str, Tensor]] = []
        self._direction_of = direction_of

    def __call__(self, name: str, factors: list[Factor], kept: list[Tensor | None]) -> None:
        direction = self._direction_of(name)
        if direction is not None:
            for factor, z in zip(factors, kept, strict=True):
                self.found.append((name, inner(factor, direction, z)))


def _inner_by_jvp(factor: Explicit, direction: Tensor, flat: Tensor) -> Tensor | None:
    """`inner` by one jvp for each direction, with no vjp of single samples; None if not exact.

    The sum of the products over samples must be the product with the whole gradient, which one vjp
    gives. This shows modules without forward mode and modules that silently drop a tangent.
    """
    whole = factor.vjp(None)
    if direction.dtype != whole.dtype:
        return None  # for a bf16 module an fp32 direction would have to be rounded, and lose digits
    scores, sizes = [], []
    for v in direction:
        tangents = factor.jvp(v)
        if not tangents:  # there is no forward mode, or none of the module's outputs was used
            return None
        # The module's children have parameters that may ask for gradients of their own.
        moved = [(t.tangent.detach(), t.g, t.cu.on(t.g.device)) for t in tangents]
        dots = [ops.segment_dot(x[None], g, cu)[0] for x, g, cu in moved]
        scores.append(torch.stack(dots).double().sum(0))
        sizes.append(torch.stack([(x * g).abs().sum() for x, g, _ in moved]).double().sum())
    score = torch.stack(scores)
    off = (score.sum(1) - flat @ whole.flatten().double()).abs()
    rounding = JVP_TOLERANCE.get(direction.dtype, 1e-2) * torch.stack(sizes)
    return score if bool((off <= rounding).all()) else None


@in_own_precision
def add_weighted_sum(factor: Outer | Lookup | RowSum, weights: Tensor, total: Tensor) -> None:
    """`total += sum_i weights[i] grad_i`, by one product with weighted output gradients.

    Args:
        factor: a factor of one parameter.
        weights: `(n_samples,)` fp64.
        total: a tensor of the parameter's shape. If it has the working precision, fp32 or better,
            nothing of its size is made beside it; else the sum is rounded once.
    """
    if isinstance(factor, RowSum):
        total += (weights.to(factor.sums) @ factor.sums).view_as(total)
        return
    g = widened(factor.g)
    lengths = factor.cu.on(g.device).long().diff()
    g = g * torch.repeat_interleave(weights.to(g), lengths, output_size=len(g))[:, None]
    in_place = total.dtype == g.dtype and total.is_contiguous()
    added = total if in_place else g.new_zeros(total.shape)
    if isinstance(factor, Lookup):
        table = added.view(factor.n_entries, g.shape[1])
        table.index_put_((factor.ids,), g, accumulate=True)
    else:
        a = widened(factor.a)
        left, right = (a, g) if factor.transposed else (g, a)
        added.view(left.shape[1], right.shape[1]).addmm_(left.T, right)
    if not in_place:
        total += added.to(total.dtype)


@in_own_precision
def squared_norms(factors: list[Factor], shape: torch.Size) -> Tensor:
    """`||grad_i||_F^2` of one parameter, cross terms between its factors included, `(n,)` fp64."""
    if all(isinstance(f, RowSum) for f in factors):
        return sum_of([f.sums for f in factors if isinstance(f, RowSum)]).square().sum(1)
    first = factors[0]
    if isinstance(first, GramOuter) or (isinstance(first, Outer) and len(factors) == 1):
        return squared_norms_of_one_input([first])  # a `GramOuter` is its parameter's only factor
    outers = [f for f in factors if isinstance(f, Outer)]
    lookups = [f for f in factors if isinstance(f, Lookup)]
    if len(outers) + len(lookups) < len(factors) or len({f.transposed for f in outers}) > 1:
        return torch.stack(
            [
                summed_gradient(factors, i, shape).double().square().sum()
                for i in range(n_samples(factors[0]))
            ]
        )
    terms = []
    if outers:
        joined = _joined(outers)
        terms.append(ops.ghost_norm(joined.a, joined.g, joined.cu.on(joined.g.device)).double())
    if lookups:
        terms.append(_table_norms(lookups))
    for outer in outers:
        for lookup in lookups:
            own = zip(outer.cu, lookup.cu, strict=True)
            cross = [_lookup_gram(outer, r, lookup, s).sum() for r, s in own]
            terms.append(2.0 * torch.stack(cross))
    return sum_of(terms)


def sum_of(terms: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape, without a copy of a single one."""
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


@in_own_precision
def squared_norms_of_one_input(outers: Sequence[Outer | GramOuter]) -> Tensor:
    """`||grad_i||_F^2` over the weights of all layers that share one input, `(n,)` fp64."""
    first, gs = outers[0], [f.g for f in outers]
    cu = first.cu.on(first.g.device)
    if isinstance(first, GramOuter):
        found = backend.call("ghost_norm_of_grams", first.g.device, first.grams, gs, cu)
    else:
        found = ops.ghost_norm(first.a, gs, cu)
    return found.double()


def table_cells(lookups: Sequence[Lookup]) -> Tensor:
    """A key for every looked-up row, int64: its sample's number times the entries, plus its id."""
    samples = torch.cat([torch.repeat_interleave(torch.tensor(f.cu.lengths)) for f in lookups])
    first = on_device(samples * lookups[0].n_entries, lookups[0].g.device)
    return first + torch.cat([f.ids for f in lookups])


def _table_norms(lookups: list[Lookup]) -> Tensor:
    """`||grad_i||_F^2` of a table, added up over the rows that sample `i` looked up."""
    n, n_entries, device = n_samples(lookups[0]), lookups[0].n_entries, lookups[0].g.device
    keys, order = table_cells(lookups).sort(stable=True)
    # Rows that one sample looked up under one id are neighbours now, and form a cell. There are at
    # most as many cells as rows.
    begins = torch.cat([keys.new_zeros(min(1, len(keys))), (keys.diff() != 0).long()])
    cell, number = begins.cumsum(0), torch.arange(len(keys) + 1, device=device)
    g = torch.cat([f.g for f in lookups])[order]
    squares = sum_between(g, torch.searchsorted(cell, number)).square().sum(1)
    first = torch.searchsorted(keys, torch.arange(n + 1, device=device) * n_entries)
    # The cell that each sample begins with. A sample that begins behind the last row has none.
    cells = torch.cat([cell, cell.new_full((1,), len(keys))])
    return sum_between(squares, cells[first])


@in_own_precision
def pairwise(a: Sequence[Factor], b: Sequence[Factor], shape: torch.Size) -> Tensor:
    """`<grad_i, grad_j>` of one parameter for every sample `i` of `a` and `j` of `b`, fp64."""
    return sum_of([_pairwise(x, y, shape) for x in a for y in b])


def _pairwise(x: Factor, y: Factor, shape: torch.Size) -> Tensor:
    if isinstance(x, Outer) and isinstance(y, Outer) and x.transposed == y.transposed:
        device = x.g.device
        return ops.ghost_dot(x.a, x.g, x.cu.on(device), y.a, y.g, y.cu.on(device)).double()
    if isinstance(x, RowSum) and isinstance(y, RowSum):
        return x.sums @ y.sums.T
    if isinstance(y, Lookup) and isinstance(x, Outer | Lookup):
        return _lookup_pairs(x, y)
    if isinstance(x, Lookup) and isinstance(y, Outer):
        return _pairwise(y, x, shape).T
    # Exact for any factors: the gradients of one side are formed, a sample at a time, and serve as
    # directions for the other.
    rows = [inner(y, gradient(x, i).reshape(1, *shape))[0] for i in range(n_samples(x))]
    return torch.stack(rows)


def _lookup_pairs(x: Outer | Lookup, y: Lookup) -> Tensor:
    """`<grad_i, grad_j>` for every sample `i` of `x` and `j` of the table `y`, `(n, n2)` fp64."""
    out = torch.zeros(n_samples(x), n_samples(y), dtype=torch.float64, device=y.g.device)
    starts = y.cu.host
    for i, rows in enumerate(x.cu):
        first = i if x is y else 0  # with itself: half of a symmetric result
        columns = slice(starts[first], starts[-1])
        sums = _lookup_gram(x, rows, y, columns).sum(0)
        out[i, first:] = segment_sum(sums, Offsets.of(y.cu.lengths[first:]))
    return out.triu() + out.triu(1).T if x is y else out


def _lookup_gram(x: Outer | Lookup, rows: slice, y: Lookup, columns: slice) -> Tensor:
    """`<row t of x, row s of y>` for tokens `t` in `rows` and `s` in `columns`, fp64."""
    ids, g = y.ids[columns], widened(y.g[columns])
    if isinstance(x, Lookup):
        same = x.ids[rows, None] == ids[None, :]
        return ((widened(x.g[rows]) @ g.T) * same).double()
    # The table is (n_entries, d), so ids pick from the side of the outer product that runs over
    # entries.
    entries, width = (x.a, x.g) if x.transposed else (x.g, x.a)
    return ((widened(width[rows]) @ g.T) * entries[rows][:, ids]).double()


def _joined(outers: list[Outer]) -> Outer:
    """One factor for several calls of one weight: each sample's rows of all calls side by side."""
    if len(outers) == 1:
        return outers[0]
    pieces = list(zip(*(f.cu for f in outers), strict=True))
    cu = Offsets(tuple(map(sum, zip(*(f.cu.host for f in outers), strict=True))))
    a = torch.cat([f.a[rows] for piece in pieces for f, rows in zip(outers, piece, strict=True)])
    g = torch.cat([f.g[rows] for piece in pieces for f, rows in zip(outers, piece, strict=True)])
    return Outer(a, g, cu, outers[0].transposed)
