"""Commands that `torchrun` starts on several ranks: they measure together, one of them speaks."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from geffect_fast.errors import InputError

SHARED = ("profile", "sweep", "unlearn", "relearn", "control", "evaluate", "check", "env")
"""Commands that several ranks share."""


def is_launched() -> bool:
    """Whether `torchrun` started this process, and others beside it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process prints: the only one, or the first of several."""
    return not is_launched() or os.environ["RANK"] == "0"


def let_first_speak() -> None:
    """Wait while the first rank prints what is wrong: torchrun ends all once one has ended."""
    with suppress(KeyboardInterrupt):  # as torchrun ends them
        time.sleep(3)


@contextmanager
def on_launched_ranks(words: Sequence[str]) -> Iterator[None]:
    """Inside, what `torchrun` started is a process group, and all ranks but the first are mute.

    Each has a GPU of its own, where there are any. They end together, well or by an error.

    Args:
        words: of the command line.

    Raises:
        InputError: the command runs on one rank, or there are more ranks than GPUs.
    """
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as dist

    from geffect_fast import ranks

    if torch.cuda.is_available():
        # More ranks than GPUs is said below, when ranks can tell each other.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group()
    command = next((word for word in words if not word.startswith("-")), "")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.callback(gc.collect)  # models that hold the group, and each other
        if not is_first():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        stack.enter_context(ranks.here().together(command))
        if command and command not in SHARED:
            raise InputError(f"{command} runs in one process; start it without torchrun")
        _check_gpus()
        yield


def _check_gpus() -> None:
    """Raise `InputError` where ranks would share a GPU."""
    import torch

    here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if 0 < there < here:
        raise InputError(
            f"torchrun --nproc-per-node {here}: this machine has {there} GPUs; give at most {there}"
        )
