"""Baselines: obvious ways to write the ops in plain torch, in the inputs' precision."""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from torch import Tensor

FP32 = torch.float32


def with_lengths(*args: Tensor) -> tuple[Tensor, ...]:
    """Replace offsets of samples, the one or two int32 arguments, by lengths."""
    return tuple(arg.long().diff() if arg.dtype == torch.int32 else arg for arg in args)


def by_sample(terms: Tensor, n_tokens: Tensor) -> Tensor:
    """Sum the last axis of fp32 `(..., total_tokens)` over samples."""
    rows = terms.flatten(0, -2).T.contiguous()
    sums = torch.segment_reduce(rows, "sum", lengths=n_tokens, axis=0, unsafe=True)
    return sums.T.reshape(*terms.shape[:-1], len(n_tokens))


# ---- segment_bilinear, segment_dot ----


def bilinear(a: Tensor, g: Tensor, v: Tensor, n_tokens: Tensor) -> Tensor:
    """A product, a multiplication and a sum for each direction."""
    terms = torch.stack([((a @ direction.T) * g).sum(-1, dtype=FP32) for direction in v])
    return by_sample(terms, n_tokens)


def products_alone(a: Tensor, _g: Tensor, v: Tensor, _cu: Tensor) -> Tensor:
    """The products alone: the part of the op that is torch.mm."""
    out = a.new_empty(len(a), v.shape[1])
    for direction in v:
        torch.mm(a, direction.T, out=out)
    return out


def dot(z: Tensor, g: Tensor, n_tokens: Tensor) -> Tensor:
    """All products, summed over features and samples."""
    return by_sample((z[None] * g[:, None]).sum(-1, dtype=FP32), n_tokens)


def dot_by_einsum(z: Tensor, g: Tensor, n_tokens: Tensor) -> Tensor:
    """A small matrix product a token."""
    return by_sample(torch.einsum("ktd,mtd->kmt", g, z).float(), n_tokens)


# ---- ghost_norm, ghost_dot ----


def padded(a: Tensor, g: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
    """`(n, longest, d)` with zeros after each sample, as Opacus has its batches."""
    n_tokens = cu.diff().tolist()
    a_pad, g_pad = (
        torch.nn.utils.rnn.pad_sequence(list(rows.split(n_tokens)), batch_first=True)
        for rows in (a, g)
    )
    return a_pad, g_pad


def padded_pairs(*args: Tensor) -> tuple[Tensor, ...]:
    """Both sets of ghost_dot, padded."""
    return (*padded(*args[:3]), *padded(*args[3:]))


def norm_by_gram(a: Tensor, g: Tensor) -> Tensor:
    """Opacus' ghost norm: both Grams of every sample's tokens."""
    gram_a = torch.einsum("nid,njd->nij", a, a)
    return (gram_a * torch.einsum("nid,njd->nij", g, g)).sum((1, 2), dtype=FP32)


def norm_by_gradient(a: Tensor, g: Tensor) -> Tensor:
    """Opacus' per-sample gradients."""
    return torch.einsum("nti,nto->noi", a, g).square().sum((1, 2), dtype=FP32)


def pairs_by_gradient(a: Tensor, g: Tensor, a2: Tensor, g2: Tensor) -> Tensor:
    """Per-sample gradients of both sets, and their products."""
    first, second = (torch.einsum("nti,nto->noi", *side).flatten(1) for side in ((a, g), (a2, g2)))
    return first @ second.T


def pairs_by_tokens(
    a: Tensor, g: Tensor, n_tokens: Tensor, a2: Tensor, g2: Tensor, n_tokens2: Tensor
) -> Tensor:
    """The products of all pairs of tokens, summed over pairs of samples."""
    pairs = (a @ a2.T).float() * (g @ g2.T).float()
    return by_sample(by_sample(pairs, n_tokens2).T, n_tokens).T


# ---- multi_tensor_gram ----


def _symmetric(entries: list[Tensor], k: int) -> Tensor:
    """`(P, K, K)` from one tensor of P sums for each pair of lists."""
    out = torch.stack(entries)
    index = torch.empty(k, k, dtype=torch.long)
    for at, (i, j) in enumerate(combinations_with_replacement(range(k), 2)):
        index[i, j] = index[j, i] = at
    return out[index.flatten()].T.reshape(-1, k, k)


def gram_dot_by_dot(lists: list[list[Tensor]]) -> Tensor:
    """A dot product for each pair of lists and tensor."""
    entries = [
        torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(*pair, strict=True)])
        for pair in combinations_with_replacement(lists, 2)
    ]
    return _symmetric(entries, len(lists))


def gram_by_foreach(lists: list[list[Tensor]]) -> Tensor:
    """torch._foreach_mul for each pair of lists."""
    entries = [
        torch.stack([x.sum(dtype=FP32) for x in torch._foreach_mul(*pair)])
        for pair in combinations_with_replacement(lists, 2)
    ]
    return _symmetric(entries, len(lists))


def gram_by_stacks(lists: list[list[Tensor]]) -> Tensor:
    """A product for each tensor, of its copies in all lists laid side by side."""
    stacked = [torch.stack([x.flatten() for x in same]) for same in zip(*lists, strict=True)]
    return torch.stack([rows @ rows.T for rows in stacked])
