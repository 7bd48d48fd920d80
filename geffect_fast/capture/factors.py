"""The forms in which a per-sample gradient is held without being formed.

The gradient of sample `i` with respect to one parameter, from one call of one module, is a sum over
the rows `t` of sample `i`:

    Outer    sum_t g_t a_t^T              a linear map: inputs `a`, output gradients `g`
    GramOuter                             the same for norms alone, with inner products for `a`
    Lookup   sum_t e(id_t) g_t^T          a table: row `id_t` receives `g_t`
    RowSum   v_i                          a vector parameter: the sum over the rows
    Explicit vjp of the module            anything else, with its jvp for inner products

Several factors of one parameter (a tied embedding, a module called twice) add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geffect_fast.capture.segments import Offsets
from geffect_fast.precision import widened


@dataclass(frozen=True)
class Outer:
    """`grad_i = sum_t g_t a_t^T`, or its transpose where the weight is stored as `(d_in, d_out)`.

    Attributes:
        a: `(rows, d_in)` inputs.
        g: `(rows, d_out)` output gradients.
        cu: offsets of the samples among the rows.
        transposed: whether the parameter has shape `(d_in, d_out)`.
    """

    a: Tensor
    g: Tensor
    cu: Offsets
    transposed: bool = False

    def gradient(self, i: int) -> Tensor:
        rows = self.cu[i]
        grad = widened(self.g[rows]).T @ widened(self.a[rows])
        return grad.T if self.transposed else grad


@dataclass(frozen=True)
class GramOuter:
    """`Outer` for norms alone, which need of the inputs no more than their inner products.

    Attributes:
        grams: `a_s . a_t` of every pair of tokens of a sample, see `ops.reference.token_grams`.
        g: `(rows, d_out)` output gradients.
        cu: offsets of the samples among the rows.
    """

    grams: Tensor
    g: Tensor
    cu: Offsets


@dataclass(frozen=True)
class Lookup:
    """`grad_i[id_t] += g_t`, a table of `n_entries` rows.

    Attributes:
        ids: `(rows,)` int64.
        g: `(rows, d)` gradients of the looked-up rows (0 where the row is padding).
        cu: offsets of the samples among the rows.
        n_entries: rows of the table.
    """

    ids: Tensor
    g: Tensor
    cu: Offsets
    n_entries: int

    def gradient(self, i: int) -> Tensor:
        rows = self.cu[i]
        g = widened(self.g[rows])
        return g.new_zeros(self.n_entries, g.shape[1]).index_add_(0, self.ids[rows], g)


@dataclass(frozen=True)
class RowSum:
    """`grad_i = sums_i`, for biases and the weights of norms.

    Attributes:
        sums: `(n_samples, numel)` fp64.
    """

    sums: Tensor

    def gradient(self, i: int) -> Tensor:
        return self.sums[i]


@dataclass(frozen=True)
class Tangent:
    """One output of a module, while one of the module's parameters moves along a direction.

    Attributes:
        tangent: `(rows, d)`, the output's derivative along the direction.
        g: `(rows, d)`, the output's gradient.
        cu: offsets of the samples.
    """

    tangent: Tensor
    g: Tensor
    cu: Offsets


@dataclass(frozen=True)
class Explicit:
    """`grad_i = vjp(i)`, one sample at a time, of the parameter's own shape.

    Attributes:
        vjp: gives the gradient of one sample; for None the sum of all samples' gradients, at once.
        jvp: gives the tangents of the module's outputs along a direction of the parameter's shape;
            None where the module has no forward-mode derivative. `<grad_i, V>` is the sum of
            `tangent * g` over the rows of sample `i`, so one jvp serves all samples.
        n_samples: number of samples.
    """

    vjp: Callable[[int | None], Tensor]
    jvp: Callable[[Tensor], list[Tangent] | None]
    n_samples: int

    def gradient(self, i: int) -> Tensor:
        return self.vjp(i)


Factor = Outer | GramOuter | Lookup | RowSum | Explicit


def n_samples(factor: Factor) -> int:
    """Number of samples whose gradients a factor holds."""
    if isinstance(factor, RowSum):
        return len(factor.sums)
    return factor.n_samples if isinstance(factor, Explicit) else len(factor.cu)


def summed_gradient(factors: list[Factor], i: int, shape: torch.Size) -> Tensor:
    """The gradient of sample `i`, formed, of `shape`: the sum over all factors of a parameter."""
    return torch.stack([gradient(f, i).reshape(shape) for f in factors]).sum(0)


def gradient(factor: Factor, i: int) -> Tensor:
    """The gradient of sample `i`, formed from one factor."""
    assert not isinstance(factor, GramOuter), "its inputs are gone"
    return factor.gradient(i)
