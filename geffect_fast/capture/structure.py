"""A model without its weights, as the first rank sends it to the others; weights follow by groups.

The model itself is sent, pickled, with its config, adapters, buffers, everything else that its
modules hold, and which modules share a parameter. Only the values of parameters are left out:
parameters arrive on the device `meta`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn

from geffect_fast.errors import InputError, in_one_line
from geffect_fast.ranks import Ranks


def structure_of(model: nn.Module, what: str = "model") -> bytes:
    """A model without its weights, as bytes that `pickle.loads` makes a model again.

    Args:
        model: a model on the CPU.
        what: the name of the model in messages.

    Raises:
        InputError: a module holds something that cannot be sent.
    """
    held = io.BytesIO()
    try:
        _WithoutWeights(held).dump(model)
    except Exception as error:  # objects that modules hold may raise any error
        raise InputError(
            f"{what}: it cannot be sent to other ranks ({in_one_line(error)}); give each the whole "
            "(--shard none)"
        ) from error
    return held.getvalue()


class _WithoutWeights(pickle.Pickler):
    def reducer_override(self, held: Any) -> Any:
        if isinstance(held, nn.Parameter):
            return _weightless, (held.shape, held.dtype, held.requires_grad)
        return NotImplemented


def _weightless(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad)


@torch.no_grad()
def receive_weights(group: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Give a group of modules the first rank's weights, whole, in place; parts stay as they are.

    Args:
        group: the same modules on all ranks; only the first rank has weights.
        ranks: all ranks.
        device: the device that will hold this rank's weights.
    """
    from torch.distributed.tensor import DTensor

    for p in group.parameters():
        if isinstance(p, DTensor):
            continue
        if ranks.first:
            p.data = p.data.to(device).contiguous()  # as on other ranks, and as FSDP needs it
            ranks.send(p.data)
        else:
            weights = torch.empty_like(p, device=device)
            ranks.send(weights)
            torch.utils.swap_tensors(p, nn.Parameter(weights, p.requires_grad))
