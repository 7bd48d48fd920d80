"""Where each sample's rows begin, known on the host and moved to a device once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

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
        """Of segments of these lengths."""
        total, host = 0, [0]
        for length in lengths:
            host.append(total := total + length)
        return cls(tuple(host))

    def __len__(self) -> int:
        """Number of segments."""
        return len(self.host) - 1

    def on(self, device: torch.device) -> Tensor:
        """`(n + 1,)` int32 on `device`."""
        if device not in self._moved:
            self._moved[device] = on_device(torch.tensor(self.host, dtype=torch.int32), device)
        return self._moved[device]

    @cached_property
    def lengths(self) -> list[int]:
        """Of every segment."""
        return [end - start for start, end in pairwise(self.host)]

    @cached_property
    def one_length(self) -> int | None:
        """The length of every segment; None where they differ, or are empty."""
        lengths = set(self.lengths)
        return (lengths.pop() or None) if len(lengths) == 1 else None

    def __getitem__(self, i: int) -> slice:
        """The rows of segment `i`."""
        return slice(self.host[i], self.host[i + 1])

    def __iter__(self) -> Iterator[slice]:
        """The rows of each segment in turn."""
        return (slice(start, end) for start, end in pairwise(self.host))
