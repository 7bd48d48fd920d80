"""transformers' Trainer as a training of one process on one device, whatever torchrun started.

Ranks share out the batches of an update and add up its gradients without accelerate
(`geffect_fast.training.trainer`). This works for any number of batches on each rank, for update
rules, and for weights that one rank's rows do not reach. accelerate would wrap the model, deal out
the data and take means of gradients a second time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from geffect_fast.errors import InputError

_OF_LAUNCHERS = (
    *("LOCAL_RANK", "WORLD_SIZE"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
)
"""Environment variables that tell accelerate that it is one of several processes."""

_DEVICE = "ACCELERATE_TORCH_DEVICE"
"""Environment variable with the device that accelerate takes; unset, it takes the first one."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context that makes a GPU the current one, and does nothing for another device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def single_process(device: torch.device) -> Iterator[None]:
    """Make transformers' Trainer train in this process alone, on one device, inside the context.

    accelerate keeps the state of processes and devices that it once found out. The context restores
    that state at its end.

    Args:
        device: device of the model; where it is a GPU, it is the current one inside the context.

    Raises:
        InputError: a launcher started several processes, and no process group is begun.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    _check_group()
    states = (PartialState, AcceleratorState, GradientState)
    known = [(state, dict(state._shared_state)) for state in states]
    names = [name for name in (*_OF_LAUNCHERS, _DEVICE) if name in os.environ]
    hidden = {name: os.environ.pop(name) for name in names}
    os.environ[_DEVICE] = str(device)
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        with current(device):
            yield
    finally:
        del os.environ[_DEVICE]
        os.environ.update(hidden)
        for state, before in known:
            state._shared_state.clear()
            state._shared_state.update(before)


def _check_group() -> None:
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if n > 1 and not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"{n} processes were started, and no process group is begun; call "
            "torch.distributed.init_process_group() first, or start one process"
        )
