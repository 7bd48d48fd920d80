"""Every op and provider against the formula, one sample at a time in fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_providers import (
    CUDA_SHIM,
    INSTALLED,
    PROVIDERS,
    every_provider,
    repeated,
    serves,
    serving,
    why_missing,
)
from op_samples import DTYPES, Maker, Sample, offsets, sample_inputs


def emulated(sample: Sample, dtype: torch.dtype) -> bool:
    """Whether CUDA kernels run thread by thread on the host; fp16 and bf16 share their code."""
    if dtype == torch.float16:
        return sample.numel < 2000
    return sample.for_cuda and dtype != torch.float64


CASES = [
    pytest.param(
        dtype,
        index,
        provider,
        id=f"{sample.op}-{sample.name}-{str(dtype).removeprefix('torch.')}-{provider}",
        marks=[pytest.mark.slow] if provider == CUDA_SHIM else [],
    )
    for dtype in DTYPES
    for index, sample in enumerate(sample_inputs(dtype))
    for provider in (*INSTALLED, CUDA_SHIM)
    if provider != CUDA_SHIM or emulated(sample, dtype)
]


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitude(sample: Sample) -> torch.Tensor:
    """The sum of the absolute terms of every result, to which rounding errors are proportional."""
    positive = tuple(_absolute(arg) for arg in sample.args)
    return sample._replace(args=positive).expected()


def _absolute(arg: object) -> object:
    if isinstance(arg, torch.Tensor):
        return arg.abs()
    return [_absolute(item) for item in arg] if isinstance(arg, list) else arg


def matmul_depth(sample: Sample) -> int:
    """Return how many products the op's matrix products add up at most, one after the other."""
    if sample.op in ("segment_dot", "multi_tensor_gram"):
        return 0
    a, g = sample.args[:2]
    d_in, d_out = a.shape[1], sum(one.shape[1] for one in (g if isinstance(g, list) else [g]))
    one_product = max(d_in, d_out, len(a))
    return one_product if sample.op == "segment_bilinear" else max(d_in + d_out, one_product)


@cache
def of_formula(dtype: torch.dtype, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`expected` and `magnitude` of a sample, kept for comparison with several providers."""
    sample = sample_inputs(dtype)[index]
    return sample.expected(), magnitude(sample)


def assert_close_to_formula(
    sample: Sample,
    found: torch.Tensor,
    *,
    tensor_cores: bool = False,
    formula: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Check that products of inputs are summed in fp32 (fp64) or better, in any input precision.

    Tensor cores cut off what does not fit when they add 16 products to a sum, as in any GEMM: where
    all products have one sign, so have these errors.
    """
    expected, size = formula or (sample.expected(), magnitude(sample))
    assert found.shape == expected.shape
    eps = torch.finfo(found.dtype).eps
    # An expanded input repeats one rounding error, so errors add up rather than cancel.
    cuts = matmul_depth(sample) / 16 if tensor_cores else 0
    allowed = (64 + cuts) * eps * size + torch.finfo(found.dtype).tiny
    error = (found.double() - expected).abs()
    assert bool((error <= allowed).all()), f"error {error.max()} of {expected.abs().max()}"


def has_tensor_cores(provider: str, dtype: torch.dtype) -> bool:
    return provider == CUDA_SHIM and dtype in (torch.bfloat16, torch.float16)


def skip_unless_served(provider: str, op: str, dtype: torch.dtype) -> None:
    if not serves(provider, op, dtype):
        pytest.skip(f"no kernel of {provider} for {op} in {dtype}")


@pytest.mark.parametrize(("dtype", "index", "provider"), CASES, indirect=["provider"])
def test_equals_formula_and_itself(dtype: torch.dtype, index: int, provider: str) -> None:
    sample = sample_inputs(dtype)[index]
    skip_unless_served(provider, sample.op, dtype)
    found = sample.run()
    if not (sample.op == "multi_tensor_gram" and not sample.args[0][0]):
        assert found.dtype == result_dtype(dtype)
    assert found.is_contiguous()
    assert_close_to_formula(
        sample,
        found,
        tensor_cores=has_tensor_cores(provider, dtype),
        formula=of_formula(dtype, index),
    )
    for again in repeated(provider):
        with again:
            assert torch.equal(found, sample.run())


@pytest.mark.parametrize("index", range(len(sample_inputs(torch.float32))))
def test_one_thread_gives_the_same_bits(index: int, provider: str) -> None:
    if provider == "reference":
        pytest.skip("torch itself may split a sum by the number of threads")
    sample = sample_inputs(torch.float32)[index]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = sample.run()
        torch.set_num_threads(1)
        assert torch.equal(sample.run(), several)
    finally:
        torch.set_num_threads(threads)


def in_precision(sample: Sample) -> torch.Tensor:
    """Plain torch that stays in the inputs' precision, as a user would write it."""
    a = sample.args[0]
    if sample.op == "multi_tensor_gram":
        return torch.stack(
            [
                torch.stack([torch.stack([(x * y).sum() for y in pair]) for x in pair])
                for pair in zip(*sample.args[0], strict=True)
            ]
        )
    if sample.op == "segment_dot":
        z, g, cu = sample.args
        terms = (z * g).sum(-1)
        return torch.stack([part.sum(-1) for part in terms.split(torch.diff(cu).tolist(), -1)], -1)
    if sample.op == "segment_bilinear":
        a, g, v, cu = sample.args
        terms = torch.stack([((a @ direction.T) * g).sum(-1) for direction in v])
        return torch.stack([part.sum(-1) for part in terms.split(torch.diff(cu).tolist(), -1)], -1)
    grads = [
        [g_i.T @ a_i for a_i, g_i in zip(a.split(lengths), g.split(lengths), strict=True)]
        for a, g, lengths in (
            (a, g, torch.diff(cu).tolist())
            for a, g, cu in (sample.args[at : at + 3] for at in range(0, len(sample.args), 3))
        )
    ]
    if sample.op == "ghost_norm":
        return torch.stack([(x * x).sum() for x in grads[0]])
    return torch.stack([torch.stack([(x * y).sum() for y in grads[1]]) for x in grads[0]])


def low_precision_samples(dtype: torch.dtype) -> list[Sample]:
    make = Maker(dtype, seed=1)
    a, g, cu = make.rows([30, 7, 66], 96, 160)
    other = make.rows([12, 41], 96, 160)
    lists = [[make(64, 70), make(900)] for _ in range(3)]
    return [
        Sample("segment_bilinear", "", (a, g, make(2, 160, 96), cu)),
        Sample("segment_dot", "", (make(2, 103, 160), g, cu)),
        Sample("ghost_norm", "", (a, g, cu)),
        Sample("ghost_dot", "", (a, g, cu, *other)),
        Sample("multi_tensor_gram", "", (lists,)),
    ]


@every_provider
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", range(5))
def test_low_precision_rule(dtype: torch.dtype, index: int, provider: str) -> None:
    """At most twice the error of plain torch in the same precision, plus the result's rounding."""
    sample = low_precision_samples(dtype)[index]
    skip_unless_served(provider, sample.op, dtype)
    expected = sample.expected()
    plain = in_precision(sample).double()
    error = (sample.run().double() - expected).abs().max()
    rounding = (expected.to(torch.float32).double() - expected).abs().max()
    assert error <= 2 * (plain - expected).abs().max() + rounding


DTYPE = st.sampled_from(DTYPES)
LENGTHS = st.lists(st.integers(0, 12), min_size=0, max_size=6)
SIZE = st.integers(1, 40)


def strided(make: Maker, layout: str, *shape: int) -> torch.Tensor:
    """A tensor of `shape` in one of the layouts that callers hold."""
    if layout == "contiguous":
        return make(*shape)
    if layout == "sliced":
        return make(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "offset":
        return make(*shape[:-1], shape[-1] + 3)[..., 3:]
    if layout == "transposed":
        return make(*shape[:-2], shape[-1], shape[-2]).mT
    if layout == "permuted":
        return make(*reversed(shape)).permute(*reversed(range(len(shape))))
    return make(*[1] * (len(shape) - 1), shape[-1]).expand(shape)


LAYOUT = st.sampled_from(["contiguous", "sliced", "offset", "transposed", "permuted", "expanded"])


@pytest.mark.parametrize("by", PROVIDERS)
@settings(max_examples=30, deadline=None)
@given(
    dtype=DTYPE, lengths=LENGTHS, lengths2=LENGTHS, d_in=SIZE, d_out=SIZE, m=st.integers(0, 5),
    k=st.integers(1, 6), layouts=st.tuples(LAYOUT, LAYOUT, LAYOUT), seed=st.integers(0, 99),
    per_token=st.booleans(),
)  # fmt: skip
def test_any_shape_and_strides(
    by, dtype, lengths, lengths2, d_in, d_out, m, k, layouts, seed, per_token
) -> None:
    if (reason := why_missing(by)) is not None:
        pytest.skip(reason)
    make = Maker(dtype, seed)
    total, total2 = sum(lengths), sum(lengths2)
    cu, cu2 = offsets(lengths), offsets(lengths2, torch.int64)
    a, g = strided(make, layouts[0], total, d_in), strided(make, layouts[1], total, d_out)
    a2, g2 = strided(make, layouts[1], total2, d_in), strided(make, layouts[2], total2, d_out)
    v = strided(make, layouts[2], m, d_out, d_in)
    z, many_g = (
        strided(make, layouts[1], m, total, d_out),
        strided(make, layouts[2], k, total, d_out),
    )
    grads = [
        [strided(make, layouts[(j + p) % 3], d_in, p + 1, d_out) for p in range(3)]
        for j in range(k)
    ]
    samples = [
        Sample("segment_bilinear", "", (a, g, v, cu), per_token=per_token),
        Sample("segment_dot", "", (z, many_g, cu)),
        Sample("ghost_norm", "", (a, g, cu)),
        Sample("ghost_dot", "", (a, g, cu, a2, g2, cu2)),
        Sample("multi_tensor_gram", "", (grads, [1, 0, 1])),
    ]
    with serving(by):
        for sample in samples:
            if serves(by, sample.op, dtype):
                on_device = has_tensor_cores(by, dtype)
                assert_close_to_formula(sample, sample.run(), tensor_cores=on_device)
