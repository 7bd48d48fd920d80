"""A benchmark's case, its candidates, and a maker of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Any, ...]


class Candidate(NamedTuple):
    """One way to compute an op: `run(*prepare(*inputs))`, with environment variables set."""

    run: Callable[..., Any]
    prepare: Callable[..., Inputs] = lambda *inputs: inputs
    environment: tuple[tuple[str, str], ...] = ()


class Case(NamedTuple):
    """An op at a shape; cases of a smaller `priority` come first."""

    op: str
    shape: str
    dtype: torch.dtype
    n_bytes: float
    flops: float
    make: Callable[[int], Inputs]
    candidates: dict[str, Candidate]
    input_bytes: float
    priority: int


class Maker:
    """A maker of inputs on a device; `shrink` divides all sizes, to try the script on a CPU."""

    def __init__(self, device: torch.device, shrink: int = 1) -> None:
        self.device = device
        self.shrink = shrink
        self._key: tuple[Any, ...] = ()
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def size(self, full: int) -> int:
        """A size, shrunk."""
        return max(8, full // self.shrink)

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(shape, dtype=dtype, device=self.device)

    def bounds(self, total: int, shortest: int = 20, longest: int = 500) -> list[int]:
        """Offsets of samples of `shortest` to `longest` tokens, the last one cut to fit."""
        total = self.size(total)
        shortest, longest = max(1, shortest // self.shrink), max(2, longest // self.shrink)
        generator = torch.Generator().manual_seed(total)
        found = [0]
        while found[-1] < total:
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            found.append(min(found[-1] + length, total))
        return found

    def offsets(self, bounds: list[int]) -> Tensor:
        """Offsets as the ops take them."""
        return torch.tensor(bounds, dtype=torch.int32, device=self.device)

    def layer(
        self, total: int, d_in: int, d_out: int, n_directions: int, dtype: torch.dtype, seed: int
    ) -> tuple[Tensor, ...]:
        """Inputs, output gradients and directions of a layer, kept for the next case."""
        key = (total, d_in, d_out, n_directions, dtype)
        if key != self._key:
            self._key, self._kept = key, {}
        if seed not in self._kept:
            torch.manual_seed(seed)
            shapes = ((total, d_in), (total, d_out), (n_directions, d_out, d_in))
            self._kept[seed] = tuple(self.randn(*shape, dtype=dtype) for shape in shapes)
        return self._kept[seed]

    def compiled(self, baseline: Candidate) -> Candidate:
        """The candidate compiled by torch.compile for these very sizes."""
        name = "inductor" if self.device.type == "cuda" else "aot_eager"
        return baseline._replace(run=torch.compile(baseline.run, dynamic=False, backend=name))


def forms(variable: str, names: Iterable[str], run: Callable[..., Any]) -> dict[str, Candidate]:
    """The op by its own choice of form, and in every form it can be told to take."""
    chosen = {"ours": Candidate(run)}
    return chosen | {
        f"ours:{name}": Candidate(run, environment=((variable, name),)) for name in names
    }
