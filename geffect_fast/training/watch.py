"""What happens between the updates of an unlearning run, beside the probes themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from geffect_fast.steps.probe import Probe
from geffect_fast.storage.disk import remove
from geffect_fast.training.resume import checkpoints

if TYPE_CHECKING:
    import xarray as xr

Told = Callable[[int, "xr.Dataset"], None]
"""Told of the step and the result of a probe."""


class Watch(TrainerCallback):
    """Tells of updates and probes, asks for checkpoints, and removes those before the last.

    It stands behind the callback that probes.

    Args:
        probe: what that one measures with.
        folder: of the run, with its checkpoints; None: there are none.
        removes: whether this process removes them, as one of several does.
        save_every: updates between two checkpoints.
        keep: whether earlier checkpoints stay.
        told: of every probe.
        tick: told how many updates are done.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        folder: Path | None,
        save_every: int,
        keep: bool,
        removes: bool,
        told: Told,
        tick: Callable[[int], Any],
    ) -> None:
        self._probe = probe
        self._folder = folder
        self._save_every = save_every
        self._goes = removes and not keep
        self._told = told
        self._tick = tick

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the probe before the first update, or that a resumed run begins with."""
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the update and its probe, and ask for the checkpoint."""
        step = state.global_step
        self._look(step)
        if self._folder is not None and (step % self._save_every == 0 or step == state.max_steps):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is complete; those before it may go."""
        if self._folder is not None and self._goes:
            for step, folder in checkpoints(self._folder, self._probe.store.identity).items():
                if step < state.global_step:
                    remove(folder)

    def _look(self, step: int) -> None:
        self._tick(step)
        if self._probe.latest is not None and self._probe.latest[0] == step:
            self._told(*self._probe.latest)
