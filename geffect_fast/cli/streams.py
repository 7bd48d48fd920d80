"""Standard output and error of a command, which ends once they can no longer be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutputLost(BaseException):
    """Standard output or error cannot be written, for example because `head` has closed a pipe.

    The class is neither an `Exception` nor an `OSError`, so that no handler on the way takes it for
    a failure of the files that are read or written meanwhile.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class _Stream:
    """A text stream that raises `OutputLost` when writing to it fails."""

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
    """Raise `OutputLost` if any output of the block cannot be written, buffered output included.

    Unwritten output is then dropped, since Python would otherwise report it at exit.
    """
    found = sys.stdout, sys.stderr
    try:
        # A stream that was closed from the start is None, and nothing is printed to it.
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
    """Redirect a stream that cannot be written to the null device."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
