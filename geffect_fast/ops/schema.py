"""The contract of every op: its schema, the shape of its result, its reference, and no autograd.

The reference is registered for every device; a native library overrides it per device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from geffect_fast.errors import InputError
from geffect_fast.ops import reference
from geffect_fast.ops.reference import accumulation_dtype

NAMESPACE = "geffect_fast"

SCHEMAS = {
    "multi_tensor_gram": "(Tensor[] grads, int n_lists, int[] groups, int n_groups) -> Tensor",
    "segment_bilinear": (
        "(Tensor a, Tensor g, Tensor v, Tensor cu_seqlens, bool per_token=False) -> Tensor"
    ),
    "segment_dot": "(Tensor z, Tensor g, Tensor cu_seqlens) -> Tensor",
    "ghost_norm": "(Tensor a, Tensor g, Tensor cu_seqlens) -> Tensor",
    "ghost_dot": (
        "(Tensor a, Tensor g, Tensor cu_seqlens, Tensor a2, Tensor g2, Tensor cu_seqlens2)"
        " -> Tensor"
    ),
}

# `ghost_norm` of several gradients, and the ops that only `capture` calls.
PART_SCHEMAS = {
    "segment_product": "(Tensor x, Tensor y, Tensor cu_seqlens) -> Tensor",
    "ghost_norm_of_one_input": "(Tensor a, Tensor[] g, Tensor cu_seqlens) -> Tensor",
    "token_grams": "(Tensor a, Tensor cu_seqlens) -> Tensor",
    "ghost_norm_of_grams": "(Tensor grams, Tensor[] g, Tensor cu_seqlens) -> Tensor",
}

REFERENCES: dict[str, Callable[..., Tensor]] = {
    name: getattr(reference, name) for name in SCHEMAS | PART_SCHEMAS
}


def _fake_multi_tensor_gram(
    grads: list[Tensor], n_lists: int, groups: list[int], n_groups: int
) -> Tensor:
    shape = (n_groups, n_lists, n_lists)
    return grads[0].new_empty(shape, dtype=accumulation_dtype(grads[0].dtype))


def _fake_segment_bilinear(
    a: Tensor, g: Tensor, v: Tensor, cu_seqlens: Tensor, per_token: bool = False
) -> Tensor:
    columns = a.shape[0] if per_token else cu_seqlens.shape[0] - 1
    return a.new_empty((v.shape[0], columns), dtype=accumulation_dtype(a.dtype))


def _fake_segment_dot(z: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    shape = (g.shape[0], z.shape[0], cu_seqlens.shape[0] - 1)
    return z.new_empty(shape, dtype=accumulation_dtype(z.dtype))


def _fake_ghost_norm(a: Tensor, g: Tensor, cu_seqlens: Tensor) -> Tensor:
    return a.new_empty((cu_seqlens.shape[0] - 1,), dtype=accumulation_dtype(a.dtype))


def _fake_ghost_norm_of_one_input(a: Tensor, g: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    return _fake_ghost_norm(a, a, cu_seqlens)


def _fake_token_grams(a: Tensor, cu_seqlens: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return a.new_empty((size,), dtype=accumulation_dtype(a.dtype))


def _fake_ghost_norm_of_grams(grams: Tensor, g: list[Tensor], cu_seqlens: Tensor) -> Tensor:
    return _fake_ghost_norm(grams, grams, cu_seqlens)


def _fake_segment_product(x: Tensor, y: Tensor, cu_seqlens: Tensor) -> Tensor:
    shape = (cu_seqlens.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


def _fake_ghost_dot(
    a: Tensor, g: Tensor, cu_seqlens: Tensor, a2: Tensor, g2: Tensor, cu_seqlens2: Tensor
) -> Tensor:
    shape = (cu_seqlens.shape[0] - 1, cu_seqlens2.shape[0] - 1)
    return a.new_empty(shape, dtype=accumulation_dtype(a.dtype))


FAKES: dict[str, Callable[..., Tensor]] = {
    "multi_tensor_gram": _fake_multi_tensor_gram,
    "segment_bilinear": _fake_segment_bilinear,
    "segment_dot": _fake_segment_dot,
    "ghost_norm": _fake_ghost_norm,
    "ghost_norm_of_one_input": _fake_ghost_norm_of_one_input,
    "token_grams": _fake_token_grams,
    "ghost_norm_of_grams": _fake_ghost_norm_of_grams,
    "segment_product": _fake_segment_product,
    "ghost_dot": _fake_ghost_dot,
}


# Ops that native libraries call among themselves. Where the library of such an op is not built, the
# implementations below serve: they return no terms, so that the caller takes another way.
NATIVE_SCHEMAS = {
    "segment_bilinear_terms_sm90": "(Tensor a, Tensor g, Tensor v) -> Tensor",
    "ghost_norm_grams_sm90": (
        "(Tensor a, Tensor g, Tensor cu_seqlens, Tensor first, int parts, int a_parts) -> Tensor"
    ),
}
INTERNAL_SCHEMAS = PART_SCHEMAS | NATIVE_SCHEMAS


def _no_terms(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
    return a.new_empty((0, v.shape[0], a.shape[0]), dtype=torch.float32)


def _no_grams(a: Tensor, *_: Any) -> Tensor:
    return a.new_empty((0, 0), dtype=torch.float64)


_MISSING = {
    "segment_bilinear_terms_sm90": _no_terms,
    "ghost_norm_grams_sm90": _no_grams,
}


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(item for item in arg if isinstance(item, Tensor))
    return found


def refuse_autograd(op: str, args: tuple[Any, ...]) -> None:
    """Raise where autograd would need a derivative of `op`, which measures and has none.

    Without this check, reverse mode would silently detach, and forward mode would return zero
    tangents.
    """
    tensors = _tensors(args)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError(
            f"{op}: an input requires grad and the op has no derivative;"
            " call it under torch.no_grad() or detach the inputs"
        )
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise InputError(
            f"{op}: an input carries a forward-mode tangent and the op has no derivative;"
            f" use geffect_fast.ops.reference.{op} instead"
        )


def _autograd_kernel(name: str, op: Any) -> Callable[..., Tensor]:
    def kernel(*args: Any) -> Tensor:
        refuse_autograd(name, args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, signature in (SCHEMAS | PART_SCHEMAS).items():
        qualified = f"{NAMESPACE}::{name}"
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, FAKES[name], lib=library)
        library.impl(name, REFERENCES[name], "CompositeExplicitAutograd")
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        library.impl(name, _autograd_kernel(name, op), "Autograd")
    for name, signature in NATIVE_SCHEMAS.items():
        library.define(name + signature)
        library.impl(name, _MISSING[name], "CompositeExplicitAutograd")
    return library


# Kept for as long as the process: the registrations go when the library object goes.
LIBRARY = _define()
