"""Which tensors hold a NaN or an infinity, asked of a device once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geffect_fast.transfer import OnItsWay


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor, of any floating-point dtype, shape and device, is finite throughout."""
    found = [True] * len(tensors)
    for device in {x.device for x in tensors}:
        own = [i for i, x in enumerate(tensors) if x.device == device and x.numel() > 0]
        if own:
            # The largest size, in one pass: NaN where there is one.
            sizes = torch._foreach_norm([tensors[i] for i in own], torch.inf)
            (read,) = OnItsWay(torch.stack(sizes)).arrived()
            for i, good in zip(own, torch.isfinite(read).tolist(), strict=True):
                found[i] = good
    return found
