"""SIGTERM and SIGHUP, which schedulers and closing terminals send, end a command as Ctrl-C does."""

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
    """Have a program interrupted by these signals too, unless the user has them do otherwise."""

    @functools.wraps(main)
    def with_signals(*args: Any, **kwargs: Any) -> int:
        received: list[int] = []

        def interrupt(number: int, _frame: FrameType | None) -> None:
            received.append(number)
            raise KeyboardInterrupt

        here = threading.current_thread() is threading.main_thread()  # as Python demands
        ours = [
            number
            for number in (signal.SIGTERM, signal.SIGHUP)
            if here and signal.getsignal(number) is signal.SIG_DFL  # nohup has it ignored
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
