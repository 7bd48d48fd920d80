"""Segments: the rows of a module's input that belong to each sample, or to each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.ops import backend
from geffect_fast.ops.checks import check_cu_seqlens
from geffect_fast.precision import widened
from geffect_fast.transfer import on_device


@dataclass(frozen=True)
class Offsets:
    """Offsets `0 = c_0 <= c_1 <= ... <= c_n` of n consecutive segments.

    Attributes:
        host: the n + 1 numbers.
    """

    host: tuple[int, ...]
    _moved: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Offsets:
        """Offsets of consecutive segments of these lengths."""
        total, host = 0, [0]
        for length in lengths:
            host.append(total := total + length)
        return cls(tuple(host))

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.host) - 1

    def on(self, device: torch.device) -> Tensor:
        """The offsets, `(n + 1,)` int32, on `device`."""
        if device not in self._moved:
            self._moved[device] = on_device(torch.tensor(self.host, dtype=torch.int32), device)
        return self._moved[device]

    @cached_property
    def lengths(self) -> list[int]:
        """The length of every segment."""
        return [end - start for start, end in pairwise(self.host)]

    @cached_property
    def one_length(self) -> int | None:
        """The one length of all segments; None where lengths differ or segments are empty."""
        lengths = set(self.lengths)
        return (lengths.pop() or None) if len(lengths) == 1 else None

    def __getitem__(self, i: int) -> slice:
        """The rows of segment `i`."""
        return slice(self.host[i], self.host[i + 1])

    def __iter__(self) -> Iterator[slice]:
        """The rows of each segment in turn."""
        return (slice(start, end) for start, end in pairwise(self.host))


def checked_offsets(cu_seqlens: Any, n_tokens: int | None) -> Tensor:
    """Offsets of samples packed into one row, on the CPU.

    Args:
        cu_seqlens: `(n_samples + 1,)` ascending integers from 0, a tensor or a list.
        n_tokens: the end of the last sample; None: not known.

    Raises:
        InputError: `cu_seqlens` holds no such offsets.
    """
    try:
        offsets = torch.as_tensor(cu_seqlens).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"batch: `cu_seqlens` is of type {type(cu_seqlens).__name__}; give "
            "(n_samples + 1,) offsets, such as [0, 5, 9]"
        ) from None
    end = n_tokens if n_tokens is not None or offsets.dim() != 1 else int(offsets[-1:].sum())
    check_cu_seqlens("batch", "cu_seqlens", offsets, end or 0, offsets.device)
    return offsets


@dataclass(frozen=True)
class Rows:
    """The layout of a tensor's rows `(..., d)`: rows of one sample are neighbours in `flat(x)`.

    Attributes:
        cu: offsets of the samples among the rows of `flat(x)`.
        axis, front: the axis of the tokens, and the place it is moved to before axes are merged. It
            moves in `(batch, heads, tokens, d)` and stays in `(batch, tokens, heads, d)`.
    """

    cu: Offsets
    axis: int = 0
    front: int = 0

    def flat(self, x: Tensor) -> Tensor:
        """`x` as `(rows, d)`."""
        if self.axis != self.front:
            x = x.movedim(self.axis, self.front)
        return x.reshape(-1, x.shape[-1])

    def only(self, x: Tensor, i: int) -> Tensor:
        """`x` with the rows of every sample but `i` set to zero."""
        if len(self.cu) == 1:
            return x
        moved = x.movedim(self.axis, self.front)
        kept = torch.zeros_like(moved, memory_format=torch.contiguous_format)
        kept.view(-1, x.shape[-1])[self.cu[i]] = self.flat(x)[self.cu[i]]
        return kept.movedim(self.front, self.axis)


@dataclass(frozen=True)
class Segments:
    """The sample axis of one forward pass.

    In a packed batch every entry of `token_offsets` is one way of counting tokens (all of them, or
    those whose logits are kept), as `(n_samples + 1,)` offsets. In a rectangular batch a sample has
    `rows_per_sample` neighbouring rows of the input, with `length` tokens each. With `per_token`
    every token counts as a sample of its own, which is how effects are resolved by position.

    Attributes:
        n_samples: number of samples, or of tokens.
        token_offsets: the samples' offsets, empty for a rectangular batch.
        rows_per_sample: sequences of one sample in a rectangular batch.
        length: tokens of one sequence in a rectangular batch; None where the length is not known,
            and in a packed batch.
        per_token: whether every token is a segment.
    """

    n_samples: int
    token_offsets: tuple[Offsets, ...] = ()
    rows_per_sample: int = 1
    length: int | None = None
    per_token: bool = False
    _certain: dict[tuple[int, ...], Rows] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Answers of `rows` that are the same for every module; modules are called with few shapes."""
    _placed: dict[tuple[int, ...], Rows] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The rows of a shape where its tokens lie along an axis, the last number of the key."""

    @classmethod
    def packed(cls, cu: Tensor, kept: Tensor | None = None) -> Segments:
        """Samples laid end to end in one row of tokens.

        Args:
            cu: `(n_samples + 1,)` offsets of the samples among the tokens, on the CPU.
            kept: ascending positions of the tokens whose logits are asked for, on the CPU; None:
                all tokens.
        """
        offsets = Offsets(tuple(cu.tolist()))
        if kept is None:
            return cls(len(offsets), (offsets,))
        among_kept = torch.searchsorted(kept, cu.to(kept.dtype))
        return cls(len(offsets), (offsets, Offsets(tuple(among_kept.tolist()))))

    @classmethod
    def rectangular(cls, shape: Sequence[int], rows_per_sample: int = 1) -> Segments:
        """Samples as whole rows of an input of `shape`, `(n_rows, length, ...)` or `(n_rows,)`."""
        length = shape[1] if len(shape) > 1 else None
        return cls(shape[0] // rows_per_sample, rows_per_sample=rows_per_sample, length=length)

    @classmethod
    def tokens(cls, shape: Sequence[int], kept: Tensor | None = None) -> Segments:
        """Every token of an input of `shape` `(n_rows, length)` as a sample; `kept` as in `packed`.

        An input of one row counts as packed.
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

    def axes_alike(self, shape: Sequence[int]) -> tuple[tuple[bool, ...], ...]:
        """Flags for each axis of a shape: the batch's own numbers that the axis equals.

        `rows` goes by nothing else.
        """
        totals = {o.host[-1] for o in self.token_offsets}
        own = (1, self.n_samples, self.n_rows, self.length, self.n_rows * (self.length or 1))
        return tuple((*(size == k for k in own), size in totals) for size in shape)

    def rows(
        self, shape: Sequence[int], where: str, known: dict[tuple[str, int], int] | None = None
    ) -> Rows:
        """The layout of a tensor's rows, by its axes without the last one, that of features.

        Args:
            shape: all axes of a module's input or output but the feature axis.
            where: the module's name, for the error.
            known: the axis of the tokens, by module and number of axes. It is learned here from
                batches where its size leaves no doubt, and used where another axis is as large.

        Raises:
            UnsupportedModelError: the rows cannot be told apart by sample (a router sent tokens
                elsewhere, axes were swapped); such a model is run one sample at a time.
        """
        shape = tuple(shape)
        known = {} if known is None else known
        place = (where, len(shape))
        rows = self._certain.get(shape)
        if rows is None:
            axis, front = (0, 0) if self.n_samples == 1 else self._axis(shape)
            certain = axis is not None
            axis = axis if certain else known.get(place)
            if axis is None:
                raise self._mixed(shape, where)
            key = (*shape, axis)
            rows = self._placed.get(key)
            if rows is None:
                offsets = self._offsets(shape, axis)
                if offsets is None:
                    raise self._mixed(shape, where)
                rows = self._placed[key] = Rows(offsets, axis, front)
            if not certain:
                return rows
            self._certain[shape] = rows
        if self.n_samples > 1:
            known[place] = rows.axis
        return rows

    def _mixed(self, shape: tuple[int, ...], where: str) -> UnsupportedModelError:
        rows = f"module '{where}' was called with rows of shape {shape}, which cannot be told apart"
        if self.per_token:
            return UnsupportedModelError(
                f"{rows} by position ({self.n_samples} tokens in the batch); freeze it, or resolve "
                "without 'position'"
            )
        return UnsupportedModelError(
            f"{rows} by sample ({self.n_samples} samples in the batch); run it one sample at a time"
        )

    def _axis(self, shape: tuple[int, ...]) -> tuple[int | None, int]:
        """The axis of the tokens, None where its size leaves doubt, and the place to move it to.

        In a batch of whole sequences it is the first axis, that of the sequences.
        """
        if not shape:
            return None, 0
        if self.token_offsets:
            front = next((k for k, size in enumerate(shape) if size != 1), len(shape) - 1)
            sizes = {o.host[-1] for o in self.token_offsets}
            n_tokens = self.token_offsets[0].host[-1]
        elif self.per_token and self.length is not None:
            front = int(len(shape) > 1 and shape[0] == self.n_rows)
            sizes = {self.length if front else self.n_samples}
            n_tokens = self.length
        else:
            return (0 if self._fits(shape, 0) else None), 0
        found = [k for k, size in enumerate(shape) if k >= front and size in sizes]
        if found[:1] != [front]:
            return (found[0] if len(found) == 1 else None), front
        # A later axis of the same size (as many heads as tokens) could be the token axis as well.
        # An axis as large as the number of kept tokens could not, behind an axis of all tokens.
        behind = shape[front + 1 :]
        return (None if shape[front] in behind or n_tokens in behind else front), front

    def _offsets(self, shape: tuple[int, ...], axis: int) -> Offsets | None:
        """The samples' offsets where they lie along `axis`, None where they do not."""
        if self.n_samples == 1:
            return Offsets((0, prod(shape)))
        if self.token_offsets:
            by_total = {o.host[-1]: o for o in reversed(self.token_offsets)}
            size = shape[axis]
            if size not in by_total:
                return None
            each = prod(shape) // size
            return Offsets(tuple(each * offset for offset in by_total[size].host))
        if not self._fits(shape, axis):
            return None
        each = prod(shape) // self.n_samples
        return Offsets(tuple(each * i for i in range(self.n_samples + 1)))

    def _fits(self, shape: tuple[int, ...], axis: int) -> bool:
        """Whether the sequences of an unpacked batch, or their tokens, lie along `axis`."""
        size = shape[axis]
        if self.per_token and axis > 0:
            return shape[0] == self.n_rows and size == self.length
        if self.per_token:
            return size == self.n_samples
        return axis == 0 and size in (self.n_rows, self.n_rows * (self.length or 1))


def segment_product(x: Tensor, y: Tensor, cu: Offsets) -> Tensor:
    """Sums of consecutive rows of `x * y`, `(rows, d)` each, to `(n, d)` fp64, in a fixed order."""
    x, y = widened(x), widened(y)
    op = "segment_product"
    if x.is_cpu and x.dtype == y.dtype and backend.has_native(op, "cpu"):
        return backend.call(op, x.device, x, y, cu.on(x.device)).double()
    return segment_sum(x * y, cu)


def segment_sum(values: Tensor, cu: Offsets) -> Tensor:
    """Sums of consecutive rows, `(rows, ...)` to `(n, ...)` fp64, in a fixed order.

    Sums are taken in fp64, except for segments of one length on a CPU. There torch adds in blocks,
    which in fp32 rounds no worse than once or twice, and takes a quarter of the time.
    """
    if values.is_cpu and cu.one_length is not None:
        each = widened(values).reshape(len(cu), cu.one_length, *values.shape[1:])
        return each.sum(1).double()
    return sum_between(values, cu.on(values.device))


def sum_between(values: Tensor, offsets: Tensor) -> Tensor:
    """`segment_sum` with offsets, `(n + 1,)`, that only the device knows."""
    lengths, values = offsets.long().diff(), values.double()
    if values.is_cpu:  # `index_add_` has a fixed order there, and is many times faster
        out = values.new_zeros(lengths.numel(), *values.shape[1:])
        return out.index_add_(0, torch.repeat_interleave(lengths), values)
    # `unsafe`: without it torch waits for the device to see that the lengths add up, as they do.
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
