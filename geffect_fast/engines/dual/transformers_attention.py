"""The attention of transformers' models among duals, with sequences side by side (`packing`).

transformers looks its attention up by name, and builds a mask between all tokens of a batch for the
names that it has masks for. Under names of this package, transformers hands a layer's attention to
the functions below, which run the same attention on the sequences of a group, instead of on all
tokens in a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from geffect_fast.engines.dual.packing import PACKING, Packing
from geffect_fast.engines.dual.tensor import NoRuleError
from geffect_fast.engines.model_outputs import attention_configs, reach

SDPA, EAGER = "geffect_fast_dual_sdpa", "geffect_fast_dual_eager"
"""Names of the functions below. The first has no masks, the second has those of eager."""


@contextmanager
def attention_apart(model: nn.Module, packing: Packing | None) -> Iterator[None]:
    """Inside, models that take their attention from transformers' table attend by group.

    Where a window cuts sequences short, sdpa gets its mask from transformers, and the rule for sdpa
    cuts the mask up.

    Args:
        model: the model, whose configs are restored at the end.
        packing: the batch's packing; None: the batch is not packed, and the model runs as it is.
    """
    configs = [] if packing is None else attention_configs(model)
    chosen = {config._attn_implementation for config in configs}
    name = None
    if packing is not None and chosen == {"sdpa"} and packing.longest <= reach(configs):
        name = SDPA
    elif chosen == {"eager"}:
        name = EAGER
    if name is None:
        yield
        return
    _register()
    (before,) = chosen
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config in configs:
            config._attn_implementation = before


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if SDPA not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(SDPA, _sdpa)
        ALL_ATTENTION_FUNCTIONS.register(EAGER, _eager)
        ALL_MASK_ATTENTION_FUNCTIONS.register(EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Any, None]:
    """transformers' own sdpa, group by group.

    Causal attention needs no mask of the padding, which lies behind all tokens that count.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    packing, attend = PACKING.get(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    if packing is None or mask is not None or query.shape[2] != len(packing.place):
        raise NoRuleError("attention over other tokens than the batch's")

    def group(q: Any, k: Any, v: Any, number: int) -> Any:
        hidden = None if causal else packing.groups[number].hidden
        own = None if hidden is None else ~hidden
        return attend(module, q, k, v, own, **kwargs)[0].transpose(1, 2)

    return packing.apart(query, key, value, group).transpose(1, 2), None


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Any, Any]:
    """The eager attention of the model's own file, group by group."""
    packing = PACKING.get()
    attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if attend is None:
        raise NoRuleError(f"{type(module).__name__} has attention of its own")
    if packing is None or mask is None or not packing.masks(mask):
        return attend(module, query, key, value, mask, **kwargs)

    def group(q: Any, k: Any, v: Any, number: int) -> Any:
        own = packing.block(mask, number)
        return attend(module, q, k, v, own, **kwargs)[0].transpose(1, 2)

    return packing.apart(query, key, value, group).transpose(1, 2), None
