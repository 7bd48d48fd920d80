"""The cases of bench_gpu.py: shapes of language models, our ops, and other ways to the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast import ops

# d_in, d_out of the linear layers; shapes that several models share appear once.
LAYERS = {
    "Llama-3.2-1B q, o; Phi-1.5 q, k, v": (2048, 2048),
    "Llama-3.2-1B k, v": (2048, 512),
    "Llama-3.2-1B gate, up; Phi-1.5 fc1": (2048, 8192),
    "Llama-3.2-1B down; Phi-1.5 fc2": (8192, 2048),
    "Phi-1.5 lm_head": (2048, 51200),
    "Llama-3.2-1B lm_head": (2048, 128256),
    "Llama-2-7B q, k, v, o; Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B k, v": (4096, 1024),
    "Llama-2-7B gate, up": (4096, 11008),
    "Llama-2-7B down": (11008, 4096),
    "Llama-3-8B gate, up": (4096, 14336),
    "Llama-3-8B down": (14336, 4096),
    "Llama-2-7B lm_head": (4096, 32000),
}
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-3}


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        n_bytes, flops: the least that any way must move and compute.
        make: makes the inputs of a seed.
        candidates: functions of the inputs, `ours` first.
        variables: environment variables that a candidate runs under.
        partial: candidates that do a part of the work only, timed and not compared.
    """

    op: str
    shape: str
    dtype: str
    n_bytes: float
    flops: float
    make: Callable[[int], Any]
    candidates: dict[str, Callable[[Any], Any]]
    tolerance: float
    variables: dict[str, dict[str, str]] = field(default_factory=dict)
    partial: tuple[str, ...] = ()


def name_of(dtype: torch.dtype) -> str:
    """Return the name that the table uses."""
    return str(dtype).removeprefix("torch.")


def random(seed: int, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return normal numbers of a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def ragged(total: int, shortest: int, longest: int) -> list[int]:
    """Return lengths of samples that fill `total` tokens, the last one cut to fit."""
    generator = torch.Generator().manual_seed(total)
    lengths: list[int] = []
    while sum(lengths) < total:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        lengths.append(min(length, total - sum(lengths)))
    return lengths


def offsets(lengths: list[int], device: torch.device) -> Tensor:
    """Return `cu_seqlens` of samples of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def forced(variable: str, forms: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return the environment of every candidate that forces a form."""
    return {f"ours:{form}": {variable: form} for form in forms}


def compiled(function: Callable[[Any], Any], device: torch.device) -> Callable[[Any], Any]:
    """Compile a baseline for the device; on a CPU only its graph is traced."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(function, dynamic=False, backend=backend)


def bilinear(
    device: torch.device, dtype: torch.dtype, layer: tuple[int, int], tokens: int, m: int,
    longest: int, with_compile: bool,
) -> Case:  # fmt: skip
    """Directions against a layer: mm + multiply + segment sum, and mm alone."""
    d_in, d_out = layer
    lengths = ragged(tokens, min(20, longest), longest)
    cu, lengths_on = offsets(lengths, device), torch.tensor(lengths, device=device)

    def make(seed: int) -> tuple[Tensor, ...]:
        shapes = ((tokens, d_in), (tokens, d_out), (m, d_out, d_in))
        return tuple(random(seed + i, device, dtype, *shape) for i, shape in enumerate(shapes))

    def ours(given: tuple[Tensor, ...]) -> Tensor:
        return ops.segment_bilinear(*given, cu)

    def eager(given: tuple[Tensor, ...]) -> Tensor:
        a, g, v = given
        terms = torch.stack([((a @ d.T) * g).sum(-1, dtype=torch.float32) for d in v])
        return torch.segment_reduce(terms.T.contiguous(), "sum", lengths=lengths_on, axis=0).T

    def mm_alone(given: tuple[Tensor, ...]) -> Tensor:
        a, _, v = given
        return torch.stack([(a @ d.T)[0, 0] for d in v])

    forms = ("fused", "sm90", "cublas") + (("gradient",) if m > 1 else ())
    variables = forced("GEFFECT_FAST_BILINEAR_FORM", forms if dtype != torch.float32 else ())
    candidates = {"ours": ours, **dict.fromkeys(variables, ours), "eager": eager}
    candidates["mm_alone"] = mm_alone
    if with_compile:
        candidates["compile"] = compiled(eager, device)
    size = dtype.itemsize
    return Case(
        "segment_bilinear", f"{d_in}x{d_out} T={tokens} M={m} {min(20, longest)}..{longest}",
        name_of(dtype), size * (tokens * (d_in + d_out) + m * d_in * d_out) + 4 * m * len(lengths),
        2.0 * tokens * d_in * d_out * m, make, candidates, TOLERANCE[dtype], variables,
        ("mm_alone",),
    )  # fmt: skip


def dot(device: torch.device, dtype: torch.dtype, d: int, tokens: int, k: int, m: int) -> Case:
    """K gradients against M cached products."""
    lengths = ragged(tokens, 20, 500)
    cu, lengths_on = offsets(lengths, device), torch.tensor(lengths, device=device)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return (
            random(seed, device, dtype, m, tokens, d),
            random(seed + 1, device, dtype, k, tokens, d),
        )

    def eager(given: tuple[Tensor, Tensor]) -> Tensor:
        z, g = given
        terms = torch.stack(
            [torch.stack([(x * y).sum(-1, dtype=torch.float32) for x in z]) for y in g]
        )
        flat = terms.flatten(0, 1).T.contiguous()
        return torch.segment_reduce(flat, "sum", lengths=lengths_on, axis=0).T.view(k, m, -1)

    candidates = {"ours": lambda given: ops.segment_dot(*given, cu), "eager": eager}
    if (k, m) == (2, 2):
        candidates["compile"] = compiled(eager, device)
    return Case(
        "segment_dot", f"d={d} T={tokens} K={k} M={m}", name_of(dtype),
        dtype.itemsize * tokens * d * (k + m), 2.0 * tokens * d * k * m, make, candidates,
        TOLERANCE[dtype],
    )  # fmt: skip


def norm(
    device: torch.device, dtype: torch.dtype, d: int, tokens: int, length: int, with_compile: bool
) -> Case:
    """Samples of one length, so that padding costs the einsums nothing."""
    n = max(1, tokens // length)
    cu = offsets([length] * n, device)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        return tuple(random(seed + i, device, dtype, n * length, d) for i in range(2))

    def gram_einsum(given: tuple[Tensor, Tensor]) -> Tensor:
        a, g = (x.view(n, length, d) for x in given)
        gram = torch.einsum("nid,njd->nij", a, a)
        return torch.einsum("nij,nij->n", gram, torch.einsum("nid,njd->nij", g, g)).float()

    def gradient_einsum(given: tuple[Tensor, Tensor]) -> Tensor:
        a, g = (x.view(n, length, d) for x in given)
        return torch.einsum("nti,nto->noi", a, g).float().square().sum((1, 2))

    def ours(given: tuple[Tensor, Tensor]) -> Tensor:
        return ops.ghost_norm(*given, cu)

    variables = forced("GEFFECT_FAST_GHOST_FORM", ("gram", "gradient"))
    candidates = {"ours": ours, **dict.fromkeys(variables, ours)}
    candidates |= {"gram_einsum": gram_einsum, "gradient_einsum": gradient_einsum}
    if with_compile:
        candidates["compile"] = compiled(gram_einsum, device)
    flops = min(2.0 * n * length**2 * d, 2.0 * n * length * d * d)  # half of both Grams
    return Case(
        "ghost_norm", f"{d}x{d} {n} samples of {length}", name_of(dtype),
        dtype.itemsize * 2 * n * length * d, flops, make, candidates, TOLERANCE[dtype], variables,
    )  # fmt: skip


def pairs(device: torch.device, dtype: torch.dtype, d: int, tokens: int, longest: int) -> Case:
    """All pairs of two sets of samples."""
    lengths = ragged(tokens, min(20, longest), longest)
    cu, n = offsets(lengths, device), len(lengths)
    index = torch.repeat_interleave(torch.arange(n), torch.tensor(lengths)).to(device)
    member = F.one_hot(index, n).float()

    def make(seed: int) -> tuple[Tensor, ...]:
        return tuple(random(seed + i, device, dtype, tokens, d) for i in range(4))

    def ours(given: tuple[Tensor, ...]) -> Tensor:
        a, g, a2, g2 = given
        return ops.ghost_dot(a, g, cu, a2, g2, cu)

    def gram(given: tuple[Tensor, ...]) -> Tensor:
        a, g, a2, g2 = given
        return member.T @ ((a @ a2.T).float() * (g @ g2.T).float()) @ member

    def gradients(a: Tensor, g: Tensor) -> Tensor:
        a, g = (
            torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)
            for x in (a, g)
        )
        return torch.einsum("nti,nto->noi", a, g).flatten(1)

    def gradient_einsum(given: tuple[Tensor, ...]) -> Tensor:
        a, g, a2, g2 = given
        return (gradients(a, g) @ gradients(a2, g2).T).float()

    variables = forced("GEFFECT_FAST_GHOST_FORM", ("gram", "gradient"))
    candidates = {"ours": ours, **dict.fromkeys(variables, ours), "eager": gram}
    candidates |= {"gradient_einsum": gradient_einsum}
    flops = min(4.0 * tokens**2 * d, (4.0 * tokens + 2.0 * n * n) * d * d)
    return Case(
        "ghost_dot", f"{d}x{d} T=T2={tokens} {min(20, longest)}..{longest}", name_of(dtype),
        dtype.itemsize * 4 * tokens * d + 4 * n * n, flops, make, candidates, TOLERANCE[dtype],
        variables,
    )  # fmt: skip


def gram(device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, ...]], k: int) -> Case:
    """K lists of a model's gradients."""

    def make(seed: int) -> list[list[Tensor]]:
        return [
            [random(seed + 7 * j + i, device, dtype, *shape) for i, shape in enumerate(shapes)]
            for j in range(k)
        ]

    def ours(lists: list[list[Tensor]]) -> Tensor:
        return ops.multi_tensor_gram(lists)

    def dot_by_dot(lists: list[list[Tensor]]) -> Tensor:
        flat = [[x.flatten() for x in tensors] for tensors in lists]
        grams = [
            torch.stack([torch.stack([torch.dot(x, y) for y in row]) for x in row])
            for row in zip(*flat, strict=True)
        ]
        return torch.stack(grams).float()

    def stacked_mm(lists: list[list[Tensor]]) -> Tensor:
        rows = (torch.stack([x.flatten() for x in row]) for row in zip(*lists, strict=True))
        return torch.stack([(x @ x.T).float() for x in rows])

    elements = sum(torch.Size(shape).numel() for shape in shapes)
    candidates = {"ours": ours, "stacked_mm": stacked_mm}
    if k <= 4:
        candidates["dot_by_dot"] = dot_by_dot
    return Case(
        "multi_tensor_gram", f"{elements / 1e6:.0f}M elements K={k}", name_of(dtype),
        dtype.itemsize * elements * k, 1.0 * elements * k * (k + 1), make, candidates,
        TOLERANCE[dtype],
    )  # fmt: skip


def logprob(
    device: torch.device, dtype: torch.dtype, d: int, vocabulary: int, tokens: int, backward: bool
) -> Case:
    """Log-probabilities of labels, and their weighted gradient."""

    def make(seed: int) -> tuple[Tensor, ...]:
        hidden = random(seed, device, dtype, tokens, d)
        weight = random(seed + 1, device, dtype, vocabulary, d) / d**0.5
        labels = torch.randint(vocabulary, (tokens,), device=device)
        return hidden.requires_grad_(backward), weight.requires_grad_(backward), labels

    def eager_forward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    def with_gradients(forward: Callable[..., Tensor]) -> Callable[[tuple[Tensor, ...]], Any]:
        weights = torch.linspace(-1, 1, tokens, device=device)

        def run(given: tuple[Tensor, ...]) -> Any:
            found = forward(*given)
            if not backward:
                return found
            return (found, *torch.autograd.grad(found, given[:2], weights))

        return run

    passes = 3 if backward else 1
    name = "forward + backward" if backward else "forward"
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled_forward = torch.compile(eager_forward, dynamic=False, backend=backend)
    candidates = {
        "ours": with_gradients(ops.token_logprob),
        "eager": with_gradients(eager_forward),
        "compile": with_gradients(compiled_forward),
    }
    return Case(
        "token_logprob", f"{d}x{vocabulary} T={tokens} {name}", name_of(dtype),
        dtype.itemsize * passes * (tokens + vocabulary) * d, 2.0 * passes * tokens * d * vocabulary,
        make, candidates, TOLERANCE[dtype],
    )  # fmt: skip


def llama_shapes(
    d: int, d_kv: int, d_ff: int, vocabulary: int, layers: int
) -> list[tuple[int, ...]]:
    """Return the shapes of all parameters of a Llama with tied embeddings."""
    block = [(d, d), (d_kv, d), (d_kv, d), (d, d), (d_ff, d), (d_ff, d), (d, d_ff), (d,), (d,)]
    return [(vocabulary, d), *block * layers, (d,)]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the cases, those that decide most first within each op."""
    low = torch.bfloat16
    if device.type == "cpu":
        yield bilinear(device, torch.float32, (64, 96), 128, 2, 60, True)
        yield dot(device, torch.float32, 64, 128, 2, 2)
        yield norm(device, torch.float32, 64, 128, 32, True)
        yield pairs(device, torch.float32, 48, 128, 60)
        yield gram(device, torch.float32, llama_shapes(32, 16, 64, 128, 2), 3)
        yield logprob(device, torch.float32, 32, 200, 64, True)
        return
    for index, layer in enumerate(LAYERS.values()):
        for m in (1, 2):
            yield bilinear(device, low, layer, 4096, m, 500, index == 0)
    for layer in ((2048, 2048), (4096, 4096), (4096, 14336)):
        yield bilinear(device, low, layer, 16384, 1, 500, False)
        yield bilinear(device, low, layer, 16384, 2, 500, False)
        yield bilinear(device, low, layer, 4096, 4, 500, False)
        yield bilinear(device, low, layer, 2048, 2, 100, False)
    yield bilinear(device, torch.float16, (4096, 4096), 4096, 2, 500, False)
    yield bilinear(device, torch.float32, (2048, 2048), 4096, 1, 500, False)
    for d in (2048, 4096, 14336):
        for k, m in ((1, 1), (2, 2), (7, 2)):
            yield dot(device, low, d, 16384, k, m)
    yield dot(device, torch.float32, 4096, 8192, 2, 2)
    for length in (64, 256, 1024):
        for d in (1024, 2048, 4096, 8192):
            yield norm(device, low, d, 8192, length, d == 2048)
    yield norm(device, torch.float32, 2048, 4096, 256, False)
    for d, tokens, longest in ((2048, 4096, 500), (4096, 4096, 500), (4096, 8192, 500),
                               (2048, 8192, 1500), (4096, 2048, 100)):  # fmt: skip
        yield pairs(device, low, d, tokens, longest)
    one_billion = llama_shapes(2048, 512, 8192, 128256, 16)
    for k in (2, 4, 8, 16):
        yield gram(device, low, one_billion, k)
    yield gram(device, torch.float32, one_billion, 2)
    for d, vocabulary in ((4096, 32000), (2048, 128256)):
        for backward in (False, True):
            yield logprob(device, low, d, vocabulary, 4096, backward)
