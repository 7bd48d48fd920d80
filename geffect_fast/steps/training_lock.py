"""The lock of a run folder for as long as somebody else's training loop runs, however it ends.

A Trainer tells its callbacks of a training's end, not of an exception in it. So a thread looks
whether the function that runs the loop is still on its thread's stack.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from geffect_fast.storage.lock import in_use, locked

_SECONDS = 0.25
"""Between two looks: how long a folder stays locked behind an exception."""

_trainings: dict[str, TrainingLock] = {}


class TrainingLock:
    """A locked run folder, from the beginning of a training to `release` or the loop's end."""

    def __init__(self, out: Path) -> None:
        """Lock a folder for the training loop that calls the callback that calls this.

        Raises:
            InputError: another process or another training works in it; it is named.
        """
        self._place = os.path.realpath(out)
        earlier = _trainings.get(self._place)
        if earlier is not None:
            if earlier._runs():
                raise in_use(out)
            earlier.release()
        self._thread = threading.get_ident()
        self._loop: FrameType | None = _loop()
        self._stack = ExitStack()
        self._done = threading.Event()
        self._releasing = threading.Lock()
        self._stack.enter_context(locked(out))
        _trainings[self._place] = self
        threading.Thread(target=self._watch, name="training lock", daemon=True).start()

    def release(self) -> None:
        """Let others in; once it is released nothing happens."""
        with self._releasing:
            if not self._done.is_set():
                self._done.set()
                self._loop = None  # it holds the training's model and data
                if _trainings.get(self._place) is self:
                    del _trainings[self._place]
                with suppress(OSError):  # of a folder that is gone
                    self._stack.close()

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            if not self._runs():
                self.release()

    def _runs(self) -> bool:
        """Whether the loop is still running."""
        loop = self._loop
        return loop is not None and any(
            frame is loop for frame in _outwards(sys._current_frames().get(self._thread))
        )


def _loop() -> FrameType:
    """The function that told its callbacks of a training's beginning."""
    between = {__name__, "geffect_fast.steps.callback", "transformers.trainer_callback"}
    for frame in _outwards(sys._getframe(1)):
        if frame.f_globals.get("__name__") not in between:
            break
    return frame


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
