"""Trainings that the user interrupts, or that a callback stops."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from transformers import TrainerCallback

from geffect_fast.integrations import GEffectCallback


class StopAtThree(TrainerCallback):
    """A callback that stops a training after its third update."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@contextmanager
def interrupted_at(step):
    """Interrupt trainings with Ctrl-C after this many updates, before the updates are probed."""
    measure = GEffectCallback.on_step_end

    def stopped(self, args, state, *more, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt
        return measure(self, args, state, *more, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GEffectCallback, "on_step_end", stopped)
        yield
