"""Every op against plain torch on the CPU: interleaved medians, ratios and peak memory.

    python benchmarks/bench_ops.py            # writes benchmarks/results/ops_cpu.csv
    python benchmarks/bench_ops.py --quick    # one round, prints only
    python benchmarks/bench_ops.py --threads 1    # where other work shares the cores

`kernel` is the provider in use, `reference` the package's specification in plain torch, every other
candidate an obvious way to write the same in plain torch, `mm_alone` the GEMM without the rest.
`ratio` is a candidate's time over the kernel's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from machine import RESULTS, interleaved_medians, peak_extra_bytes, write_csv
from torch import Tensor

from geffect_fast import ops

Candidates = dict[str, Callable[[], Any]]


class Packed(NamedTuple):
    """Rows of one layer: inputs, output gradients and the samples' offsets."""

    a: Tensor
    g: Tensor
    cu_seqlens: Tensor


class Case(NamedTuple):
    """One line of the table: an op at a shape."""

    op: str
    shape: str
    candidates: Candidates


def packed(
    total_tokens: int, d_in: int, d_out: int, shortest: int, longest: int, dtype: torch.dtype
) -> Packed:
    """Make rows of samples of `shortest` to `longest` tokens, the last one cut to fit."""
    generator = torch.Generator().manual_seed(total_tokens)
    offsets = [0]
    while offsets[-1] < total_tokens:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        offsets.append(min(offsets[-1] + length, total_tokens))
    a = torch.randn(total_tokens, d_in, generator=generator)
    g = torch.randn(total_tokens, d_out, generator=generator)
    return Packed(a.to(dtype), g.to(dtype), torch.tensor(offsets, dtype=torch.int32))


def padded(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return `(n, longest, d)` with zeros after each sample, as Opacus expects."""
    lengths = torch.diff(cu_seqlens).tolist()
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(lengths)), batch_first=True)


def with_reference(run: Callable[[], Any]) -> Candidates:
    """Return `run` served by the kernel and by the reference."""

    def reference() -> Any:
        with ops.force_reference():
            return run()

    return {"kernel": run, "reference": reference}


def bilinear_case(data: Packed, n_directions: int, shape: str) -> Case:
    """Kernel, reference, and per-sample gradients made one by one."""
    a, g, cu_seqlens = data
    v = torch.randn(n_directions, g.shape[1], a.shape[1]).to(a.dtype)
    lengths = torch.diff(cu_seqlens).tolist()

    def sample_gradients() -> Tensor:
        flat = v.float().flatten(1)
        return torch.stack(
            [
                flat @ (g_i.float().T @ a_i.float()).flatten()
                for a_i, g_i in zip(a.split(lengths), g.split(lengths), strict=True)
            ]
        )

    candidates = with_reference(lambda: ops.segment_bilinear(a, g, v, cu_seqlens))
    candidates["mm_alone"] = lambda: [a @ direction.T for direction in v]
    candidates["sample_gradients"] = sample_gradients
    return Case("segment_bilinear", f"{shape} M={n_directions}", candidates)


def dot_case(data: Packed, n_z: int, n_g: int, shape: str) -> Case:
    """Kernel, reference, and a product summed over features and samples."""
    z = torch.randn(len(data.g), n_z, data.g.shape[1]).to(data.g.dtype).transpose(0, 1)
    g = torch.stack([data.g] * n_g)
    lengths = torch.diff(data.cu_seqlens).long()

    def multiply_and_sum() -> Tensor:
        terms = (z.float() * g[:, None].float()).sum(-1).flatten(0, 1)
        return torch.segment_reduce(terms.T.contiguous(), "sum", lengths=lengths, axis=0)

    candidates = with_reference(lambda: ops.segment_dot(z, g, data.cu_seqlens))
    candidates["multiply_and_sum"] = multiply_and_sum
    return Case("segment_dot", f"{shape} K={n_g} M={n_z}", candidates)


def norm_case(data: Packed, shape: str) -> Case:
    """Kernel, reference, and Opacus-style einsums over padded samples, Gram and gradient."""
    a, g, cu_seqlens = data

    def gram_einsum() -> Tensor:
        a_pad, g_pad = padded(a, cu_seqlens).float(), padded(g, cu_seqlens).float()
        gram_a = torch.einsum("nid,njd->nij", a_pad, a_pad)
        return torch.einsum("nij,nij->n", gram_a, torch.einsum("nid,njd->nij", g_pad, g_pad))

    def gradient_einsum() -> Tensor:
        a_pad, g_pad = padded(a, cu_seqlens).float(), padded(g, cu_seqlens).float()
        return torch.einsum("nti,nto->noi", a_pad, g_pad).square().sum((1, 2))

    candidates = with_reference(lambda: ops.ghost_norm(a, g, cu_seqlens))
    return Case(
        "ghost_norm",
        shape,
        {**candidates, "gram_einsum": gram_einsum, "gradient_einsum": gradient_einsum},
    )


def pairs_case(data: Packed, other: Packed, shape: str) -> Case:
    """Kernel, reference, and all gradients held at once."""

    def gradients(side: Packed) -> Tensor:
        a, g = padded(side.a, side.cu_seqlens).float(), padded(side.g, side.cu_seqlens).float()
        return torch.einsum("nti,nto->noi", a, g).flatten(1)

    candidates = with_reference(lambda: ops.ghost_dot(*data, *other))
    candidates["gradient_einsum"] = lambda: gradients(data) @ gradients(other).T
    return Case("ghost_dot", shape, candidates)


def gram_case(n_lists: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, shape: str) -> Case:
    """Kernel, reference, and one dot product a pair."""
    lists = [[torch.randn(size).to(dtype) for size in shapes] for _ in range(n_lists)]

    def dot_by_dot() -> list[Tensor]:
        return [
            torch.dot(x.flatten().float(), y.flatten().float())
            for j, left in enumerate(lists)
            for right in lists[j:]
            for x, y in zip(left, right, strict=True)
        ]

    candidates = with_reference(lambda: ops.multi_tensor_gram(lists))
    return Case(
        "multi_tensor_gram", f"{shape} K={n_lists}", {**candidates, "dot_by_dot": dot_by_dot}
    )


def llama_shapes(d: int, d_ff: int, vocabulary: int, layers: int) -> list[tuple[int, ...]]:
    """Return the shapes of all parameters of a Llama with tied embeddings."""
    block = [(d, d)] * 4 + [(d_ff, d)] * 2 + [(d, d_ff), (d,), (d,)]
    return [(vocabulary, d), *block * layers, (d,)]


def layer_cases(d_in: int, d_out: int, total_tokens: int, dtype: torch.dtype) -> list[Case]:
    """Return the four ops of one linear layer on packed samples of 20..130 tokens."""
    data = packed(total_tokens, d_in, d_out, 20, 130, dtype)
    shape = f"{d_in}x{d_out} T={total_tokens} {str(dtype).removeprefix('torch.')}"
    return [
        *(bilinear_case(data, n_directions, shape) for n_directions in (1, 2, 4)),
        *(dot_case(data, n_z, n_g, shape) for n_z, n_g in ((1, 1), (2, 1), (2, 7))),
        norm_case(data, shape),
        pairs_case(data, data, shape),
    ]


def cases() -> list[Case]:
    """Return the shapes of a 26M Llama on 1024 packed tokens, and larger and longer ones."""
    found = []
    for d_in, d_out in ((512, 512), (512, 1376), (512, 8192)):
        found += layer_cases(d_in, d_out, 1024, torch.float32)
    found += layer_cases(2048, 2048, 2048, torch.float32)
    found += layer_cases(512, 1376, 1024, torch.bfloat16)
    long = packed(2048, 512, 512, 1024, 1024, torch.float32)
    found.append(norm_case(long, "512x512 T=2x1024 float32"))
    found.append(pairs_case(long, long, "512x512 T=2x1024 float32"))
    shapes = llama_shapes(512, 1376, 8192, 7)
    for n_lists, dtype in ((2, torch.float32), (4, torch.float32), (2, torch.bfloat16)):
        name = str(dtype).removeprefix("torch.")
        found.append(gram_case(n_lists, shapes, dtype, f"Llama-26M {name}"))
    return found


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Time one case and print its line."""
    seconds = interleaved_medians(case.candidates, rounds)
    rows = []
    for name, run in case.candidates.items():
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "candidate": name,
                "median_ms": round(seconds[name] * 1e3, 4),
                "ratio": round(seconds[name] / seconds["kernel"], 3),
                "peak_extra_mb": round(peak_extra_bytes(run) / 2**20, 2),
            }
        )
    line = "  ".join(
        f"{r['candidate']} {r['median_ms']:.2f} ms x{r['ratio']:.2f} {r['peak_extra_mb']:.1f} MB"
        for r in rows
    )
    print(f"{case.op:18s} {case.shape:32s} {line}", flush=True)
    return rows


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round a case, nothing written")
    parser.add_argument(
        "--only", default="", help="run the cases whose op and shape contain this text"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; all cores if not given")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for case in cases():
        if arguments.only in f"{case.op} {case.shape}":
            rows += measure(case, rounds=1 if arguments.quick else 7)
    if not arguments.quick and not arguments.only:
        write_csv(RESULTS / "ops_cpu.csv", rows)


if __name__ == "__main__":
    main()
