"""The inputs of a module's call, and the tensors among its outputs."""

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
    """The arguments of a module's call, and the autocast around it.

    Attributes:
        args, kwargs: the arguments, tensors detached.
        tensors: the tensors among the arguments.
        versions: version of each tensor at the call, to notice that one was changed in place.
        autocast: device type and dtype; None where autocast was off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    versions: list[int]
    autocast: tuple[str, torch.dtype] | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            tensors = [args[0].detach()]  # the most common call; pytrees take a while
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
        """Whether a tensor was written to since the call; detached tensors share their version."""
        return [version_of(x) for x in self.tensors] != self.versions

    def precision(self) -> Any:
        """A context with the autocast of the call, in which the module runs as in the call."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.autocast[0], self.autocast[1], cache_enabled=False)


NOTHING = Inputs((), {}, [], [], None)


def version_of(x: Tensor) -> int:
    """Number of writes to the memory of `x`; 0 for inference tensors, whose writes go uncounted."""
    return 0 if x.is_inference() else x._version


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a module's output, in order."""
    leaves = (output,) if isinstance(output, Tensor) else tree_leaves(output)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]
