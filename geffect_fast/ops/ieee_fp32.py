"""A context in which computations in fp32 keep all their bits, whatever torch's switches say.

`torch.set_float32_matmul_precision("high")` lets matrix products of fp32 numbers drop 13 of 23 bits
(TF32 on GPUs, bf16 on some CPUs), and convolutions on GPUs do so by default. A training step bears
this loss. A gradient effect does not, as it is often a small difference of large terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import backends

_inside: ContextVar[bool] = ContextVar("ieee_fp32", default=False)

_CUDA: Any = backends.cuda
_CUDNN: Any = backends.cudnn
_MKLDNN: Any = backends.mkldnn
_MATRIX = (_CUDA.matmul, _MKLDNN.matmul)
_KEEPING = {"ieee", "none"}
_SWITCHES = (*_MATRIX, _CUDNN.conv, _CUDNN.rnn, _MKLDNN.conv, _MKLDNN.rnn)
"""torch's switches; a switch that is "none" follows the more general switch above it."""


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Inside, no product or convolution of fp32 numbers drops bits; switches are put back after."""
    if _inside.get():
        yield
        return
    before = [switch.fp32_precision for switch in _SWITCHES]
    products, convolutions = _older_switches()
    token = _inside.set(True)
    try:
        # The older switches first: each sets some of the others, and must agree with them.
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for switch in _SWITCHES:
            switch.fp32_precision = "ieee"
        yield
    finally:
        _inside.reset(token)
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for switch, value in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = "none"
            if switch.fp32_precision != value:
                switch.fp32_precision = value


def products_are_ieee() -> bool:
    """Whether matrix products of fp32 numbers keep all bits here."""
    return _inside.get() or {each.fp32_precision for each in _MATRIX} <= _KEEPING


def _older_switches() -> tuple[str | None, bool | None]:
    """The values of torch's older switches; None where torch refuses, as newer ones contradict."""
    products, convolutions = None, None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = backends.cudnn.allow_tf32
    return products, convolutions
