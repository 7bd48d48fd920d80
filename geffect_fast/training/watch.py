"""A callback for the updates of an unlearning run: progress, probes and checkpoints."""

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

OnProbe = Callable[[int, "xr.Dataset"], None]
"""A function that is called with the step and the result of a probe."""


class Watch(TrainerCallback):
    """A callback that tells of updates and probes, and takes care of checkpoints.

    The callback asks for checkpoints, and removes all but the last. It stands behind the callback
    that probes.

    Args:
        probe: the probe that the other callback measures with.
        folder: folder of the run, with its checkpoints; None: no checkpoints are made.
        removes: whether this process removes checkpoints; one of several ranks does.
        save_every: updates between two checkpoints.
        keep: whether earlier checkpoints stay.
        on_probe: called with the step and the result of every probe.
        tick: called with the number of updates that are done.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        folder: Path | None,
        save_every: int,
        keep: bool,
        removes: bool,
        on_probe: OnProbe,
        tick: Callable[[int], Any],
    ) -> None:
        self._probe = probe
        self._folder = folder
        self._save_every = save_every
        self._removes = removes and not keep
        self._on_probe = on_probe
        self._tick = tick

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the first probe: before the first update, or where a resumed run begins."""
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the update and its probe, and ask for a checkpoint where one is due."""
        step = state.global_step
        self._look(step)
        if self._folder is not None and (step % self._save_every == 0 or step == state.max_steps):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove earlier checkpoints, now that the new one is complete."""
        if self._folder is not None and self._removes:
            for step, folder in checkpoints(self._folder, self._probe.store.identity).items():
                if step < state.global_step:
                    remove(folder)

    def _look(self, step: int) -> None:
        self._tick(step)
        if self._probe.latest is not None and self._probe.latest[0] == step:
            self._on_probe(*self._probe.latest)
