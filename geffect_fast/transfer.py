"""Copies to a device and back that do not make the host wait for the device.

A copy between a GPU and memory that may be paged out waits for all work before it. A copy through
pinned memory is queued like any kernel, and a reader of the result waits for that copy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, queued there where that is a GPU."""
    if device.type == "cuda" and x.is_cpu:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class OnItsWay:
    """Tensors on their way to the host.

    Args:
        tensors: detached tensors of one device, as they are once all work queued so far is done.

    Examples:
        >>> copy = OnItsWay(effects, values)
        >>> ...  # more work for the device
        >>> effects, values = copy.arrived()
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if not any(x.is_cuda for x in tensors):
            self._host = [x.cpu() for x in tensors]
            return
        self._host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
        for host, x in zip(self._host, tensors, strict=True):
            host.copy_(x, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def arrived(self) -> list[Tensor]:
        """The tensors on the CPU, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


@torch.no_grad()
def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor, of any floating-point dtype, shape and device, is finite throughout."""
    found = [True] * len(tensors)
    for device in {x.device for x in tensors}:
        own = [i for i, x in enumerate(tensors) if x.device == device and x.numel() > 0]
        if not own:
            continue
        # One pass finds the largest size, or NaN where there is one. A GPU takes many tensors at
        # once.
        if device.type == "cpu":
            read = torch.stack([torch.stack(tensors[i].aminmax()).double() for i in own])
        else:
            sizes = torch._foreach_norm([tensors[i] for i in own], torch.inf)
            (read,) = OnItsWay(torch.stack(sizes)[:, None]).arrived()
        for i, good in zip(own, torch.isfinite(read).all(1).tolist(), strict=True):
            found[i] = good
    return found
