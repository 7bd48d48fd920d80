"""A model without its weights, as the first rank sends it to the others; weights come by groups.

What is sent is the model itself, pickled: its config, adapters, buffers and whatever else its
modules hold, and which of them share a parameter. Parameters alone are left out, and are on the
device `meta` where it arrives.
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
    """A model without its weights; `pickle.loads` makes it one again.

    Args:
        model: on the CPU.
        what: what messages call it.

    Raises:
        InputError: a module of it holds what cannot be sent.
    """
    held = io.BytesIO()
    try:
        _WithoutWeights(held).dump(model)
    except Exception as error:  # whatever its modules hold has errors of its own
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
        group: the same modules on all ranks; on others than the first without weights.
        ranks: all of them.
        device: where this rank's weights will be.
    """
    from torch.distributed.tensor import DTensor

    for p in group.parameters():
        if isinstance(p, DTensor):
            continue
        if ranks.first:
            p.data = p.data.to(device).contiguous()  # as the others', and as FSDP needs it
            ranks.send(p.data)
        else:
            weights = torch.empty_like(p, device=device)
            ranks.send(weights)
            torch.utils.swap_tensors(p, nn.Parameter(weights, p.requires_grad))
