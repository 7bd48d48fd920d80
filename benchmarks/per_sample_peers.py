"""Other exact ways to per-sample gradient norms, inner products with a direction and all pairs.

Each is written anew, for a Llama and a rectangular batch of tokens, as one who knows the technique
would write it: a loop over samples, `vmap(grad)`, forward mode, and ghost clipping. All of them
take the same losses (`sample_losses`) and the whole gradient of all parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

Direction = Mapping[str, Tensor]
Peer = Callable[[], Tensor]

VMAP_CHUNK = 4
"""Samples at once for `vmap(grad)`, which forms every gradient. The fastest of 1, 2, 4, 8."""


def sample_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, `(n,)` for `ids` `(n, length)`."""
    return mean_nll(model(input_ids=ids, use_cache=False).logits, ids)


def mean_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood from logits `(n, length, vocabulary)`, which are not copied."""
    nothing = torch.full_like(ids[:, :1], -100)
    labels = torch.cat([ids[:, 1:], nothing], 1)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return nll.view_as(ids).sum(1) / (ids.shape[1] - 1)


def peers(model: nn.Module, ids: Tensor, direction: Direction) -> dict[str, dict[str, Peer]]:
    """The contestants by quantity and name; each gives `(n,)`, for pairs `(n, n)`.

    Args:
        model: a Llama whose embeddings are not tied, sdpa attention.
        ids: `(n, length)` tokens.
        direction: a tensor by parameter name.
    """
    assert len(list(model.parameters())) == len(list(model.state_dict())), "tied weights"
    eager: Any = copy.deepcopy(model)  # sdpa attention has no rule for it
    eager.set_attn_implementation("eager")
    return {
        "norms": {
            "loop": partial(loop_norms, model, ids),
            "vmap(grad)": partial(vmap_norms, eager, ids),
            "ghost clipping": partial(ghost_norms, model, ids),
        },
        "direction": {
            "loop": partial(loop_direction, model, ids, direction),
            "vmap(grad)": partial(vmap_direction, eager, ids, direction),
            "jvp": partial(jvp_direction, eager, ids, direction),
            "ghost clipping": partial(ghost_direction, model, ids, direction),
        },
        "pairs": {
            "loop": partial(loop_pairs, model, ids),
            "vmap(grad)": partial(vmap_pairs, eager, ids),
            "ghost clipping": partial(ghost_pairs, model, ids),
        },
    }


# ---- one sample after the other ----


def sample_gradients(model: nn.Module, ids: Tensor, i: int) -> tuple[Tensor, ...]:
    """The gradient of sample `i` by itself, in the order of the model's parameters."""
    return torch.autograd.grad(sample_losses(model, ids[i : i + 1])[0], list(model.parameters()))


def loop_norms(model: nn.Module, ids: Tensor) -> Tensor:
    """One backward a sample."""
    return torch.stack(
        [nn.utils.get_total_norm(sample_gradients(model, ids, i)) for i in range(len(ids))]
    )


def loop_direction(model: nn.Module, ids: Tensor, direction: Direction) -> Tensor:
    """One backward a sample, a dot product a parameter."""
    flat = [direction[name].flatten() for name, _ in model.named_parameters()]
    found = []
    for i in range(len(ids)):
        pairs = zip(sample_gradients(model, ids, i), flat, strict=True)
        found.append(torch.stack([torch.dot(g.flatten(), v) for g, v in pairs]).sum())
    return torch.stack(found)


def loop_pairs(model: nn.Module, ids: Tensor) -> Tensor:
    """One backward a sample, all gradients kept."""
    flat = no_gradients(model, ids)
    for i in range(len(ids)):
        torch.cat([g.flatten() for g in sample_gradients(model, ids, i)], out=flat[i])
    return gram(flat)


def no_gradients(model: nn.Module, ids: Tensor) -> Tensor:
    """Room for the samples' gradients, one a row."""
    n_elements = sum(p.numel() for p in model.parameters())
    return torch.empty(len(ids), n_elements, device=ids.device)


def gram(flat: Tensor) -> Tensor:
    """`flat @ flat.T` of long rows: one product in fp32 would lose all digits but two."""
    return torch.stack([block @ block.T for block in flat.split(1 << 16, dim=1)]).double().sum(0)


# ---- vmap(grad): every sample's gradient, several at once ----


def vmap_gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """`(n, *shape)` by parameter name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        arguments = {"input_ids": one[None], "use_cache": False}
        return mean_nll(functional_call(model, parameters, (), arguments).logits, one[None])[0]

    return vmap(grad(loss), (None, 0))(parameters, ids)


def vmap_norms(model: nn.Module, ids: Tensor) -> Tensor:
    """All gradients, a few samples at a time."""
    found = []
    for chunk in ids.split(VMAP_CHUNK):
        gradients = vmap_gradients(model, chunk).values()
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).square() for g in gradients]
        found.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(found)


def vmap_direction(model: nn.Module, ids: Tensor, direction: Direction) -> Tensor:
    """All gradients, a few samples at a time."""
    found = []
    for chunk in ids.split(VMAP_CHUNK):
        gradients = vmap_gradients(model, chunk)
        products = [g.flatten(1) @ direction[name].flatten() for name, g in gradients.items()]
        found.append(torch.stack(products).sum(0))
    return torch.cat(found)


def vmap_pairs(model: nn.Module, ids: Tensor) -> Tensor:
    """All gradients, kept."""
    flat = no_gradients(model, ids)
    for first in range(0, len(ids), VMAP_CHUNK):
        rows = slice(first, first + VMAP_CHUNK)
        gradients = vmap_gradients(model, ids[rows])
        torch.cat([g.flatten(1) for g in gradients.values()], dim=1, out=flat[rows])
    return gram(flat)


# ---- forward mode: one direction, all samples ----


def jvp_direction(model: nn.Module, ids: Tensor, direction: Direction) -> Tensor:
    """The tangents of the losses along the direction."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        arguments = {"input_ids": ids, "use_cache": False}
        return mean_nll(functional_call(model, parameters, (), arguments).logits, ids)

    with torch.no_grad():
        return jvp(losses, (parameters,), (dict(direction),))[1]


# ---- ghost clipping: layer inputs and output gradients of one backward ----


def ghost(
    model: nn.Module, ids: Tensor, layer: Callable[[str, nn.Module, Tensor, Tensor], Tensor]
) -> Tensor:
    """Sum of `layer(parameter, module, a, g)` over layers, one forward and backward.

    `a` is what the layer was called with and `g` the gradient of its output; parameters are frozen,
    so that no weight gradient of the batch is formed.
    """
    names = {module: name for name, module in model.named_modules()}
    found, handles = [], []

    @torch.no_grad()
    def arrived(module: nn.Module, a: Tensor, g: Tensor) -> None:
        found.append(layer(f"{names[module]}.weight", module, a, g))

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if isinstance(module, nn.Embedding):
            output = output.requires_grad_()
        output.register_hook(partial(arrived, module, args[0].detach()))
        return output

    try:
        for module in model.modules():
            if module._parameters:
                handles.append(module.register_forward_hook(after))
        model.requires_grad_(False)
        losses = sample_losses(model, ids)
        losses.sum().backward()
    finally:
        model.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return torch.stack(found).sum(0)


def normalized(module: Any, x: Tensor) -> Tensor:
    """The factor of an RMSNorm's weight in its output."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def ghost_norms(model: nn.Module, ids: Tensor) -> Tensor:
    """Token Grams or explicit gradients, whichever is cheaper."""

    def squared(_name: str, module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            same = a[:, :, None] == a[:, None, :]
            return (torch.bmm(g, g.mT) * same).sum((1, 2))
        if not isinstance(module, nn.Linear):
            return (g * normalized(module, a)).sum(1).square().sum(1)
        length, d_in, d_out = a.shape[1], a.shape[2], g.shape[2]
        if length * (d_in + d_out) < d_in * d_out:
            return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        return torch.linalg.vector_norm(torch.bmm(g.mT, a).flatten(1), dim=1).square()

    return ghost(model, ids, squared).sqrt()


def ghost_direction(model: nn.Module, ids: Tensor, direction: Direction) -> Tensor:
    """The inputs through the direction, then a dot product a token."""

    def product(name: str, module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
        v = direction[name]
        if isinstance(module, nn.Embedding):
            return (v[a] * g).sum((1, 2))
        if not isinstance(module, nn.Linear):
            return (g * normalized(module, a)).sum(1) @ v
        return ((a @ v.T) * g).sum((1, 2))

    return ghost(model, ids, product)


def ghost_pairs(model: nn.Module, ids: Tensor) -> Tensor:
    """All token Grams or explicit gradients, whichever is cheaper."""
    n, length = ids.shape

    def products(_name: str, module: nn.Module, a: Tensor, g: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            flat = g.flatten(0, 1)
            same = a.flatten()[:, None] == a.flatten()[None, :]
            return ((flat @ flat.T) * same).view(n, length, n, length).sum((1, 3))
        if not isinstance(module, nn.Linear):
            rows = (g * normalized(module, a)).sum(1)
            return rows @ rows.T
        tokens, d_in, d_out = n * length, a.shape[2], g.shape[2]
        if tokens * tokens * (d_in + d_out) < (tokens + n * n) * d_in * d_out:
            a, g = a.flatten(0, 1), g.flatten(0, 1)
            return ((a @ a.T) * (g @ g.T)).view(n, length, n, length).sum((1, 3))
        return gram(torch.bmm(g.mT, a).flatten(1))

    return ghost(model, ids, products)
