"""One recorded forward and backward over rows whose losses are known one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import eagerly
from geffect_fast.capture.keys import function_key, model_key
from geffect_fast.capture.plan import Plan
from geffect_fast.capture.recorder import Recorder, Recording, Sink
from geffect_fast.capture.segments import Segments
from geffect_fast.errors import InputError, UnsupportedModelError

LossFn = Callable[[nn.Module, Any], Tensor]
"""Runs a model on a batch and returns `(n_samples,)` losses, each of its own sample only."""


def record_rows(
    plan: Plan,
    loss_fn: LossFn,
    batch: Any,
    axis: Segments,
    sink: Sink,
    recording: Recording,
    key: Hashable = None,
) -> Tensor:
    """Hand the factors of every sample's gradient to `sink`; no weight gradient is formed.

    The first call for a model as it is, a loss function and a structure of calls runs one backward
    more, which shows that rows belong to the samples they are counted for. If ranks share out the
    model, all of them call this function, and all run every pass that any of them needs.

    Args:
        plan: the plan of the model.
        loss_fn: called with the model and `batch`.
        batch: whatever `loss_fn` takes.
        axis: the rows of each sample.
        sink, recording: as `Recorder` takes them.
        key: what to tell loss functions apart by; None: `function_key` of `loss_fn`, which has
            another value for each batch where a function holds more of its batch than tensors.

    Returns:
        The losses `(n_samples,)`, detached.

    Raises:
        InputError: `loss_fn` does not return one loss for each sample.
        UnsupportedModelError: rows that cannot be told apart by sample, or losses that depend on no
            trainable parameter of the model.
    """
    key = function_key(loss_fn) if key is None else key, model_key(plan.model)
    while True:
        recorder = Recorder(plan, sink, axis, recording)
        with plan.frozen(), torch.enable_grad(), recorder:
            with recorder.showing_parameters(), eagerly(plan.model):
                losses = _checked_losses(loss_fn(plan.model, batch), axis)
            leaves = recorder.leaves_of(losses)
            if leaves is None:
                continue
            if not recorder.calls or not losses.requires_grad:
                raise UnsupportedModelError(
                    "loss_fn: the losses depend on no module with trainable parameters; call the "
                    "model that was given"
                )
            structure = tuple(recorder.structure)
            is_open = axis.n_samples > 1 and not plan.learned.is_shown(key, structure)
            if plan.on_any_rank(is_open):
                trial = recorder.weigh(losses, leaves)
                if plan.on_any_rank(recorder.gave_positions):
                    with torch.no_grad():  # without gradients no hook changes anything
                        trial.compare_losses(losses, loss_fn(plan.model, batch))
            torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            recorder.finish()
            if recorder.attribution is not None:
                recorder.attribution.conclude()
                plan.learned.note_shown(key, structure)
            return losses.detach()


def _checked_losses(losses: Any, axis: Segments) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (axis.n_samples,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"loss_fn: must return one loss a sample, shape ({axis.n_samples},), got {got}; "
            "use reduction='none' and reduce over tokens only"
        )
    return losses
