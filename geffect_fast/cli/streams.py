"""Standard output and error for a command: where nobody takes what it prints, it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutputLost(BaseException):
    """Standard output or error cannot be written, as where `head` has closed a pipe.

    It is no `Exception`, and no `OSError`, so that nothing on its way takes it for a failure of the
    files that are read or written meanwhile.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class _Stream:
    """A text stream that raises `OutputLost` where it cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _losing():
            return self._stream.write(text)

    def flush(self) -> None:
        with _losing():
            self._stream.flush()


@contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputLost(error) from error


@contextmanager
def watched_streams() -> Iterator[None]:
    """Raise `OutputLost` out of the block where what it prints cannot be written, to the last word.

    What could not be written is dropped then, or Python would complain of it when it exits.
    """
    found = sys.stdout, sys.stderr
    try:
        # a stream that was closed from the start is None, and nothing is printed to it
        sys.stdout, sys.stderr = (s if s is None else _Stream(s) for s in found)
        yield
        for stream in found:
            if stream is not None:
                with _losing():
                    stream.flush()
    except OutputLost:
        for stream in found:
            _drop_rest(stream)
        raise
    finally:
        sys.stdout, sys.stderr = found


def _drop_rest(stream: Any) -> None:
    """Let a stream that cannot be written lead nowhere."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
