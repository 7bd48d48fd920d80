"""Sizes past 2^31 elements, unusable arguments, wrong offsets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import torch
from gpu_samples import call, tensors_of
from on_gpu import (
    DEVICE,
    GPU_DTYPES,
    gpu_only,
    name_of,
    poison_free_memory,
    skip_unless_cuda_kernel,
    skip_unless_free,
)
from torch import Tensor

from geffect_fast import ops
from geffect_fast.errors import InputError

pytestmark = gpu_only
GIB = 2**30
CHUNK = 2**26
HUGE = 2**31 + 17
HUGE_TOKENS, HUGE_WIDTH = 70_000, 32_000  # 2.2e9 elements
BF16 = torch.bfloat16


def filled(*shape: int, seed: int = 0) -> Tensor:
    """Random bf16 numbers, made piece by piece: there is no second copy in another precision."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    out = torch.empty(*shape, dtype=BF16, device=DEVICE)
    for piece in out.view(-1).split(CHUNK):
        piece.normal_(generator=generator)
    return out


def sampled(total: int) -> Tensor:
    bounds = [*range(0, total, 500), total]
    return torch.tensor(bounds, dtype=torch.int32, device=DEVICE)


def per_sample(cu: Tensor, of: Callable[[slice], Tensor]) -> Tensor:
    return torch.stack([of(slice(i, j)) for i, j in pairwise(cu.tolist())], dim=-1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * expected.std())


# ---- more elements than an int32 counts ----


def test_gram_of_more_than_2_31_elements() -> None:
    skip_unless_free(11 * GIB, "a Gram matrix of two tensors of 2^31 + 17 elements")
    x, y = filled(HUGE), filled(HUGE, seed=1)
    for tensor in (x, y):
        tensor[-17:] = 3000.0  # so many that results without them differ in every product
    found = ops.multi_tensor_gram([[x], [y]])
    expected = torch.zeros(1, 2, 2, dtype=torch.float64, device=DEVICE)
    for pieces in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        rows = torch.stack(pieces).double()
        expected[0] += rows @ rows.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_dot_of_more_than_2_31_elements() -> None:
    skip_unless_free(11 * GIB, "segment_dot of 2.2e9 elements")
    z, g = filled(HUGE_TOKENS, HUGE_WIDTH), filled(HUGE_TOKENS, HUGE_WIDTH, seed=1)
    cu = sampled(HUGE_TOKENS)
    expected = per_sample(cu, lambda s: (z[s].double() * g[s].double()).sum())
    assert_near(ops.segment_dot(z, g, cu), expected)


def test_bilinear_and_norm_of_more_than_2_31_elements() -> None:
    skip_unless_free(10 * GIB, "output gradients of 2.2e9 elements")
    a, g = filled(HUGE_TOKENS, 64), filled(HUGE_TOKENS, HUGE_WIDTH, seed=1)
    v, cu = filled(2, HUGE_WIDTH, 64, seed=2), sampled(HUGE_TOKENS)

    def gradient(rows: slice) -> Tensor:
        return g[rows].double().T @ a[rows].double()

    gradients = [gradient(slice(i, i + 500)) for i in range(0, HUGE_TOKENS, 500)]
    products = [(v.double() * gradient).sum((1, 2)) for gradient in gradients]
    assert_near(ops.segment_bilinear(a, g, v, cu), torch.stack(products, dim=1))
    norms = torch.stack([gradient.square().sum() for gradient in gradients])
    torch.testing.assert_close(ops.ghost_norm(a, g, cu).double(), norms, rtol=1e-4, atol=0)


# ---- unusable arguments ----


def to_cpu(tensor: Tensor) -> Tensor:
    return tensor.cpu()


def to_half(tensor: Tensor) -> Tensor:
    return tensor.half()


def to_float(tensor: Tensor) -> Tensor:
    return tensor.float()


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:-1]


BAD: list[tuple[str, int, Callable[[Tensor], Tensor], str]] = [
    ("segment_bilinear", 0, to_cpu, "`g` is on cuda"),
    ("segment_bilinear", 2, to_cpu, "`v` is on cpu"),
    ("segment_bilinear", 2, to_float, "`v` has dtype"),
    ("segment_bilinear", 3, to_cpu, "`cu_seqlens` is on cpu"),
    ("segment_dot", 1, to_cpu, "`g` is on cpu"),
    ("segment_dot", 1, shorter, "`g` has"),
    ("segment_dot", 2, to_cpu, "`cu_seqlens` is on cpu"),
    ("ghost_norm", 1, to_cpu, "`g` is on cpu"),
    ("ghost_norm", 1, to_half, "`g` has dtype"),
    ("ghost_norm", 1, shorter, "`g` has"),
    ("ghost_norm", 2, to_float, "`cu_seqlens` must be an int32 or int64"),
    ("ghost_norm", 2, to_cpu, "`cu_seqlens` is on cpu"),
    ("ghost_dot", 4, to_cpu, "`g2` is on cpu"),
    ("ghost_dot", 4, shorter, "`g2` has"),
    ("ghost_dot", 5, to_cpu, "`cu_seqlens2` is on cpu"),
    ("multi_tensor_gram", 3, to_cpu, r"`grads\[1\]\[1\]` is on cpu"),
    ("multi_tensor_gram", 4, shorter, r"`grads\[2\]\[0\]` has shape"),
]


@pytest.mark.parametrize(("op", "index", "change", "message"), BAD, ids=range(len(BAD)))
def test_wrong_call_names_op_and_argument(
    op: str, index: int, change: Callable[[Tensor], Tensor], message: str
) -> None:
    tensors = tensors_of(op, BF16)
    tensors[index] = change(tensors[index])
    with pytest.raises(InputError, match=f"^{op}: {message}"):
        call(op, tensors)


PAST_THE_CHECKS: dict[str, tuple[Any, ...]] = {
    "segment_bilinear": (False,),
    "segment_dot": (),
    "ghost_norm": (),
    "ghost_dot": (),
}


@gpu_only
@pytest.mark.parametrize("op", PAST_THE_CHECKS)
def test_kernel_refuses_two_devices(op: str) -> None:
    """Without a check before, the device would read memory of the host."""
    tensors = tensors_of(op, BF16)
    if op == "segment_dot":
        tensors[:2] = [tensor if tensor.dim() == 3 else tensor[None] for tensor in tensors[:2]]
    kernel = getattr(torch.ops.geffect_fast, op)
    for index in range(1, len(tensors)):
        mixed = [t.cpu() if i == index else t for i, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=f"{op}: all arguments must be on one device"):
            kernel(*mixed, *PAST_THE_CHECKS[op])


# ---- wrong offsets, which are not read before the kernels run ----

OFFSETS_AT = {
    "segment_bilinear": (3,),
    "segment_dot": (2,),
    "ghost_norm": (2,),
    "ghost_dot": (2, 5),
}
WRONG: dict[str, Callable[[list[int]], list[int]]] = {
    "decreasing": lambda c: [*c[:4], c[3] - 1, *c[5:]],
    "negative": lambda c: [*c[:4], -5, *c[5:]],
    "past the end": lambda c: [*c[:4], c[-1] + 1000, *c[5:]],
    "far past the end": lambda c: [*c[:4], 2**31 - 1, *c[5:]],
    "not from 0": lambda c: [1, *c[1:]],
    "not to the end": lambda c: [*c[:-1], c[-1] - 1],
}


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("index64", [False, True])
@pytest.mark.parametrize(("op", "at"), [(op, at) for op, s in OFFSETS_AT.items() for at in s])
def test_wrong_offsets_are_nan_and_reported_once(
    op: str, at: int, index64: bool, wrong: str, dtype: torch.dtype
) -> None:
    """Accesses stay inside of tensors; the results they touch are NaN; the next call says so."""
    skip_unless_cuda_kernel(op)
    tensors = tensors_of(op, dtype)
    with suppress(RuntimeError):  # a failed test may leave an error to report
        call(op, tensors)
    # Segments of a few tokens each, so that every wrong offset is wrong.
    total = int(tensors[at][-1])
    bounds = [total * i // 10 for i in range(11)]
    offset_dtype = torch.int64 if index64 else torch.int32
    tensors[at] = torch.tensor(bounds, dtype=offset_dtype, device=DEVICE)
    expected = call(op, tensors)
    assert expected.isfinite().all()
    broken = list(tensors)
    broken[at] = torch.tensor(WRONG[wrong](bounds), dtype=offset_dtype, device=DEVICE)
    poison_free_memory()
    found = call(op, broken)
    torch.cuda.synchronize()
    first_axis = op == "ghost_dot" and at == 2
    by_segment = found.isnan().movedim(0 if first_axis else -1, 0).reshape(10, -1)
    assert by_segment.any() and not by_segment.all()
    assert bool((by_segment.any(1) == by_segment.all(1)).all()), "a segment is NaN in part"
    which = "cu_seqlens2" if at == 5 else "cu_seqlens"
    with pytest.raises(RuntimeError, match=f"{op}: `{which}` of an earlier call"):
        call(op, tensors)
    assert torch.equal(call(op, tensors), expected)
