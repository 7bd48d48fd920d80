"""Commands that `torchrun` starts on several ranks, which measure together while one prints."""

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
    """Whether `torchrun` started this process together with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process prints, as the only one or the first of several."""
    return not is_launched() or os.environ["RANK"] == "0"


def let_first_speak() -> None:
    """Wait while the first rank prints its error, since torchrun ends all ranks once one ends."""
    with suppress(KeyboardInterrupt):  # torchrun interrupts the ranks that it ends
        time.sleep(3)


@contextmanager
def on_launched_ranks(words: Sequence[str]) -> Iterator[None]:
    """Make the processes that `torchrun` started a process group, and silence all but the first.

    Each rank has a GPU of its own, where there are any. The ranks end together, well or by an
    error. A process that `torchrun` did not start together with others is left as it is.

    Args:
        words: words of the command line.

    Raises:
        InputError: the command runs only in one process, or there are more ranks than GPUs.
    """
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as dist

    from geffect_fast import ranks

    if torch.cuda.is_available():
        # `_check_gpus` refuses more ranks than GPUs, once an error can reach all ranks.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group()
    command = next((word for word in words if not word.startswith("-")), "")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.callback(gc.collect)  # frees models in reference cycles, which hold the group
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
