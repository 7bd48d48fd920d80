"""Contexts for the train and eval modes of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from geffect_fast.ops.ieee_fp32 import ieee_fp32


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into its train or eval mode after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in eval mode and its fp32 numbers keep all their bits."""
    with modes_kept(model), ieee_fp32():
        model.eval()
        yield
