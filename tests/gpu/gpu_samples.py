"""Samples as large as language models make them, and the ops' formulas in fp64 on the device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from on_gpu import DEVICE, IS_GPU
from op_samples import Sample
from torch import Tensor

from geffect_fast import ops


class DeviceMaker:
    """A maker of tensors of one dtype on the device; a dry run on the CPU gets 1/16 of a size."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def size(self, full: int) -> int:
        """Return an odd size where `full` is odd."""
        return full if IS_GPU or full < 64 else full // 16 // 2 * 2 + full % 2

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn([self.size(n) for n in shape], generator=self.generator, device=DEVICE)
        return values.to(self.dtype)

    def lengths(self, total: int, shortest: int = 20, longest: int = 500) -> Tensor:
        """Return offsets of ragged samples, an empty one among them, over `total` tokens."""
        total = self.size(total)
        host = torch.Generator().manual_seed(total)
        bounds = [0, min(7, total), min(7, total)]
        while bounds[-1] < total:
            length = int(torch.randint(shortest, longest + 1, (), generator=host))
            bounds.append(min(bounds[-1] + length, total))
        return torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def rows(self, total: int, d_in: int, d_out: int, *lengths: int) -> tuple[Tensor, ...]:
        return self(total, d_in), self(total, d_out), self.lengths(total, *lengths)


Make = DeviceMaker


def _bilinear(total: int, d_in: int, d_out: int, n_directions: int) -> Callable[[Make], Any]:
    def build(make: Make) -> tuple[Any, ...]:
        a, g, cu = make.rows(total, d_in, d_out)
        return a, g, make(n_directions, d_out, d_in), cu

    return build


def _bilinear_conv1d(make: Make) -> tuple[Any, ...]:
    """GPT-2's Conv1D keeps its weight as (d_in, d_out)."""
    a, g, cu = make.rows(4096, 1600, 4800)
    return a, g, make(2, 1600, 4800).mT, cu


def _bilinear_views(make: Make) -> tuple[Any, ...]:
    """Rows that do not begin on 16 bytes, every other column, and one row for all tokens."""
    a, g, cu = make.rows(2048, 1025, 2048)
    return a[:, 1:], g[:, ::2], make(1, 1024).expand(2, make.size(1024), make.size(1024)), cu


def _dot(total: int, d: int, n_z: int, n_g: int) -> Callable[[Make], Any]:
    return lambda make: (make(n_z, total, d), make(n_g, total, d), make.lengths(total))


def _dot_views(make: Make) -> tuple[Any, ...]:
    """Products as (total_tokens, M, d), gradients as (d, total_tokens)."""
    z, g = make(4096, 2, 2048).permute(1, 0, 2), make(2048, 4096).T
    return z, g[None], make.lengths(4096)


def _norm(total: int, d_in: int, d_out: int, *lengths: int) -> Callable[[Make], Any]:
    return lambda make: make.rows(total, d_in, d_out, *lengths)


def _norm_views(make: Make) -> tuple[Any, ...]:
    a, g, cu = make.rows(2048, 1025, 2048)
    return a[:, 1:], g[:, ::2], cu


def _pairs(total: int, total2: int, d_in: int, d_out: int, *lengths: int) -> Callable[[Make], Any]:
    return lambda make: (
        *make.rows(total, d_in, d_out, *lengths),
        *make.rows(total2, d_in, d_out, *lengths),
    )


def _gram(n_lists: int, *shapes: tuple[int, ...]) -> Callable[[Make], Any]:
    return lambda make: ([[make(*shape) for shape in shapes] for _ in range(n_lists)],)


def _gram_views(make: Make) -> tuple[Any, ...]:
    """Lists transposed in one place, off 16 bytes in another, and expanded."""
    weight = make(2048, 1024)
    lists = [
        [make(1024, 2048).T, make(4097)[1:], make(4096)],
        [weight, make(4096), make(1).expand(make.size(4096))],
        [weight + 1, make(8192)[::2], make(4096)],
    ]
    return lists, [1, 0, 1]


LARGE: dict[str, tuple[str, Callable[[Make], Any]]] = {
    "attention, 1 direction": ("segment_bilinear", _bilinear(4096, 2048, 2048, 1)),
    "up, 2 directions": ("segment_bilinear", _bilinear(4096, 2048, 8192, 2)),
    "7B up": ("segment_bilinear", _bilinear(4096, 4096, 11008, 1)),
    "7B down, 3 directions": ("segment_bilinear", _bilinear(2048, 11008, 4096, 3)),
    "lm_head": ("segment_bilinear", _bilinear(2048, 2048, 32000, 1)),
    "lm_head, 2 directions": ("segment_bilinear", _bilinear(1024, 2048, 32000, 2)),
    "odd, 2 directions": ("segment_bilinear", _bilinear(2047, 1023, 1021, 2)),
    "conv1d": ("segment_bilinear", _bilinear_conv1d),
    "bilinear of views": ("segment_bilinear", _bilinear_views),
    "dot": ("segment_dot", _dot(4096, 4096, 1, 1)),
    "dot 2 x 7": ("segment_dot", _dot(4096, 4096, 2, 7)),
    "dot 9 x 3": ("segment_dot", _dot(2048, 2048, 9, 3)),
    "dot, lm_head": ("segment_dot", _dot(1024, 32000, 2, 1)),
    "dot, odd": ("segment_dot", _dot(2047, 4097, 2, 2)),
    "dot of views": ("segment_dot", _dot_views),
    "norm": ("ghost_norm", _norm(4096, 2048, 2048)),
    "norm, 7B up": ("ghost_norm", _norm(4096, 4096, 11008)),
    "norm, lm_head": ("ghost_norm", _norm(1024, 2048, 32000)),
    "norm, short samples": ("ghost_norm", _norm(4096, 4096, 4096, 1, 40)),
    "norm, long samples": ("ghost_norm", _norm(6000, 1024, 1024, 1500, 3000)),
    "norm, odd": ("ghost_norm", _norm(2047, 1023, 1021)),
    "norm of views": ("ghost_norm", _norm_views),
    "pairs": ("ghost_dot", _pairs(2048, 1024, 2048, 2048)),
    "pairs, short samples": ("ghost_dot", _pairs(2048, 1024, 1024, 4096, 1, 40)),
    "pairs, long samples": ("ghost_dot", _pairs(3000, 2000, 1024, 1024, 900, 1100)),
    "pairs, odd": ("ghost_dot", _pairs(1023, 1025, 1023, 1021)),
    "gram of 2": ("multi_tensor_gram", _gram(2, (4096, 4096), (11008, 4096), (4096,))),
    "gram of 7": ("multi_tensor_gram", _gram(7, (2048, 2048), (8192, 2048), (2048,))),
    "gram of 9": ("multi_tensor_gram", _gram(9, (2048, 2048), (2047, 1023), (2048,))),
    "gram of 17": ("multi_tensor_gram", _gram(17, (1024, 1024), (999,))),
    "gram of views": ("multi_tensor_gram", _gram_views),
}


def large_sample(name: str, dtype: torch.dtype) -> Sample:
    op, build = LARGE[name]
    return Sample(op, name, build(DeviceMaker(dtype)))


# ---- the formulas, whole sets of samples at a time ----


def expected_and_scale(sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the result in fp64, and the scale that rounding errors are compared with.

    The scale is the result's size plus the root of the sum of its squared terms: independent terms
    add up to that size, and so do partial sums of a result that is small by chance.
    """
    expected = _evaluate(sample, lambda x: x)
    return expected, expected.abs() + _evaluate(sample, torch.square).sqrt()


def _evaluate(sample: Sample, of: Callable[[Tensor], Tensor]) -> Tensor:
    def wide(tensor: Tensor) -> Tensor:
        return of(tensor.double())

    if sample.op == "multi_tensor_gram":
        return _gram_formula(sample, wide)
    if sample.op == "segment_dot":
        z, g, cu = sample.args
        g_axes = g[:, None] if z.dim() == g.dim() == 3 else g
        return _by_segment((wide(z) * wide(g_axes)).sum(-1), cu)
    if sample.op == "segment_bilinear":
        a, g, v, cu = sample.args
        terms = wide(a).new_zeros(*v.shape[:-2], len(a))
        for m in range(len(v)) if v.dim() == 3 else [...]:
            terms[m] = ((wide(a) @ wide(v[m]).T) * wide(g)).sum(-1)
        return terms if sample.per_token else _by_segment(terms, cu)
    if sample.op == "ghost_norm":
        a, g, cu = sample.args
        if isinstance(g, list):
            return sum(_evaluate(sample._replace(args=(a, one, cu)), of) for one in g)
        norms = [(wide(g[i:j]).T @ wide(a[i:j])).square().sum() for i, j in pairwise(cu.tolist())]
        return torch.stack(norms) if norms else wide(a).new_zeros(0)
    a, g, cu, a2, g2, cu2 = sample.args
    pairs = (wide(a) @ wide(a2).T) * (wide(g) @ wide(g2).T)
    return _by_segment(_by_segment(pairs, cu2).T, cu).T


def _by_segment(terms: Tensor, cu: Tensor) -> Tensor:
    """Sum the last axis over segments."""
    if len(cu) == 1:
        return terms.new_zeros(*terms.shape[:-1], 0)
    parts = terms.split(torch.diff(cu).tolist(), dim=-1)
    return torch.stack([part.sum(-1) for part in parts], dim=-1)


def _gram_formula(sample: Sample, wide: Callable[[Tensor], Tensor]) -> Tensor:
    lists = sample.args[0]
    groups = [int(c) for c in sample.args[1]] if len(sample.args) > 1 else range(len(lists[0]))
    n_groups = sample.n_groups or max(groups, default=-1) + 1
    out = torch.zeros(n_groups, len(lists), len(lists), dtype=torch.float64, device=DEVICE)
    for group, tensors in zip(groups, zip(*lists, strict=True), strict=True):
        rows = torch.stack([wide(tensor).flatten() for tensor in tensors])
        out[group] += rows @ rows.T
    return out


# ---- one call of each op whose tensors can be replaced by others of the same shapes ----

N_LISTS = 3


def tensors_of(op: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return the tensors of a call; another seed gives other values, offsets among them."""
    make = DeviceMaker(dtype, seed)

    def rows(total: int) -> list[Tensor]:
        a, g = make(total, 520), make(total, 776)
        inner = torch.randint(0, len(a) + 1, (9,), generator=make.generator, device=DEVICE)
        bounds = [inner.new_zeros(1), inner.sort().values, inner.new_full((1,), len(a))]
        return [a, g, torch.cat(bounds).int()]

    if op == "segment_bilinear":
        a, g, cu = rows(1500)
        return [a, g, make(2, 776, 520), cu]
    if op == "segment_dot":
        _, g, cu = rows(1500)
        return [make(2, 1500, 776), g, cu]
    if op == "ghost_norm":
        return rows(1500)
    if op == "ghost_dot":
        return [*rows(700), *rows(500)]
    if op == "multi_tensor_gram":
        return [make(*shape) for _ in range(N_LISTS) for shape in ((1000, 999), (77,))]
    hidden, weight = make(1500, 520), make(2001, 520) / 20
    labels = torch.randint(0, len(weight), (len(hidden),), generator=make.generator, device=DEVICE)
    return [hidden, weight, labels]


def call(op: str, tensors: list[Tensor]) -> Tensor:
    """Run an op on the tensors of `tensors_of`."""
    if op == "multi_tensor_gram":
        n = len(tensors) // N_LISTS
        return ops.multi_tensor_gram([tensors[n * j : n * (j + 1)] for j in range(N_LISTS)])
    return getattr(ops, op)(*tensors)
