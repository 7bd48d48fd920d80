"""The cases of bench_gpu.py: the ops at shapes of language models, baselines and least work.

A case makes its inputs from a seed. A candidate prepares its own form of the inputs (by padding,
for example) before the timing, and then runs. Bytes and operations are the least of any way to
compute the result: every input read once and the result written, and the cheapest exact formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import gpu_baselines as plain
import package_path  # noqa: F401
import torch
from gpu_inputs import Candidate, Case, Inputs, Maker, forms

from geffect_fast import ops
from geffect_fast.ops import backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (d_in, d_out) of q and o, k and v, gate and up, down, lm_head.
LAYERS = {
    "Llama-3.2-1B": [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048), (2048, 128256)],
    "Phi-1.5": [(2048, 2048), (2048, 8192), (8192, 2048), (2048, 51200)],
    "Llama-2-7B": [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 32000)],
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (4096, 128256)],
}


def has_hopper_kernels(maker: Maker) -> bool:
    """Whether the forms for sm_90a alone can be timed."""
    on_hopper = maker.device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return on_hopper and backend.HOPPER_MISSING is None


# ---- segment_bilinear ----


def bilinear_cases(maker: Maker) -> Iterator[Case]:
    """All layer shapes once, with few and many tokens; other dtypes at one shape."""
    for layer in dict.fromkeys(shape for model in LAYERS.values() for shape in model):
        every = layer in ((2048, 2048), (4096, 4096), (4096, 11008))
        for total in (2048, 4096, 8192, 16384) if every else (2048, 16384):
            for m in (4, 2, 1):
                first = (*layer, total, m) == (4096, 11008, 8192, 2)
                yield bilinear_case(maker, layer, total, m, BF16, 0 if first else 1)
    for layer in ((2048, 2048), (4096, 4096), (4096, 14336)):
        for m in (4, 2):
            yield bilinear_case(maker, layer, 4096, m, BF16, 1, longest=100)
    for dtype in (FP16, FP32):
        for m in (2, 1):
            yield bilinear_case(maker, (4096, 4096), 4096, m, dtype, 2)


def bilinear_case(
    maker: Maker,
    layer: tuple[int, int],
    total: int,
    m: int,
    dtype: torch.dtype,
    priority: int,
    longest: int = 500,
) -> Case:
    """Least operations: Z = A V^T, or each sample's gradient and its products with V."""
    d_in, d_out = map(maker.size, layer)
    bounds = maker.bounds(total, longest=longest)
    total, n, most = bounds[-1], len(bounds) - 1, 4

    def make(seed: int) -> Inputs:
        a, g, v = maker.layer(total, d_in, d_out, most, dtype, seed)
        return a, g, v[:m], maker.offsets(bounds)

    names = ["cublas"]
    if dtype != FP32:
        names += ["fused", "gradient", *(["sm90"] if has_hopper_kernels(maker) else [])]
    candidates = forms("GEFFECT_FAST_BILINEAR_FORM", names, ops.segment_bilinear)
    candidates["eager"] = Candidate(plain.bilinear, plain.with_lengths)
    candidates["mm_alone"] = Candidate(plain.products_alone)
    if priority == 0:
        candidates["compile"] = maker.compiled(candidates["eager"])
    size = dtype.itemsize
    return Case(
        op="segment_bilinear",
        shape=f"{d_in}x{d_out} T={total} M={m}{' short' if longest < 500 else ''}",
        dtype=dtype,
        n_bytes=size * (total * (d_in + d_out) + m * d_in * d_out) + 4 * m * n,
        flops=2 * d_in * d_out * min(m * total, total + m * n),
        make=make,
        candidates=candidates,
        input_bytes=size * (total * (d_in + d_out) + most * d_in * d_out),
        priority=priority,
    )


# ---- segment_dot ----


def dot_cases(maker: Maker) -> Iterator[Case]:
    """K objectives by M directions."""
    for total, d in ((8192, 4096), (16384, 2048), (4096, 11008), (2048, 32000)):
        for k, m in ((7, 2), (2, 2), (1, 1)):
            yield dot_case(maker, total, d, k, m, BF16, 0 if (d, k) == (4096, 7) else 1)
    for dtype in (FP16, FP32):
        yield dot_case(maker, 8192, 4096, 2, 2, dtype, 2)


def dot_case(
    maker: Maker, total: int, d: int, k: int, m: int, dtype: torch.dtype, priority: int
) -> Case:
    """Least work: z and g read once."""
    bounds, d = maker.bounds(total), maker.size(d)
    total = bounds[-1]
    n_bytes = dtype.itemsize * (k + m) * total * d + 4 * k * m * (len(bounds) - 1)

    def make(seed: int) -> Inputs:
        torch.manual_seed(seed)
        z, g = (maker.randn(count, total, d, dtype=dtype) for count in (m, k))
        return z, g, maker.offsets(bounds)

    candidates = {
        "ours": Candidate(ops.segment_dot),
        "eager": Candidate(plain.dot, plain.with_lengths),
        "einsum": Candidate(plain.dot_by_einsum, plain.with_lengths),
    }
    if priority == 0:
        candidates["compile"] = maker.compiled(candidates["eager"])
    return Case(
        op="segment_dot",
        shape=f"d={d} T={total} K={k} M={m}",
        dtype=dtype,
        n_bytes=n_bytes,
        flops=2 * k * m * total * d,
        make=make,
        candidates=candidates,
        input_bytes=n_bytes,
        priority=priority,
    )


# ---- ghost_norm, ghost_dot ----


def norm_cases(maker: Maker) -> Iterator[Case]:
    """Samples of one length in square layers, ragged ones in a model's."""
    total = maker.size(8192)
    for length in (64, 256, 1024):
        bounds = list(range(0, total + 1, max(2, length // maker.shrink)))
        for d in (1024, 2048, 4096, 8192):
            priority = 0 if (length, d) == (256, 2048) else 1
            yield norm_case(maker, (d, d), bounds, f"{bounds[1]} each", BF16, priority)
    for layer in ((2048, 8192), (4096, 11008), (4096, 32000)):
        yield norm_case(maker, layer, maker.bounds(8192), "ragged", BF16, 1)
    for layer in ((2048, 2048), (2048, 8192)):
        for longest in (100, 150):
            yield norm_case(maker, layer, maker.bounds(8192, 20, longest), f"to {longest}", BF16, 1)
    for dtype in (FP16, FP32):
        yield norm_case(maker, (2048, 2048), maker.bounds(8192), "ragged", dtype, 2)


def norm_case(
    maker: Maker,
    layer: tuple[int, int],
    bounds: list[int],
    what: str,
    dtype: torch.dtype,
    priority: int,
) -> Case:
    """Least operations: each sample by half of its token Grams or by its gradient."""
    (d_in, d_out), total = map(maker.size, layer), bounds[-1]
    n_tokens = [end - start for start, end in pairwise(bounds)]
    n_bytes = dtype.itemsize * total * (d_in + d_out) + 4 * len(n_tokens)

    def make(seed: int) -> Inputs:
        a, g, _ = maker.layer(total, d_in, d_out, 0, dtype, seed)
        return a, g, maker.offsets(bounds)

    names = ["gram", "gradient"]
    if dtype != FP32 and has_hopper_kernels(maker):
        names.append("clusters")
    candidates = forms("GEFFECT_FAST_GHOST_FORM", names, ops.ghost_norm)
    candidates["gram_einsum"] = Candidate(plain.norm_by_gram, plain.padded)
    candidates["gradient_einsum"] = Candidate(plain.norm_by_gradient, plain.padded)
    if priority == 0:
        candidates["compile_gram"] = maker.compiled(candidates["gram_einsum"])
        candidates["compile_gradient"] = maker.compiled(candidates["gradient_einsum"])
    return Case(
        op="ghost_norm",
        shape=f"{d_in}x{d_out} T={total} {what}",
        dtype=dtype,
        n_bytes=n_bytes,
        flops=sum(min(t * (t + 1) * (d_in + d_out), 2 * t * d_in * d_out) for t in n_tokens),
        make=make,
        candidates=candidates,
        input_bytes=n_bytes,
        priority=priority,
    )


def pairs_cases(maker: Maker) -> Iterator[Case]:
    """Few long samples, many short ones."""
    for shortest, longest, what in ((20, 500, "ragged"), (20, 44, "short"), (900, 1100, "long")):
        bounds = maker.bounds(4096, shortest, longest)
        for layer in ((2048, 2048), (4096, 11008)):
            priority = 0 if (what, layer[0]) == ("ragged", 2048) else 1
            yield pairs_case(maker, layer, bounds, what, BF16, priority)
    for dtype in (FP16, FP32):
        yield pairs_case(maker, (2048, 2048), maker.bounds(2048), "ragged", dtype, 2)


def pairs_case(
    maker: Maker,
    layer: tuple[int, int],
    bounds: list[int],
    what: str,
    dtype: torch.dtype,
    priority: int,
) -> Case:
    """Least operations: all pairs of tokens, or all gradients and their products."""
    (d_in, d_out), total, n = map(maker.size, layer), bounds[-1], len(bounds) - 1
    n_bytes = 2 * dtype.itemsize * total * (d_in + d_out) + 4 * n * n

    def make(seed: int) -> Inputs:
        cu = maker.offsets(bounds)
        a, g, _ = maker.layer(total, d_in, d_out, 0, dtype, seed)
        # The second set resembles the first, so that few results are small by chance.
        return a, g, cu, a + maker.randn(*a.shape, dtype=dtype), g.clone(), cu

    candidates = {"ours": Candidate(ops.ghost_dot)}
    candidates["gradient_einsum"] = Candidate(plain.pairs_by_gradient, plain.padded_pairs)
    candidates["pairs_of_tokens"] = Candidate(plain.pairs_by_tokens, plain.with_lengths)
    if priority == 0:
        candidates["compile"] = maker.compiled(candidates["pairs_of_tokens"])
    return Case(
        op="ghost_dot",
        shape=f"{d_in}x{d_out} T={total} {what} N={n}",
        dtype=dtype,
        n_bytes=n_bytes,
        flops=min(2 * total**2 * (d_in + d_out), 2 * (2 * total + n * n) * d_in * d_out),
        make=make,
        candidates=candidates,
        input_bytes=n_bytes,
        priority=priority,
    )


# ---- multi_tensor_gram ----


def gram_cases(maker: Maker) -> Iterator[Case]:
    """A Llama-3.2-1B's gradients, and one block's."""
    d, kv, d_ff, vocabulary = map(maker.size, (2048, 512, 8192, 128256))
    block = [(d, d), (kv, d), (kv, d), (d, d), (d_ff, d), (d_ff, d), (d, d_ff), (d,), (d,)]
    model = [(vocabulary, d), *block * 16, (d,)]
    yield gram_case(maker, "1 block", block, 4, BF16, 0)
    for k in (2, 4, 8, 16):
        yield gram_case(maker, "Llama-1B", model, k, BF16, 1)
    yield gram_case(maker, "Llama-1B", model, 2, FP32, 2)
    yield gram_case(maker, "1 block", block, 4, FP16, 2)


def gram_case(
    maker: Maker,
    what: str,
    shapes: list[tuple[int, ...]],
    k: int,
    dtype: torch.dtype,
    priority: int,
) -> Case:
    """Least work: each gradient read once."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    n_bytes = dtype.itemsize * k * numel + 4 * len(shapes) * k * k

    def make(seed: int) -> Inputs:
        torch.manual_seed(seed)
        return ([[maker.randn(*shape, dtype=dtype) for shape in shapes] for _ in range(k)],)

    candidates = {
        "ours": Candidate(ops.multi_tensor_gram),
        "dot_by_dot": Candidate(plain.gram_dot_by_dot),
        "stack_mm": Candidate(plain.gram_by_stacks),
    }
    if k <= 8:
        candidates["foreach"] = Candidate(plain.gram_by_foreach)
    if priority == 0:
        candidates["compile"] = maker.compiled(candidates["dot_by_dot"])
    return Case(
        op="multi_tensor_gram",
        shape=f"{what} K={k}",
        dtype=dtype,
        n_bytes=n_bytes,
        flops=k * (k + 1) * numel,
        make=make,
        candidates=candidates,
        input_bytes=n_bytes,
        priority=priority,
    )


# Ops with few cases come first, as time may run out.
CASES = (norm_cases, dot_cases, gram_cases, pairs_cases, bilinear_cases)


def all_cases(maker: Maker) -> list[Case]:
    """Every case, the most telling ones first."""
    return sorted((case for of in CASES for case in of(maker)), key=lambda case: case.priority)
