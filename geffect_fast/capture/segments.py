"""Which rows of a module's input belong to which sample, or to which token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from geffect_fast.errors import UnsupportedModelError


@dataclass(frozen=True)
class Segments:
    """The sample axis of one forward pass.

    Packed: every entry of `token_offsets` is one way of counting tokens (all of them; those whose
    logits are kept), as `(n_samples + 1,)` offsets. Rectangular: `rows_per_sample` neighbouring
    rows of the input a sample, `length` tokens each. With `per_token` every token counts as a
    sample of its own, which is how effects are resolved by position.

    Attributes:
        n_samples: number of samples, or of tokens.
        token_offsets: int64 offsets on the CPU, empty for a rectangular batch.
        rows_per_sample: sequences a sample in a rectangular batch.
        length: tokens a sequence in a rectangular batch; None where it is not known or packed.
        per_token: whether every token is a segment.
    """

    n_samples: int
    token_offsets: tuple[Tensor, ...] = ()
    rows_per_sample: int = 1
    length: int | None = None
    per_token: bool = False

    @classmethod
    def packed(cls, cu: Tensor, kept: Tensor | None = None) -> Segments:
        """Samples laid end to end in one row of tokens.

        Args:
            cu: `(n_samples + 1,)` offsets of the samples among the tokens.
            kept: ascending positions of the tokens whose logits are asked for, where not all are.
        """
        offsets = cu.detach().to("cpu", torch.int64)
        if kept is None:
            return cls(offsets.numel() - 1, (offsets,))
        among_kept = torch.searchsorted(kept.detach().to("cpu", torch.int64), offsets)
        return cls(offsets.numel() - 1, (offsets, among_kept))

    @classmethod
    def rectangular(cls, shape: Sequence[int], rows_per_sample: int = 1) -> Segments:
        """Samples as whole rows of an input of `shape`, `(n_rows, length, ...)` or `(n_rows,)`."""
        length = shape[1] if len(shape) > 1 else None
        return cls(shape[0] // rows_per_sample, rows_per_sample=rows_per_sample, length=length)

    @classmethod
    def tokens(cls, shape: Sequence[int], kept: Tensor | None = None) -> Segments:
        """Every token of an input of `shape` `(n_rows, length)` by itself; `kept` as in `packed`.

        One row is taken for packed samples.
        """
        n_rows, length = shape
        if n_rows == 1:
            return replace(cls.packed(torch.arange(length + 1), kept), per_token=True)
        return cls(n_rows * length, length=length, per_token=True)

    @property
    def n_rows(self) -> int:
        """Rows of the model's input: 1 where samples are packed into one."""
        if self.token_offsets:
            return 1
        if self.per_token:
            assert self.length is not None
            return self.n_samples // self.length
        return self.n_samples * self.rows_per_sample

    def rows(self, shape: Sequence[int], where: str) -> Tensor:
        """Offsets `(n_samples + 1,)` int32 of the samples among the flattened rows of `shape`.

        Args:
            shape: all axes of a module's input but the feature axis.
            where: the module's name, for the error.

        Raises:
            UnsupportedModelError: the rows cannot be told apart by sample (a router sent tokens
                elsewhere, axes were swapped); such a model is run one sample at a time.
        """
        shape = tuple(shape)
        if self.n_samples == 1:
            return torch.tensor([0, prod(shape)], dtype=torch.int32)
        offsets = self._packed(shape) if self.token_offsets else self._rectangular(shape)
        if offsets is None and self.per_token:
            raise UnsupportedModelError(
                f"module '{where}' was called with rows of shape {shape}, which cannot be told "
                f"apart by position ({self.n_samples} tokens in the batch); freeze it, or resolve "
                "without 'position'"
            )
        if offsets is None:
            raise UnsupportedModelError(
                f"module '{where}' was called with rows of shape {shape}, which cannot be told "
                f"apart by sample ({self.n_samples} samples in the batch); run it one sample at a "
                "time"
            )
        return offsets.to(torch.int32)

    def _packed(self, shape: tuple[int, ...]) -> Tensor | None:
        if not shape:
            return None
        by_total = {int(o[-1]): o for o in reversed(self.token_offsets)}
        total = int(self.token_offsets[0][-1])
        axis = next((k for k, size in enumerate(shape) if size != 1), len(shape) - 1)
        size, behind = shape[axis], shape[axis + 1 :]
        # A later axis of that size (as many heads as tokens) could be the token axis as well.
        if size not in by_total or size in behind or total in behind:
            return None
        return by_total[size] * prod(behind)

    def _rectangular(self, shape: tuple[int, ...]) -> Tensor | None:
        n_rows = self.n_rows
        if self.per_token:
            # Both (n_rows, length, ...) and (n_rows * length, ...) are tokens in order.
            n_axes = 2 if shape[:2] == (n_rows, self.length) else 1
            behind = shape[n_axes:]
            if prod(shape[:n_axes]) != self.n_samples or self.length in behind:
                return None
            return torch.arange(self.n_samples + 1) * prod(behind)
        starts = torch.arange(self.n_samples + 1) * self.rows_per_sample
        if shape and shape[0] == n_rows:
            return starts * prod(shape[1:])
        if self.length is not None and shape and shape[0] == n_rows * self.length:
            return starts * (self.length * prod(shape[1:]))
        return None


def offsets_of(lengths: Tensor) -> Tensor:
    """Lengths `(n,)` of consecutive segments as their offsets `(n + 1,)`."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def segment_sum(values: Tensor, cu: Tensor) -> Tensor:
    """Sums of consecutive rows, `(rows, ...)` to `(n, ...)`, in fp64 and in a fixed order."""
    lengths = cu.to(values.device, torch.int64).diff()
    values = values.double()
    if values.is_cpu:  # there the order is fixed, and many times faster
        out = values.new_zeros(lengths.numel(), *values.shape[1:])
        return out.index_add_(0, torch.repeat_interleave(lengths), values)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0)
