"""What an unlearning training cost: the seconds of its updates, and the memory they took."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class TrainingCost(TrainerCallback, ExportableState):
    """Adds up what updates cost, probes left out; it stands before all callbacks that measure.

    What a checkpoint knows is gone on with when the training is resumed from it, so that updates
    that were lost with a killed process do not count.

    Attributes:
        seconds: of the updates, by the host's clock.
        peak_memory: most bytes that a device's tensors took during an update; on a CPU the most
            that the process has had, with all that it loaded before; None: the system says neither.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_memory: int | None = None
        self._begun = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {"seconds": self.seconds, "peak_memory": self.peak_memory}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what the checkpoint knew that a training is resumed from."""
        held = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        for name, value in (held or {}).get("attributes", {}).items():
            setattr(self, name, value)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update begins."""
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update is done."""
        self.seconds += time.perf_counter() - self._begun
        on_device = args.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(args.device) if on_device else _of_process()
        if now is not None:
            self.peak_memory = max(now, self.peak_memory or 0)


def _of_process() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not say."""
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None
