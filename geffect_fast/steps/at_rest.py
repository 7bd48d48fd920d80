"""A context in which a model in training can be measured as if it were at rest.

Afterwards the model is as it was before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from geffect_fast.capture.compat import put_to_rest
from geffect_fast.capture.modes import evaluating

_PATCHED = "_original_forward"
"""Attribute in which accelerate keeps the forward that it has wrapped in autocast."""


@contextmanager
def at_rest(model: nn.Module, trainable: Collection[nn.Parameter] | None = None) -> Iterator[None]:
    """Put a model in training to rest for a measurement, and restore its state afterwards.

    Inside the block the model is in eval mode, gradients are enabled, and there is no autocast,
    neither around the model nor, by accelerate, in its forward. Measurements then equal those of
    the saved checkpoint. Afterwards the modes of all modules, `requires_grad`, and the states of
    torch's random generators on the CPU and the model's devices are restored.

    Args:
        model: the model, or a wrapper around it.
        trainable: the parameters that are measured, which alone have `requires_grad` inside the
            block; None leaves `requires_grad` as it is.
    """
    put_to_rest(model)
    asking = [(p, p.requires_grad) for p in model.parameters()]
    measured = {id(p) for p in trainable or ()}
    patched = [m for m in model.modules() if {_PATCHED, "forward"} <= vars(m).keys()]
    forwards = [(module, vars(module)["forward"]) for module in patched]
    kinds = {p.device.type for p, _ in asking}
    devices = {p.device for p, _ in asking if p.device.type == "cuda"}
    try:
        with (
            evaluating(model),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            _no_autocast(kinds),
        ):
            for module in patched:
                module.forward = vars(module)[_PATCHED]
            for p, _ in asking if trainable is not None else ():
                p.requires_grad_(id(p) in measured)
            yield
    finally:
        for p, asks in asking:
            p.requires_grad_(asks)
        for module, forward in forwards:
            module.forward = forward


@contextmanager
def _no_autocast(kinds: Collection[str]) -> Iterator[None]:
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        yield
    finally:
        for kind, enabled in before.items():
            torch.set_autocast_enabled(kind, enabled)
