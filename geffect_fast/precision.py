"""The precisions that a model computes in, and the one that sums are taken in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

COARSEST_FIRST = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Precisions by their range, the shortest first: fp16 rounds less than bf16, but its range is
shorter."""


def precisions(model: nn.Module) -> set[torch.dtype]:
    """The precisions that a model computes in: those of all its weights, and that of autocast."""
    parameters = list(model.parameters())
    dtypes = {p.dtype for p in parameters if p.dtype in COARSEST_FIRST}
    for kind in {p.device.type for p in parameters}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    return dtypes


def widened(x: Tensor) -> Tensor:
    """`x` in fp32 where it is of lower precision: sums are never taken in bf16 or fp16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
