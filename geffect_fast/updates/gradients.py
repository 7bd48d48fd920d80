"""Gradients by parameter name, and their inner products."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from geffect_fast import ops
from geffect_fast.capture.compat import own_part
from geffect_fast.capture.parts import sum_over_parts

Gradients = dict[str, Tensor]
"""A gradient by parameter name; a parameter that is missing takes no part, as one without `.grad`.

For a model that FSDP2 shares out the tensors are `DTensor`s, of which each rank holds its part.
Sums and products entry by entry are those of the parts, and `gram` adds up over the parts.
"""

Move = tuple[float, Gradients]
"""A move of weights: a gradient, and the factor with which it is added."""


def gram(gradients: Sequence[Gradients]) -> Tensor:
    """Inner products of whole gradients.

        out[j, k] = sum_p <gradients[j][p], gradients[k][p]>

    Args:
        gradients: K gradients.

    Returns:
        `(K, K)` fp64 on the CPU.
    """
    return grams(gradients)[1].sum(0)


def grams(gradients: Sequence[Gradients]) -> tuple[list[str], Tensor]:
    """Inner products tensor by tensor: the names, and `(P, K, K)` fp64 on the CPU."""
    names = union(gradients)
    out = torch.zeros(len(names), len(gradients), len(gradients), dtype=torch.float64)
    firsts = [next(g[name] for g in gradients if name in g) for name in names]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for p, first in enumerate(firsts):
        by_dtype.setdefault(first.dtype, []).append(p)
    for of_one in by_dtype.values():
        lists = [[own_part(of(each, names[p], gradients)) for p in of_one] for each in gradients]
        found = ops.multi_tensor_gram(lists).double()
        out[of_one] = sum_over_parts(found, firsts[of_one[0]]).cpu()
    return names, out


def union(gradients: Iterable[Gradients]) -> list[str]:
    """The names in any of the gradients, in order."""
    return list(dict.fromkeys(name for each in gradients for name in each))


def of(gradient: Gradients, name: str, among: Sequence[Gradients]) -> Tensor:
    """A parameter's gradient; if `gradient` has none, zeros of the shape of one in `among`."""
    found = gradient.get(name)
    if found is not None:
        return found
    return torch.zeros_like(next(each[name] for each in among if name in each))


def add(gradient: Gradients, other: Gradients, factor: float | Tensor = 1.0) -> Gradients:
    """Add `factor * other` to `gradient`, in place where both have a name; return `gradient`."""
    for name, value in other.items():
        if name in gradient:
            gradient[name].add_(value, alpha=float(factor))
        else:
            gradient[name] = value * float(factor)
    return gradient
