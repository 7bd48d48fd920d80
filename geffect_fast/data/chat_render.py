"""Rendering of chat templates in a process of its own, with bounds on time and memory.

A chat template is a program of unknown origin. It may loop for years or write without end, in ways
that nothing inside a Python process can stop. A child process, forked once for a whole data set,
therefore renders the rows and sends back text. The system ends the child where a row takes too much
time, and gives the child no more memory than stated. Where there is no fork (Windows), rows are
rendered in place, and only the length of their text is bounded.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Seconds of processor time that a template may take for a row; most take a ten-thousandth."""
MEMORY = 2**30
"""Bytes that a template may ask for beyond those that the process holds."""


@dataclass(frozen=True)
class Rendered:
    """The result of a template on one row: `text`, or the reason why there is no text."""

    text: str = ""
    reason: str = ""


def render(template: Callable[[str], str], questions: Sequence[str]) -> list[Rendered]:
    """The texts that a template makes of questions, up to the first one that had to be ended.

    Args:
        template: renders a question; the text of an exception that it raises becomes the reason why
            that question has no text.
        questions: one question for each row.
    """
    if not hasattr(os, "fork"):
        return [_rendered(template, question) for question in questions]
    results, status = _in_a_child(template, questions)
    if len(results) < len(questions):
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        ended = f"it takes more than {SECONDS:g} seconds" if late else "it ended its process"
        results.append(Rendered(reason=ended))
    return results


def _rendered(template: Callable[[str], str], question: str) -> Rendered:
    try:
        text = template(question)
    except MemoryError:
        return Rendered(reason=f"it asks for more than {MEMORY >> 30} GiB of memory")
    except Exception as error:  # jinja's errors, and any that a template raises itself
        return Rendered(reason=" ".join(str(error)[:1000].split()) or type(error).__name__)
    return Rendered(text)


def _in_a_child(
    template: Callable[[str], str], questions: Sequence[str]
) -> tuple[list[Rendered], int]:
    """The texts that a child process rendered before it ended, and its exit status."""
    read, write = os.pipe()
    with _silent_fork():
        child = os.fork()
    if child == 0:
        _serve(template, questions, write)
    os.close(write)
    results = []
    try:
        with os.fdopen(read, encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):  # the last line may be cut
                    results.append(Rendered(*json.loads(line)))
                if len(results) == len(questions):
                    break
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return results, os.waitpid(child, 0)[1]


def _serve(template: Callable[[str], str], questions: Sequence[str], pipe: int) -> Any:
    """Render all questions in the child process, and end it without Python's cleanup at exit."""
    try:
        gc.disable()  # objects, devices included, belong to the parent
        for number in (signal.SIGINT, signal.SIGPROF, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory()
        with os.fdopen(pipe, "w", encoding="utf-8") as out:
            for question in questions:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                random.seed(0)  # so that jinja's `random` and `lipsum` can be replayed
                done = _rendered(template, question)
                out.write(json.dumps([done.text, done.reason]) + "\n")
                out.flush()  # so that the parent knows the row at which this ends
    finally:
        os._exit(0)


def _limit_memory() -> None:
    """Limit memory to the present use plus `MEMORY`, where the system tells the use."""
    import resource

    try:
        sizes = Path("/proc/self/statm").read_text(encoding="ascii")
    except OSError:
        return
    held = int(sizes.split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([held + MEMORY, *limits]), hard))


@contextmanager
def _silent_fork() -> Iterator[None]:
    """Silence the warnings of Python and tokenizers about a fork; the child uses no thread."""
    name = "TOKENIZERS_PARALLELISM"
    unset = name not in os.environ
    if unset:
        os.environ[name] = "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if unset:
            os.environ.pop(name, None)
