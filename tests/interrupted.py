"""A training that the user interrupts."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from geffect_fast.integrations import GEffectCallback


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
