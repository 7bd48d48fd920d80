"""Inner products of a layer's inputs, formed in its forward: all that norms need of them."""

from __future__ import annotations

import torch
from torch import Tensor

from geffect_fast.capture.inputs import version_of
from geffect_fast.capture.samples import Rows
from geffect_fast.ops import backend
from geffect_fast.ops.reference import accumulation_dtype

MOST_TOKENS = 128 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
"""Of a sample whose Gram matrix dot products form best: `kShortTokens` of `ghost_norm.cpp`."""


class InputGrams:
    """Forms the Gram matrices of inputs, once for neighbouring layers that are given the same one.

    In a forward inputs are in the cache still, and need not be kept for the backward.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def of(self, a: Tensor, output: Tensor, rows: Rows) -> Tensor | None:
        """`(sum of T_i^2,)`; None where that is more than the inputs are, or no kernel serves.

        Args:
            a: `(..., d_in)`, inputs of a linear layer, detached.
            output: `(..., d_out)`, what the layer returned.
            rows: how the rows of `a` lie.
        """
        longest = max(rows.cu.lengths, default=0)
        if not a.is_cpu or longest > min(MOST_TOKENS, a.shape[-1], output.shape[-1]):
            return None
        if accumulation_dtype(a.dtype) != accumulation_dtype(output.dtype):
            return None
        if backend.reference_is_forced() or not backend.has_native("token_grams", "cpu"):
            return None
        if self._last is not None:
            last, version, grams = self._last
            # `last` is kept: its memory cannot have become another tensor's.
            seen = last.data_ptr(), last.shape, last.stride(), last.dtype, version
            if seen == (a.data_ptr(), a.shape, a.stride(), a.dtype, version_of(a)):
                return grams
        grams = backend.call("token_grams", a.device, rows.flat(a), rows.cu.on(a.device))
        self._last = a, version_of(a), grams
        return grams
