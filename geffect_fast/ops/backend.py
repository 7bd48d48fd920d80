"""Choice of the provider that serves each op on each device, with the reason for the choice.

Providers: `reference` (plain torch, always there), `cpu` (C++) and `cuda`, both in
`geffect_fast/_kernels*.so`. Set `GEFFECT_FAST_BUILD=none` to run without the native libraries even
where they are built.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geffect_fast.ops import schema
from geffect_fast.ops.ieee_fp32 import ieee_fp32, products_are_ieee

logger = logging.getLogger("geffect_fast")

_force_reference: ContextVar[bool] = ContextVar("force_reference", default=False)


class ProviderRow(NamedTuple):
    """One line of `geffect-fast env`: the provider of `op` on `device`, and the reason."""

    op: str
    device: str
    provider: str
    reason: str


def _load(name: str, remedy: str) -> str | None:
    """Load the native library `name`; return why it is missing, None where it serves."""
    if os.environ.get("GEFFECT_FAST_BUILD") == "none":
        return "GEFFECT_FAST_BUILD=none is set"
    found = sorted(Path(__file__).parent.parent.glob(f"{name}.*so"))
    if not found:
        return f"the native library {name} was not built; {remedy}"
    try:
        torch.ops.load_library(found[0])
    except (OSError, RuntimeError) as error:
        why = error.__cause__ or error
        return f"{found[0].name} does not load with torch {torch.__version__}: {why}"
    return None


NATIVE_MISSING = _load(
    "_kernels", "install a C++ compiler and run `pip install --no-build-isolation .`"
)
# Kernels for sm_90a only. Other CUDA kernels call them where they are built.
HOPPER_MISSING = NATIVE_MISSING or _load(
    "_kernels_sm90", "install nvidia-cutlass and build for 9.0a (TORCH_CUDA_ARCH_LIST)"
)
_devices_told: set[str] = set()


@cache
def has_native(op: str, device: str) -> bool:
    """Return whether a native kernel serves `op` on `device` ("cpu", "cuda")."""
    name = f"{schema.NAMESPACE}::{op}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


def _cuda_missing() -> str | None:
    """Return why no CUDA kernel serves on any GPU, None where some do."""
    if NATIVE_MISSING is not None:
        return NATIVE_MISSING
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not any(has_native(op, "cuda") for op in schema.SCHEMAS):
        return (
            f"the native library was built without CUDA; install nvcc of CUDA {torch.version.cuda}"
            " and run `GEFFECT_FAST_BUILD=cuda pip install --no-build-isolation .`"
        )
    return None


def _runs_on(target: str, major: int, minor: int) -> bool:
    """Return whether code for `target` (sm_80, sm_90a, compute_90) runs on GPUs major.minor."""
    kind, number = target.rstrip("a").split("_")
    if target.endswith("a"):
        return int(number) == 10 * major + minor
    if kind == "compute":
        return int(number) <= 10 * major + minor
    return int(number) // 10 == major and int(number) % 10 <= minor


@cache
def _gpu_missing(index: int) -> str | None:
    """Return why no CUDA kernel serves on GPU `index`, None where some do."""
    if (reason := _cuda_missing()) is not None:
        return reason
    built = build_info().get("architectures", [])
    targets = [name for name in built if name.startswith(("sm_", "compute_"))]
    major, minor = torch.cuda.get_device_capability(index)
    if targets and not any(_runs_on(target, major, minor) for target in targets):
        hopper = "a" if (major, minor) == (9, 0) else ""
        return (
            f"the CUDA kernels were built for {', '.join(targets)} and this GPU is"
            f" sm_{major}{minor}; build with TORCH_CUDA_ARCH_LIST={major}.{minor}{hopper}"
        )
    return None


def _why_missing(device: str) -> str | None:
    """Return why `device` has no native kernels at all, None where it has some."""
    return _gpu_missing(torch.cuda.current_device()) if device == "cuda" else NATIVE_MISSING


def _say_once(device: str) -> None:
    """Warn at the first op on a device, and never again, if no native kernel serves there."""
    if device in _devices_told:
        return
    _devices_told.add(device)
    if (reason := _why_missing(device)) is not None:
        logger.warning("ops on %s run in plain torch (slower): %s", device, reason)


def providers() -> list[ProviderRow]:
    """Return the provider of every op on every device of this machine, with the reason."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_provider(op, device) for op in schema.SCHEMAS for device in devices]


def _provider(op: str, device: str) -> ProviderRow:
    if reference_is_forced():
        return ProviderRow(op, device, "reference", "forced by force_reference()")
    missing = _why_missing(device)
    if missing is not None or not has_native(op, device):
        reason = missing or "plain torch is as fast: no native kernel is kept"
        return ProviderRow(op, device, "reference", reason)
    reason = "native library loaded"
    if device == "cuda":
        reason += "; float64 runs in plain torch"
        if (
            op == "segment_bilinear"
            and HOPPER_MISSING
            and torch.cuda.get_device_capability()[0] == 9
        ):
            reason += f"; no kernel for sm_90a: {HOPPER_MISSING}"
    return ProviderRow(op, device, device, reason)


def _cuda_kernel_declines(op: str, device: torch.device, args: tuple[Any, ...]) -> bool:
    """Return whether `op` has a CUDA kernel that cannot serve this call on a GPU."""
    if device.type != "cuda" or not has_native(op, "cuda"):
        return False
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    index = torch.cuda.current_device() if device.index is None else device.index
    return first.dtype == torch.float64 or _gpu_missing(index) is not None


def build_info() -> dict[str, Any]:
    """Return compiler, flags, CUDA version, architectures and ops of the build; {} if unbuilt."""
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


def reference_is_forced() -> bool:
    """Return whether this code runs inside `force_reference()`."""
    return _force_reference.get()


def call(op: str, device: torch.device, *args: Any) -> Tensor:
    """Run `op` on `device` with the provider that serves it; arguments are checked already."""
    forced = reference_is_forced()
    if not forced:
        _say_once(device.type)
    # Entering a context takes as long as many calls do.
    with nullcontext() if products_are_ieee() else ieee_fp32():
        if forced or _cuda_kernel_declines(op, device, args):
            schema.refuse_autograd(op, args)
            return schema.REFERENCES[op](*args)
        return getattr(getattr(torch.ops, schema.NAMESPACE), op)(*args)
