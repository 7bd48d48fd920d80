"""The cost of an unlearning training: seconds and peak memory of its updates."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class TrainingCost(TrainerCallback, ExportableState):
    """A callback that adds up the cost of updates, without probes.

    This callback stands before all callbacks that measure. A checkpoint keeps the sums, and a
    training that resumes from the checkpoint continues them. Updates that were lost with a killed
    process therefore do not count.

    Attributes:
        seconds: seconds of the updates, by the host's clock.
        peak_memory: on a GPU, the most bytes that tensors took during an update; on a CPU, the most
            bytes that the process has ever had, including all that it loaded before; None where
            the system does not tell.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_memory: int | None = None
        self._begun = 0.0

    def state(self) -> dict[str, Any]:
        """The sums, in the form in which transformers keeps them in a checkpoint."""
        kept = {"seconds": self.seconds, "peak_memory": self.peak_memory}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the sums from the checkpoint that a training resumes from."""
        held = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        for name, value in (held or {}).get("attributes", {}).items():
            setattr(self, name, value)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the count of peak memory, for an update."""
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the seconds of an update, and raise the peak where the update took more memory."""
        self.seconds += time.perf_counter() - self._begun
        on_device = args.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(args.device) if on_device else _peak_of_process()
        if now is not None:
            self.peak_memory = max(now, self.peak_memory or 0)


def _peak_of_process() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not tell."""
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None
