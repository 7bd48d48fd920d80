"""Which functions of a language model are served by rules of their own in forward mode.

Costly ones are caught on the way; the framework differentiates everything else by its own rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from geffect_fast.engines.dual_attention import Attention
from geffect_fast.engines.dual_layers import Linear, PaddedEmbedding
from geffect_fast.engines.dual_output import LabelNLL
from geffect_fast.engines.dual_rule import in_autocast


class DualFunctions(TorchFunctionMode):
    """Inside, the rules above serve the functions they are of, and `no_grad` drops tangents too.

    Reverse mode takes what was computed under `no_grad` as constant; forward mode by itself does
    not, and the two engines would differ. `requires_grad_`, of which it knows nothing, does
    nothing.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        elif func is Tensor.requires_grad_:
            return args[0]  # asked for by checkpointing, where nothing below it can be trained
        elif func in _SERVED:
            served = _SERVED[func](*args, **kwargs)
            if served is not None:
                return served
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return Linear()(*_cast(input, weight, bias)) if weight.dim() == 2 else None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    **_: Any,
) -> Tensor | None:
    if padding_idx is None or max_norm is not None:
        return None
    return PaddedEmbedding(padding_idx % len(weight))(input, weight)


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor | None:
    # Called with all options that there are, given or not.
    plain = reduction == "none" and not any(options.values()) and not in_autocast(input.device.type)
    if not plain or input.dim() != 2 or target.dim() != 1:
        return None
    return LabelNLL(ignore_index)(input, target)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if dropout_p:
        return None
    mask = None if attn_mask is None else torch.atleast_2d(attn_mask)
    return Attention(is_causal, scale, enable_gqa)(*_cast(query, key, value, mask))


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast multiplies in place of these, where it is on."""
    device = next(x for x in tensors if x is not None).device.type
    if not in_autocast(device):
        return tensors
    dtype, kept = torch.get_autocast_dtype(device), (torch.bool, torch.float64)
    return tuple(x if x is None or x.dtype in kept else x.to(dtype) for x in tensors)


_SERVED: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.cross_entropy: _cross_entropy,
    F.scaled_dot_product_attention: _attention,
}
