"""The lock of a run folder while another package's training loop runs, however the loop ends.

A Trainer tells its callbacks of a training's end, but not of an exception in the training. So a
thread checks whether the function that runs the loop is still on its own thread's stack.
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
"""Seconds between two checks: the longest time that a folder stays locked after an exception."""

_trainings: dict[str, TrainingLock] = {}


class TrainingLock:
    """A locked run folder, from the beginning of a training to `release` or the loop's end."""

    def __init__(self, out: Path) -> None:
        """Lock a folder for the training loop whose callback makes this lock.

        Raises:
            InputError: another process or another training, which the message names, works in the
                folder.
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
        """Unlock the folder; a second call does nothing."""
        with self._releasing:
            if not self._done.is_set():
                self._done.set()
                self._loop = None  # the frame keeps the training's model and data alive
                if _trainings.get(self._place) is self:
                    del _trainings[self._place]
                with suppress(OSError):  # the folder may be gone
                    self._stack.close()

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            if not self._runs():
                self.release()

    def _runs(self) -> bool:
        """Whether the training loop is still running."""
        loop = self._loop
        return loop is not None and any(
            frame is loop for frame in _outwards(sys._current_frames().get(self._thread))
        )


def _loop() -> FrameType:
    """The frame of the function that runs the training loop: the innermost outside of callbacks."""
    between = {__name__, "geffect_fast.steps.callback", "transformers.trainer_callback"}
    for frame in _outwards(sys._getframe(1)):
        if frame.f_globals.get("__name__") not in between:
            break
    return frame


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
