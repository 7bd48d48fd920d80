"""The two ways to run a model in forward mode: by duals and, where duals fail, by the framework.

The same rules serve costly functions in both ways. The framework differentiates everything without
a rule: with duals that function alone, otherwise the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.utils
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from geffect_fast.engines.dual import functions  # noqa: F401  its rules
from geffect_fast.engines.dual.attention import Attention
from geffect_fast.engines.dual.layers import Embedding, LabelNLL, LayerNorm, Linear
from geffect_fast.engines.dual.rule import in_autocast
from geffect_fast.engines.dual.tensor import Dual, NoRuleError, follow, rule


class DualPass(TorchFunctionMode):
    """A mode in which functions of duals are followed, and nothing asks for a gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if Dual in types:
            return follow(func, args, kwargs or {})
        if func is Tensor.requires_grad_:
            return args[0]  # a graph of constants would hold all their activations
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> DualPass:
        # A function with a backward of its own would run its body on duals, although its derivative
        # is the one that it declares. All such functions pass their arguments through here.
        utils: Any = torch._functorch.utils
        self._own = own = utils.unwrap_dead_wrappers

        def refuse(given: tuple[Any, ...]) -> Any:
            if any(isinstance(x, Dual) for x in given):
                raise NoRuleError("a function with a derivative of its own")
            return own(given)

        utils.unwrap_dead_wrappers = refuse
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        utils: Any = torch._functorch.utils
        utils.unwrap_dead_wrappers = self._own


class DualFunctions(TorchFunctionMode):
    """A mode in which the rules below serve their functions in the framework's forward mode.

    `no_grad` drops tangents in this mode, too. Reverse mode takes results that were computed under
    `no_grad` as constant; forward mode by itself does not, and the two engines would differ.
    `requires_grad_`, of which forward mode knows nothing, does nothing.

    Args:
        served: the rules by function; a rule returns None where it does not serve a call. None:
            the rules below.
    """

    def __init__(self, served: Mapping[Any, Callable[..., Tensor | None]] | None = None) -> None:
        super().__init__()
        self.served = _SERVED if served is None else served

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        elif func is Tensor.requires_grad_:
            return args[0]  # asked for by checkpointing, where nothing below it can be trained
        elif func in self.served:
            served = self.served[func](*args, **kwargs)
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
    if max_norm is not None:
        return None
    return Embedding(None if padding_idx is None else padding_idx % len(weight))(input, weight)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if len(normalized_shape) > 1 or in_autocast(input.device.type):
        return None
    return LayerNorm(eps)(input, weight, bias)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    """A linear layer as GPT-2 writes it."""
    if beta != 1 or alpha != 1 or input.shape != mat2.shape[1:]:
        return None
    return Linear()(*_cast(mat1, mat2.T, input))


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Any,
) -> Tensor | None:
    # All options arrive here, given or not.
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
    """The tensors that autocast, where it is on, multiplies in place of these."""
    device = next(x for x in tensors if x is not None).device.type
    if not in_autocast(device):
        return tensors
    dtype, kept = torch.get_autocast_dtype(device), (torch.bool, torch.float64)
    return tuple(x if x is None or x.dtype in kept else x.to(dtype) for x in tensors)


_SERVED: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.cross_entropy: _cross_entropy,
    F.scaled_dot_product_attention: _attention,
}


def _served(serve: Callable[..., Tensor | None]) -> Callable[..., Any]:
    def by_rule(*args: Any, **kwargs: Any) -> Any:
        out = serve(*args, **kwargs)
        return NotImplemented if out is None else out

    return by_rule


for _function, _serve in _SERVED.items():
    rule(_function)(_served(_serve))
