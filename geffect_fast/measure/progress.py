"""Progress bars on stderr, where a person is looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def progress_bar(show: bool, what: str, total: float) -> Iterator[Callable[..., Any]]:
    """A bar from 0 to `total`, none where `show` is False or stderr is no terminal.

    Yields:
        A function that is told `completed=` so much, or `advance=` by so much.
    """
    if not show:
        yield lambda **_: None
        return
    from rich.progress import Progress

    from geffect_fast.terminal import Console

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield partial(progress.update, progress.add_task(what, total=total))
