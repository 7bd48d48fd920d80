"""What goes into a module and comes out of it."""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

REPLAYING: ContextVar[bool] = ContextVar("REPLAYING", default=False)
"""Set while a module is run once more for its vjp: no recorder may take that for a call."""


@dataclass(slots=True)
class Inputs:
    """What a module was called with, and under which autocast.

    Attributes:
        args, kwargs: the arguments, tensors detached.
        tensors: those among them.
        versions: of the tensors, to notice that one was changed in place.
        autocast: device type, dtype; None where autocast was off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    versions: list[int]
    autocast: tuple[str, torch.dtype] | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            tensors = [args[0].detach()]  # most calls, and pytrees take a while
            args = (tensors[0],)
        else:
            leaves, structure = tree_flatten((args, kwargs))
            leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            args, kwargs = tree_unflatten(leaves, structure)
        kind = tensors[0].device.type if tensors else "cpu"
        on = torch.is_autocast_enabled(kind)
        autocast = (kind, torch.get_autocast_dtype(kind)) if on else None
        return cls(args, kwargs, tensors, [version_of(x) for x in tensors], autocast)

    def changed(self) -> bool:
        """Whether a tensor has been written to since; a detached one shares its version."""
        return [version_of(x) for x in self.tensors] != self.versions

    def precision(self) -> Any:
        """The autocast of the call, to run something again as it ran then."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.autocast[0], self.autocast[1], cache_enabled=False)


NOTHING = Inputs((), {}, [], [], None)


def version_of(x: Tensor) -> int:
    """How often the memory of `x` has been written to; 0 where nobody counts."""
    return 0 if x.is_inference() else x._version


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in what a module returned, in order."""
    leaves = (output,) if isinstance(output, Tensor) else tree_leaves(output)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]
