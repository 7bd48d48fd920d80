"""Calls of functions on several ranks: processes of a gloo group on one machine."""

from __future__ import annotations

import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

LONGEST = 300
"""Seconds for which a test waits for its ranks."""

PRELOADED = [
    *("geffect_fast.cli", "geffect_fast.demo", "geffect_fast.measure.sweep"),
    *("geffect_fast.metrics", "geffect_fast.training.relearn", "geffect_fast.training.unlearn"),
    *("h5netcdf", "lark.parsers", "pytest", "torch._decomp.decompositions_for_jvp"),
    *("torch.utils.tensorboard", "xarray"),
    *("datasets", "peft", "transformers.trainer", "transformers.integrations.neftune"),
    *(f"transformers.models.{n}.modeling_{n}" for n in ("llama", "gpt2", "qwen2_moe", "bloom")),
]
"""Modules that are imported once, before the ranks are forked."""


class Raised:
    """An error that a rank raised.

    Attributes:
        kind: name of the error's class.
        said: its message.
        trace: its traceback.
    """

    def __init__(self, error: BaseException) -> None:
        self.kind, self.said = type(error).__name__, str(error)
        self.trace = traceback.format_exc()

    def __repr__(self) -> str:
        return self.trace


def on_ranks(size: int, job: Callable[..., Any], *args: Any, fails: bool = False) -> list[Any]:
    """Return the result of `job(*args)` on each of several ranks, or `Raised`.

    Args:
        size: number of ranks.
        job: a function of a module that can be imported; its process group has begun.
        args: pickled.
        fails: whether ranks may raise, or end; else the first rank that does so fails the test.

    Returns:
        By rank; None for a rank that ended without a result.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(size):
            end, other = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(other, folder, rank, size, job, args))
            process.start()
            other.close()
            processes.append(process)
            ends.append(end)
        found: list[Any] = [None] * size
        deadline, open_ends = time.monotonic() + LONGEST, dict(zip(ends, range(size), strict=True))
        try:
            while open_ends:
                ready = multiprocessing.connection.wait(
                    list(open_ends), max(deadline - time.monotonic(), 0)
                )
                assert ready, f"ranks {sorted(open_ends.values())} hang"
                for end in ready:
                    rank = open_ends.pop(end)
                    with suppress(EOFError):
                        found[rank] = end.recv()
                    if not fails:
                        assert found[rank] is not None, f"rank {rank} ended"
                        assert not isinstance(found[rank], Raised), found[rank]
        finally:
            for process in processes:
                process.join(1 if not open_ends else 0)
                process.kill()
    return found


def commanded(words: list[str], killed_at: int | None = None) -> tuple[int, str]:
    """Exit code and errors of a command on this rank; rank 1 is killed before a step is probed."""
    import torch.distributed as dist

    from geffect_fast import report
    from geffect_fast.cli import main
    from geffect_fast.steps.probe import Probe

    plain, said = Probe.measure_at, io.StringIO()

    def at(self: Probe, step: int, **given: Any) -> Any:
        if step == killed_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, step, **given)

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(report, "write_report", lambda *_, **__: None)
        patch.setattr(Probe, "measure_at", at)
        return main(words), said.getvalue()


def of_each(job: Callable[..., Any], cases: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The result of `job(*case)` by the case's name."""
    return {name: job(*case) for name, case in cases.items()}


def weights_of(model: Any) -> dict[str, Any]:
    """A model's weights, whole where ranks share them out."""
    whole = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in model.state_dict().items()
    }
    return {key: value.numpy().copy() for key, value in whole.items()}


def assert_same_training(name: str, found: Any, expected: Any, exact: float) -> None:
    """Check the result and the final weights of a training called `name`."""
    (own, weights), (result, expected_weights) = found, expected
    assert abs(result.measured_change.isel(step=-1)).min() > 1e-5, name
    for key, value in expected_weights.items():
        assert abs(weights[key] - value).max() <= exact, (name, key)
    for variable, values in result.data_vars.items():
        # A cosine of pure rounding error is any number.
        if values.dtype.kind == "f" and "cosine" not in variable:
            size = np.max(abs(values.values), where=np.isfinite(values.values), initial=0.0)
            np.testing.assert_allclose(
                own[variable].values,
                values.values,
                rtol=0,
                atol=1e-9 * size,
                err_msg=f"{name} {variable}",
            )


def _run(
    end: Any, folder: str, rank: int, size: int, job: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # imported modules are no garbage: every training looks for garbage
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine is called
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    dist.barrier()  # a rank without work would be gone before the others are connected to it
    try:
        found = job(*args)
    except BaseException as error:
        found = Raised(error)
    end.send(found)
    end.close()
