"""Handling of SIGTERM and SIGHUP, from schedulers and closing terminals, in the way of Ctrl-C."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""Exit code after Ctrl-C; after another signal it is 128 and the signal's number."""


def ended_by_signals(main: Callable[..., int]) -> Callable[..., int]:
    """Let SIGTERM and SIGHUP interrupt a program too, unless another handling of them is set.

    Args:
        main: the program, which returns its exit code.

    Returns:
        The program, whose exit code after such a signal is 128 and the signal's number.
    """

    @functools.wraps(main)
    def with_signals(*args: Any, **kwargs: Any) -> int:
        received: list[int] = []

        def interrupt(number: int, _frame: FrameType | None) -> None:
            received.append(number)
            raise KeyboardInterrupt

        here = threading.current_thread() is threading.main_thread()  # others cannot set handlers
        ours = [
            number
            for number in (signal.SIGTERM, signal.SIGHUP)
            if here and signal.getsignal(number) is signal.SIG_DFL  # nohup ignores SIGHUP
        ]
        for number in ours:
            signal.signal(number, interrupt)
        try:
            code = main(*args, **kwargs)
        finally:
            for number in ours:
                signal.signal(number, signal.SIG_DFL)
        return 128 + received[0] if received and code == INTERRUPTED else code

    return with_signals
