"""The providers that can serve the ops in these tests."""

from __future__ import annotations

import contextlib

import cuda_shim
import pytest
import torch

from geffect_fast import ops
from geffect_fast.ops import backend

# The reference is always there; a native provider is tested where it was built.
INSTALLED = ["reference"] + (["cpu"] if backend.NATIVE_MISSING is None else [])
# The CUDA kernels, compiled as plain C++: their arithmetic and indices without a GPU.
CUDA_SHIM = "cuda-shim"


def why_missing(provider: str) -> str | None:
    """Return why `provider` cannot be tested here, None where it can."""
    return cuda_shim.why_missing() if provider == CUDA_SHIM else None


def serving(provider: str) -> contextlib.AbstractContextManager[None]:
    """Let the ops of a context run on `provider`."""
    if provider == CUDA_SHIM:
        return cuda_shim.serving()
    return ops.force_reference() if provider == "reference" else contextlib.nullcontext()


def repeated(provider: str) -> list[contextlib.AbstractContextManager[None]]:
    """Return contexts in each of which a call must give the same bits again.

    Threads and blocks of the CUDA kernels run in another order between any two barriers, where a
    missing barrier shows.
    """
    if provider == CUDA_SHIM:
        return [cuda_shim.thread_order(cuda_shim.SHUFFLED)]
    return [contextlib.nullcontext()]


def serves(provider: str, op: str, dtype: torch.dtype) -> bool:
    """Return whether `provider`, which is there, has a kernel of its own for this call."""
    return provider != CUDA_SHIM or (dtype != torch.float64 and cuda_shim.serves(op))


PROVIDERS = [*INSTALLED, pytest.param(CUDA_SHIM, marks=pytest.mark.slow)]
every_provider = pytest.mark.parametrize("provider", PROVIDERS, indirect=True)
