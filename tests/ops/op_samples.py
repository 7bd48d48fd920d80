"""The table of inputs of all op tests, and each op's formula one sample at a time in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geffect_fast import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _tensors(arg: Any) -> list[Tensor]:
    if isinstance(arg, (list, tuple)):
        return [x for item in arg for x in _tensors(item)]
    return [arg] if isinstance(arg, Tensor) else []


class Sample(NamedTuple):
    """Arguments of one op, named for the test report.

    `for_cuda` is False for sizes that only the CPU kernels' blocks need. Smaller sizes cross the
    blocks of the CUDA kernels, which run thread by thread where there is no GPU.
    """

    op: str
    name: str
    args: tuple[Any, ...]
    per_token: bool = False
    n_groups: int | None = None
    for_cuda: bool = True

    @property
    def kwargs(self) -> dict[str, Any]:
        given = {"per_token": self.per_token, "n_groups": self.n_groups}
        return {name: value for name, value in given.items() if value}

    def run(self) -> Tensor:
        return getattr(ops, self.op)(*self.args, **self.kwargs)

    @property
    def numel(self) -> int:
        tensors = (x for arg in self.args for x in _tensors(arg))
        return sum(x.numel() for x in tensors)

    def expected(self) -> Tensor:
        return FORMULAS[self.op](*self.args, **self.kwargs)


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def spans(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def gradients(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The weight gradient of every sample, `(d_out, d_in)`."""
    return [
        torch.einsum("to,ti->oi", g[span].double(), a[span].double()) for span in spans(cu_seqlens)
    ]


def expected_segment_bilinear(
    a: Tensor, g: Tensor, v: Tensor, cu_seqlens: Tensor, *, per_token: bool = False
) -> Tensor:
    directions = v.double() if v.dim() == 3 else v.double()[None]
    columns = torch.arange(len(a) + 1) if per_token else cu_seqlens
    found = gradients(a, g, columns)
    out = torch.zeros(len(directions), len(found), dtype=torch.float64)
    for m, direction in enumerate(directions):
        for i, gradient in enumerate(found):
            out[m, i] = (gradient * direction).sum()
    return out if v.dim() == 3 else out[0]


def expected_segment_dot(z: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    z_3d = z.double() if z.dim() == 3 else z.double()[None]
    g_3d = g.double() if g.dim() == 3 else g.double()[None]
    out = torch.zeros(len(g_3d), len(z_3d), len(cu_seqlens) - 1, dtype=torch.float64)
    for k, g_k in enumerate(g_3d):
        for m, z_m in enumerate(z_3d):
            for i, span in enumerate(spans(cu_seqlens)):
                out[k, m, i] = (g_k[span] * z_m[span]).sum()
    kept = (slice(None) if g.dim() == 3 else 0, slice(None) if z.dim() == 3 else 0)
    return out[kept]


def expected_ghost_norm(a: Tensor, g: Tensor | list[Tensor], cu_seqlens: Tensor) -> Tensor:
    if isinstance(g, list):
        return torch.stack([expected_ghost_norm(a, one, cu_seqlens) for one in g]).sum(0)
    norms = [gradient.square().sum() for gradient in gradients(a, g, cu_seqlens)]
    return torch.tensor(norms, dtype=torch.float64)


def expected_ghost_dot(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, a2: Tensor, g2: Tensor, cu_seqlens2: Tensor
) -> Tensor:
    first, second = gradients(a, g, cu_seqlens), gradients(a2, g2, cu_seqlens2)
    out = torch.zeros(len(first), len(second), dtype=torch.float64)
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            out[i, j] = (left * right).sum()
    return out


def expected_multi_tensor_gram(
    grads: list[list[Tensor]], groups: Any = None, *, n_groups: int | None = None
) -> Tensor:
    indices = range(len(grads[0])) if groups is None else [int(group) for group in groups]
    if n_groups is None:
        n_groups = max(indices, default=-1) + 1
    out = torch.zeros(n_groups, len(grads), len(grads), dtype=torch.float64)
    for p, group in enumerate(indices):
        for j, left in enumerate(grads):
            for k, right in enumerate(grads):
                out[group, j, k] += (left[p].double() * right[p].double()).sum()
    return out


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "segment_bilinear": expected_segment_bilinear,
    "segment_dot": expected_segment_dot,
    "ghost_norm": expected_ghost_norm,
    "ghost_dot": expected_ghost_dot,
    "multi_tensor_gram": expected_multi_tensor_gram,
}


class Maker:
    """Makes tensors of one dtype; scaled so that results stay near 1 whatever the sizes."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.dtype)

    def rows(self, lengths: list[int], d_in: int, d_out: int) -> tuple[Tensor, Tensor, Tensor]:
        return self(sum(lengths), d_in), self(sum(lengths), d_out), offsets(lengths)


RAGGED = [3, 0, 17, 1, 40, 2]


@cache
def sample_inputs(dtype: torch.dtype) -> list[Sample]:
    """Every op: ragged and empty segments, strides, every axis present and absent."""
    make = Maker(dtype)
    a, g, cu = make.rows(RAGGED, 9, 13)
    v = make(3, 13, 9)
    empty = make.rows([], 9, 13)
    no_tokens = make.rows([0, 0], 9, 13)
    long = make.rows(
        [300, 0, 145], 6, 5
    )  # longer than a tile of tokens, Grams dearer than gradients
    wide = make.rows([20, 150, 5], 700, 530)  # wider than a tile of features, Grams cheaper
    long_gram = make.rows([300, 3, 130], 700, 530)  # more than a tile of tokens, Grams cheaper
    wide_long = make.rows([1100, 2], 520, 300)  # longer than the tokens multiplied at once
    deep = make.rows([9, 3], 2100, 520)  # more features than are multiplied at once
    wide_tiles = make.rows([200, 60], 520, 300)
    many = make.rows([20] * 19, 6, 5)  # more rows of a result than are computed at once
    many_pairs = make.rows([10] * 30, 100, 110)  # more tokens than are multiplied at once
    wide_v = make(2, 530, 700)
    expanded = make(1, 9).expand(len(a), 9)
    permuted = make(len(a), 2, 13).permute(1, 0, 2)
    sliced = make(2, len(a), 26)[:, :, ::2]
    column_major = make(13, len(a)).T
    lists = [[make(4, 5), make(7), make(2, 3, 2), make(6, 6)] for _ in range(5)]
    strided_lists = [
        [tensors[0].T if j == 0 else make(5, 4), make(14)[::2], make(2, 2, 3).permute(0, 2, 1)]
        for j, tensors in enumerate(lists[:3])
    ]
    big = [[make(300, 301), make(5)] for _ in range(2)]
    big_strided = [[make(301, 300).T, make(5)], [make(300, 301), make(1).expand(5)]]
    many_lists = [[make(3, 7), make(700)] for _ in range(17)]
    long_lists = [[make(9001), make(130)] for _ in range(16)]  # longer than a block reads at once
    unaligned = [[make(3005)[j % 2 :][:3003], make(40)[j:][:30]] for j in range(10)]
    small = [[make(1 + p % 3) for p in range(1100)]]  # more tensors than one launch describes
    columns = make(3, len(a), 4104)  # rows on 16-byte boundaries, wider than a warp reads at once
    tokens = make(9, 2100, 8)  # more tokens than a warp sums up
    every_second = make(3, len(a), 32)[..., ::2]
    return [
        Sample("segment_bilinear", "three directions", (a, g, v, cu)),
        Sample("segment_bilinear", "one direction, 2-D", (a, g, v[0], cu)),
        Sample("segment_bilinear", "one direction, 3-D", (a, g, v[:1], cu)),
        Sample("segment_bilinear", "per token", (a, g, v, cu), per_token=True),
        Sample("segment_bilinear", "per token, 2-D", (a, g, v[1], cu), per_token=True),
        Sample("segment_bilinear", "int64 offsets", (a, g, v, cu.long())),
        Sample("segment_bilinear", "no directions", (a, g, v[:0], cu)),
        Sample("segment_bilinear", "no samples", (empty[0], empty[1], v, empty[2])),
        Sample("segment_bilinear", "no tokens", (no_tokens[0], no_tokens[1], v, no_tokens[2])),
        Sample("segment_bilinear", "expanded inputs", (expanded, g, v, cu)),
        Sample("segment_bilinear", "strided", (a, column_major, v.mT.contiguous().mT, cu)),
        Sample("segment_bilinear", "long", (long[0], long[1], make(3, 5, 6), long[2])),
        Sample("segment_bilinear", "long, 1", (long[0], long[1], make(1, 5, 6), long[2])),
        Sample("segment_bilinear", "wide", (wide[0], wide[1], wide_v, wide[2])),
        Sample("segment_bilinear", "wide, 1", (wide[0], wide[1], wide_v[:1], wide[2])),
        Sample(
            "segment_bilinear",
            "wide, long",
            (*wide_long[:2], make(2, 300, 520), wide_long[2]),
            for_cuda=False,
        ),
        Sample("segment_dot", "both axes", (permuted, make(3, len(a), 13), cu)),
        Sample("segment_dot", "neither axis", (permuted[0], g, cu)),
        Sample("segment_dot", "only directions", (permuted, g, cu)),
        Sample("segment_dot", "only gradients", (g, make(4, len(a), 13), cu)),
        Sample("segment_dot", "many of both", (make(5, len(a), 13), make(7, len(a), 13), cu)),
        Sample("segment_dot", "sliced", (sliced, column_major, cu)),
        Sample("segment_dot", "expanded", (g[0].expand(2, len(a), 13), g, cu)),
        Sample("segment_dot", "no samples", (empty[1], empty[1], empty[2])),
        Sample("segment_dot", "no tokens", (no_tokens[1], no_tokens[1][None], no_tokens[2])),
        Sample("segment_dot", "wide", (make(175, 2100), make(2, 175, 2100), wide[2])),
        Sample("segment_dot", "wide, ragged", (columns[:2, :, :4101], columns[2, :, :4101], cu)),
        Sample("segment_dot", "off 16 bytes", (columns[:, :, 3:40], columns[1:, :, 5:42], cu)),
        Sample(
            "segment_dot", "tiles", (make(6, len(a), 24), make(9, len(a), 32)[..., 8:], cu.long())
        ),
        Sample("segment_dot", "long", (tokens[:3], tokens[4:], offsets([2060, 0, 40, 0, 0, 0]))),
        Sample("segment_dot", "long, last", (*tokens[:2], offsets([*[0] * 218, *[1] * 40, 2060]))),
        Sample("segment_dot", "every second", (every_second[:2], every_second[2], cu)),
        Sample("segment_dot", "odd rows", (make(2, 64, 13), make(64, 13), offsets([60, 4]))),
        Sample("ghost_norm", "long, wide", long_gram),
        Sample("ghost_norm", "ragged", (a, g, cu)),
        Sample("ghost_norm", "no samples", empty),
        Sample("ghost_norm", "no tokens", no_tokens),
        Sample("ghost_norm", "strided", (expanded, column_major, cu)),
        Sample("ghost_norm", "long", long),
        Sample("ghost_norm", "wide", wide),
        Sample("ghost_norm", "wide, long", wide_long, for_cuda=False),
        Sample("ghost_norm", "deep", deep),
        Sample("ghost_norm", "three of one input", (a, [g, column_major, make(len(a), 40)], cu)),
        Sample("ghost_norm", "two, no tokens", (no_tokens[0], [no_tokens[1]] * 2, no_tokens[2])),
        Sample("ghost_norm", "two, long", (long[0], [long[1], make(len(long[0]), 9)], long[2])),
        Sample("ghost_norm", "two, wide", (wide[0], [wide[1], make(len(wide[0]), 9)], wide[2])),
        Sample(
            "ghost_norm",
            "two, wide, long",
            (wide_long[0], [make(len(wide_long[0]), 270), wide_long[1]], wide_long[2]),
            for_cuda=False,
        ),
        Sample("ghost_norm", "two, deep", (deep[0], [deep[1], make(len(deep[0]), 2100)], deep[2])),
        Sample("ghost_dot", "deep", (*deep, *deep)),
        Sample("ghost_dot", "with itself", (a, g, cu, a, g, cu)),
        Sample("ghost_dot", "long, with itself", (*long, *long)),
        Sample("ghost_dot", "wide, with itself", (*wide_tiles, *wide_tiles)),
        Sample("ghost_dot", "many, with itself", (*many, *many)),
        Sample("ghost_dot", "many pairs, with itself", (*many_pairs, *many_pairs)),
        Sample("ghost_dot", "two sets", (a, g, cu, *make.rows([5, 0, 9], 9, 13))),
        Sample("ghost_dot", "no samples", (a, g, cu, *empty)),
        Sample("ghost_dot", "no tokens", (*no_tokens, a, g, cu)),
        Sample("ghost_dot", "strided", (expanded, column_major, cu, a, g.flip(0), cu)),
        Sample("ghost_dot", "long", (*long, *make.rows([2, 260], 6, 5))),
        Sample("ghost_dot", "wide", (*wide, *make.rows([30, 4], 700, 530))),
        Sample(
            "ghost_dot",
            "wide, long",
            (*wide_long, *make.rows([2, 1030], 520, 300)),
            for_cuda=False,
        ),
        Sample("multi_tensor_gram", "each its own group", (lists,)),
        Sample("multi_tensor_gram", "groups", (lists, [2, 0, 2, 1])),
        Sample("multi_tensor_gram", "an empty group", (lists, [0, 0, 2, 0]), n_groups=4),
        Sample("multi_tensor_gram", "groups as a tensor", (lists, torch.tensor([1, 0, 1, 1]))),
        Sample("multi_tensor_gram", "one list", (lists[:1],)),
        Sample("multi_tensor_gram", "no tensors", ([[], []],)),
        Sample("multi_tensor_gram", "no elements", ([[make(0, 3), make(2)]] * 2,)),
        Sample("multi_tensor_gram", "only empty", ([[make(0, 3)]] * 2,)),
        Sample("multi_tensor_gram", "scalars", ([[make()], [make()]],)),
        Sample("multi_tensor_gram", "strided", (strided_lists,)),
        Sample("multi_tensor_gram", "big", (big, [0, 0])),
        Sample("multi_tensor_gram", "big, strided", (big_strided,)),
        Sample("multi_tensor_gram", "3 lists", (many_lists[:3],)),
        Sample("multi_tensor_gram", "6 lists", (many_lists[:6],)),
        Sample("multi_tensor_gram", "7 lists", (many_lists[:7],)),
        Sample("multi_tensor_gram", "8 lists", (many_lists[:8],)),
        Sample("multi_tensor_gram", "9 lists", (many_lists[:9],)),
        Sample("multi_tensor_gram", "13 lists", (many_lists[:13],)),
        Sample("multi_tensor_gram", "17 lists", (many_lists, [1, 0])),
        Sample("multi_tensor_gram", "16 lists, long", (long_lists, [0, 0])),
        Sample("multi_tensor_gram", "off 16 bytes", (unaligned,)),
        Sample("multi_tensor_gram", "off 16 bytes, 2", ([unaligned[0], unaligned[1]],)),
        Sample("multi_tensor_gram", "many tensors", (small, [p % 100 // 99 for p in range(1100)])),
    ]
