"""What goes into a module and comes out of it, and what makes that useless for gradients."""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from geffect_fast.capture.samples import Segments
from geffect_fast.errors import InputError

REPLAYING: ContextVar[bool] = ContextVar("REPLAYING", default=False)
"""Set while a module is run once more for its vjp: no recorder may take that for a call."""


@dataclass(slots=True)
class Given:
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
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
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


NOTHING = Given((), {}, [], [], None)


def version_of(x: Tensor) -> int:
    """How often the memory of `x` has been written to; 0 where nobody counts."""
    return 0 if x.is_inference() else x._version


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in what a module returned, in order."""
    leaves = (output,) if isinstance(output, Tensor) else tree_leaves(output)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def broadcast_ids(module: nn.Module, args: tuple[Any, ...], segments: Segments) -> tuple[Any, ...]:
    """Position ids `(1, length)` shared by several sequences, given to each of them."""
    if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
        ids, n, length = args[0], segments.n_rows, segments.length or 0
        # A single one may be anything, such as the one distance within a sample of one token.
        if n > 1 and length > 1 and ids.shape == (1, length):
            return (ids.expand(n, length), *args[1:])
    return args


def check_is_model(model: object, what: str = "model") -> None:
    """Raise `InputError` where `what` is something else, such as the path of a model."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{what}: expected a loaded model, got {type(model).__name__}; load it with "
            "transformers' AutoModelForCausalLM.from_pretrained"
        )


def mixing_module(model: nn.Module) -> str | None:
    """The first module whose gradients are random or depend on other samples, why, and what to do.

    None where there is no such module.
    """
    for name, module in model.named_modules():
        where = f"'{name or type(module).__name__}'"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            return f"{where} normalises over the samples of a batch; call model.eval() first"
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            return f"{where} scales gradients by the ids of other samples; unset scale_grad_by_freq"
        if not module.training:
            continue
        rates = {k: v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        if any(rate > 0 for rate in rates.values()):
            return (
                f"{where} is in train mode with active dropout, so gradients would be random; "
                "call model.eval() first"
            )
    return None
