"""Trials that find out what a module computes: linear layers, norms, embeddings of any name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from geffect_fast.trying import Trying


class _Bare(nn.Module):
    """A module without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def forward_alone(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Run the module's own forward with other parameters, so that no hook runs a second time."""
    replaced = {f"module.{name}": p for name, p in parameters.items()}
    return functional_call(_Bare(module), replaced, args, kwargs)


def likeness(module: nn.Module) -> Hashable | None:
    """A key that is equal for modules that compute the same but for their parameters' values.

    None where that cannot be told: something inside `module` is neither a parameter nor a plain
    value.
    """
    own = {k: v for k, v in vars(module).items() if k not in _EVERY_MODULE}
    if module._modules or module._buffers or not all(map(_is_plain, own.values())):
        return None
    parameters = (
        (k, p if p is None else (p.shape, p.dtype, p.device)) for k, p in module._parameters.items()
    )
    return type(module), module.training, repr(sorted(own.items())), *parameters


_EVERY_MODULE = vars(nn.Module()).keys()


def _is_plain(x: object) -> bool:
    if isinstance(x, tuple):
        return all(map(_is_plain, x))
    return x is None or type(x) in (bool, int, float, str, torch.dtype)


def is_linear(module: nn.Linear) -> bool:
    """Whether a module with a forward of its own computes `x W^T + b` all the same, as Falcon's do.

    The module is tried on rows from tiny to large, which shows one that rounds or limits its input.
    Its gradients are compared too, because it may detach its weight. Buffers and children, which
    could change from call to call, rule a module out.
    """
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return False
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = module.out_features, module.in_features
    x, g, w, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(module.weight)
        for shape in ((2, 3, d_in), (2, 3, d_out), (d_out, d_in), (d_out,))
    )
    own = [p.requires_grad_() for p in ((w,) if module.bias is None else (w, b))]
    parameters = dict(zip(("weight", "bias"), own, strict=False))

    def outcome(forward: Callable[[Tensor], Tensor], size: float) -> tuple[Tensor, ...]:
        y = forward(size * x)
        return y.detach(), *torch.autograd.grad(y, own, g)

    with Trying(), torch.enable_grad():
        return all(
            _close(found, expected)
            for size in (1e-3, 1.0, 1e3)
            for found, expected in zip(
                outcome(lambda x: forward_alone(module, parameters, (x,)), size),
                outcome(lambda x: nn.functional.linear(x, *own), size),
                strict=True,
            )
        )
    return False


def _close(found: Tensor, expected: Tensor) -> bool:
    rtol = 1e-2 if expected.dtype.itemsize < 4 else 1e-5
    return torch.allclose(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def embedding_scale(module: nn.Embedding) -> float | None:
    """The factor `s` of an embedding `y = s W[id]`; None where the module computes something else.

    Gemma's embeddings multiply by `sqrt(d)`. The factor is the derivative itself, taken by forward
    mode on a small table, and accepted only where the module is linear with it. The table has more
    rows than are looked up, so that a module that shifts its ids is noticed and does not run over
    the end.
    """
    n_rows = max(64, (module.padding_idx or 0) + 1)
    table = torch.linspace(-1, 1, n_rows * module.embedding_dim).view(n_rows, -1)
    table = table.to(module.weight)
    ids = torch.arange(8, device=table.device)

    def look_up(weight: Tensor) -> Tensor:
        return forward_alone(module, {"weight": weight}, (ids,))

    with Trying(), torch.no_grad():
        y, slope = jvp(look_up, (table,), (torch.ones_like(table),))[:2]
        zero = look_up(torch.zeros_like(table))
        # The row of the padding index receives no tangent, so the slope is read off the others.
        scale = float(slope.flatten()[slope.abs().argmax()])
        linear = torch.allclose(y, table[ids] * scale, rtol=1e-2 if y.dtype.itemsize < 4 else 1e-5)
        return scale if linear and not zero.any() else None
    return None


def norm_with(
    module: nn.Module, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """The output of a norm with this weight and bias (None: zero)."""
    replaced = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        replaced["bias"] = torch.zeros_like(weight) if bias is None else bias
    return forward_alone(module, replaced, args, kwargs)


def norm_offset(module: nn.Module) -> float | None:
    """0 for `y = xhat w + b`, 1 for `y = xhat (1 + w) + b`, None for anything else.

    The formula is tried on random rows against the module with weights 0, 1 and random. The rows
    have three axes of different sizes, so that a norm over other axes than the last (of groups, of
    a batch) cannot pass for one over the last.
    """
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if weight is None or weight.dim() != 1 or own or any(True for _ in module.children()):
        return None
    d = weight.numel()
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(weight)
        for shape in ((2, 3 if d != 3 else 4, d), (d,), (d,))
    )
    with Trying() as trial, torch.no_grad():
        at_zero = norm_with(module, torch.zeros_like(w), None, x)
        at_one = norm_with(module, torch.ones_like(w), None, x)
        at_random = norm_with(module, w, None if bias is None else b, x)
    if trial.error is not None or not isinstance(at_one, Tensor) or at_one.shape != x.shape:
        return None
    offset, xhat = (1.0, at_zero) if at_zero.any() else (0.0, at_one)
    rtol = 5e-2 if x.dtype.itemsize < 4 else 1e-5
    expected = xhat * (offset + w) + (0 if bias is None else b)
    same = torch.allclose(at_one, xhat * (offset + 1.0), rtol=rtol, atol=rtol)
    return offset if same and torch.allclose(at_random, expected, rtol=rtol, atol=rtol) else None
