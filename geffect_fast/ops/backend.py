"""Which provider serves each op on each device, and why another one does not.

Providers: `reference` (plain torch, always there), `cpu` (C++, `geffect_fast/_kernels*.so`). Set
`GEFFECT_FAST_BUILD=none` to run without the native library even where it is built.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geffect_fast.ops import schema

logger = logging.getLogger("geffect_fast")

_force_reference: ContextVar[bool] = ContextVar("force_reference", default=False)


class ProviderRow(NamedTuple):
    """One line of `geffect-fast env`: who serves `op` on `device`, and why."""

    op: str
    device: str
    provider: str
    reason: str


def _load_native() -> str | None:
    """Load the native library; return why it is missing, None where it serves."""
    if os.environ.get("GEFFECT_FAST_BUILD") == "none":
        return "GEFFECT_FAST_BUILD=none is set"
    found = sorted(Path(__file__).parent.parent.glob("_kernels*.so"))
    if not found:
        return (
            "the native library was not built; install a C++ compiler and run"
            " `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(found[0])
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} does not load with torch {torch.__version__}: {error}"
    return None


NATIVE_MISSING = _load_native()
_devices_told: set[str] = set()


@cache
def has_native(op: str, device: str) -> bool:
    """Return whether a native kernel serves `op` on `device` ("cpu", "cuda")."""
    name = f"{schema.NAMESPACE}::{op}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


def _why_missing(device: str) -> str | None:
    """Return why `device` has no native kernels at all, None where it has some."""
    return "this version has no CUDA kernels" if device == "cuda" else NATIVE_MISSING


def _say_once(device: str) -> None:
    """Tell the user, at the first op on a device and never again, that no native kernel serves."""
    if device in _devices_told:
        return
    _devices_told.add(device)
    if (reason := _why_missing(device)) is not None:
        logger.warning("ops on %s run in plain torch (slower): %s", device, reason)


def providers() -> list[ProviderRow]:
    """Return who serves every op on every device of this machine, with the reason."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_provider(op, device) for op in schema.SCHEMAS for device in devices]


def _provider(op: str, device: str) -> ProviderRow:
    if _force_reference.get():
        return ProviderRow(op, device, "reference", "forced by force_reference()")
    if has_native(op, device):
        return ProviderRow(op, device, device, "native library loaded")
    reason = _why_missing(device) or "plain torch is as fast: no native kernel is kept"
    return ProviderRow(op, device, "reference", reason)


def build_info() -> dict[str, Any]:
    """Return compiler, flags, CUDA version, architectures and ops of the build, {} without one."""
    try:
        return import_module("geffect_fast._C").build_info()
    except ImportError:
        return {}


@contextmanager
def force_reference() -> Iterator[None]:
    """Serve every op of this context (thread or task) from the plain torch reference."""
    token = _force_reference.set(True)
    try:
        yield
    finally:
        _force_reference.reset(token)


def call(op: str, device: torch.device, *args: Any) -> Tensor:
    """Run `op` on `device` with the provider that serves it; arguments are checked already."""
    if _force_reference.get():
        schema.refuse_autograd(op, args)
        return schema.REFERENCES[op](*args)
    _say_once(device.type)
    return getattr(getattr(torch.ops, schema.NAMESPACE), op)(*args)
