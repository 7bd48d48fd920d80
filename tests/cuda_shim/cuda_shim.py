"""CUDA kernels on a CPU: csrc/cuda/*.cu, compiled as plain C++, serve CPU tensors.

Objects lie under build/cuda_shim, named by the hash of all their inputs. Set
`GEFFECT_FAST_SHIM_ONLY=op,op` to leave other kernels out.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from unittest import mock

import kernel_text
import torch
from torch import Tensor

from geffect_fast.ops import backend, schema

SHIM = Path(__file__).resolve().parent
ROOT = SHIM.parent.parent
BUILD = ROOT / "build" / "cuda_shim"
NAMESPACE = "geffect_fast_shim"
JOBS = 2

# The shim's folder comes first: its headers replace CUDA's and those of csrc/cuda.
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++17", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE",
    f"-I{SHIM}", f"-I{ROOT / 'csrc'}", f"-isystem{TORCH / 'include'}",
    "-DUSE_CUDA", "-DGEFFECT_FAST_SM90A", "-DGEFFECT_FAST_CUDA_KEY=CPU",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]  # fmt: skip
KERNEL_FLAGS = [
    "-O1", "-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=all",
    "-fstack-clash-protection",
]  # fmt: skip
# Later versions of torch ask for C++20 outside of the stable interface.
RUNTIME_FLAGS = ["-std=c++20", "-O3", "-fvisibility=default"]


def compiler() -> list[str]:
    """Return the command of the C++ compiler, [] if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name.split() for name in names if shutil.which(name.split()[0])), [])


def why_missing() -> str | None:
    """Return why the shim cannot be built, None where it can."""
    if (build := os.environ.get("GEFFECT_FAST_BUILD")) in ("none", "sanitize"):
        return f"GEFFECT_FAST_BUILD={build} is set"
    if sys.platform != "linux":
        return "the stand-in for CUDA needs Linux"
    return None if compiler() else "no C++ compiler was found"


def kernel_files() -> list[Path]:
    """Return the CUDA files that plain C++ can express: not those of CUTLASS."""
    only = os.environ.get("GEFFECT_FAST_SHIM_ONLY")
    return [
        path
        for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
        if "<cutlass/" not in path.read_text() and (only is None or path.stem in only.split(","))
    ]


@cache
def _flags_of_machine() -> list[str]:
    """Return flags that make code faster on this processor; not every compiler knows them."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-mavx2", "-mfma"] if capability in ("AVX2", "AVX512") else []
    poison = "-ftrivial-auto-var-init=pattern"
    known = subprocess.run(
        [*compiler(), poison, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True
    )
    return [*flags, poison] if known.returncode == 0 else flags


@cache
def _common_hash() -> bytes:
    """Hash what every object depends on: compiler, flags, torch and all headers."""
    version = subprocess.run(
        [*compiler(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    digest = hashlib.sha256(f"{version}{torch.__version__}{FLAGS}{_flags_of_machine()}".encode())
    headers = [*SHIM.rglob("*.h"), *SHIM.rglob("*.cuh")]
    headers += [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    for header in sorted([*headers, SHIM / "kernel_text.py"]):
        digest.update(str(header.relative_to(ROOT)).encode() + header.read_bytes())
    return digest.digest()


def _run(command: Sequence[str | Path], output: Path) -> Path:
    """Make the file `output` by `command`, unless the file exists."""
    if output.exists():
        return output
    unfinished = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    if done.stderr:
        warnings.warn(done.stderr, stacklevel=2)
    unfinished.replace(output)
    return output


def _object(source: Path, flags: Sequence[str]) -> Path:
    digest = hashlib.sha256(_common_hash() + source.read_bytes() + str(flags).encode())
    output = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    command = [*compiler(), *FLAGS, *_flags_of_machine(), *flags]
    if source.suffix != ".cu" or output.exists():
        return _run([*command, "-x", "c++", "-c", source], output)
    preprocess = [*command, "-E", "-x", "c++", str(source)]
    done = subprocess.run(preprocess, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(preprocess)}\n{done.stderr}")
    with NamedTemporaryFile("w", suffix=".ii") as prepared:
        prepared.write(kernel_text.rewritten(done.stdout))
        prepared.flush()
        return _run([*command, "-x", "c++-cpp-output", "-c", prepared.name], output)


def _library(name: str, objects: Sequence[Path], link: Sequence[str]) -> Path:
    digest = hashlib.sha256(f"{[path.name for path in objects]}{link}".encode())
    command = [
        *compiler(), "-shared", "-Wl,-z,defs", *objects, *link, f"-L{TORCH / 'lib'}",
        "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    return _run(command, BUILD / f"{name}-{digest.hexdigest()[:16]}.so")


@contextmanager
def _one_process_builds() -> Iterator[None]:
    """Let one process compile at a time; the objects that it makes then serve those that waited."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def runtime() -> ctypes.CDLL:
    """Return the library with the fibres and the switches of the shim."""
    with _one_process_builds():
        objects = [_object(source, RUNTIME_FLAGS) for source in sorted(SHIM.glob("*.cpp"))]
        built = _library("runtime", objects, ["-ldl"])
    library = ctypes.CDLL(str(built))
    library.shim_leave_device.restype = ctypes.c_bool
    return library


def load(name: str, sources: Sequence[Path], namespace: str) -> None:
    """Compile `sources`, whose ops are registered in `namespace`, and load them."""
    flags = [*KERNEL_FLAGS, f"-DGEFFECT_FAST_CUDA_NAMESPACE={namespace}"]
    link = [runtime()._name]  # called before the lock is taken, which a process can hold only once
    with _one_process_builds(), ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda source: _object(source, flags), sources))
        library = _library(name, objects, link)
    torch.ops.load_library(library)


@cache
def _loaded() -> torch.library.Library | RuntimeError:
    library = torch.library.Library(NAMESPACE, "DEF")
    for op, signature in (schema.SCHEMAS | schema.INTERNAL_SCHEMAS).items():
        library.define(op + signature)
    try:
        load("kernels", kernel_files(), NAMESPACE)
    except RuntimeError as error:
        return error  # a second try would take as long
    return library


def load_kernels() -> None:
    """Load the kernels of all ops; the registrations last as long as the process."""
    if isinstance(result := _loaded(), RuntimeError):
        raise result


def serves(op: str) -> bool:
    """Return whether a CUDA kernel of `op` was compiled."""
    load_kernels()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU")


def _guarded(arg: Any) -> Any:
    """Copy tensors, with their strides and misalignment, so that they end where memory ends."""
    if isinstance(arg, list):
        return [_guarded(item) for item in arg]
    if not isinstance(arg, Tensor):
        return arg
    pairs = zip(arg.shape, arg.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in pairs) if arg.numel() else 0
    lead = arg.data_ptr() % 16 // arg.element_size()
    memory = torch.empty(lead + extent, dtype=arg.dtype)
    memory[lead:] = arg.as_strided((extent,), (1,))
    return memory.as_strided(arg.shape, arg.stride(), lead)


def call(op: str, *args: Any) -> Tensor:
    """Run `namespace::op` with all tensors in guarded memory that the host must not touch."""
    namespace, name = op.split("::")
    function = getattr(getattr(torch.ops, namespace), name)
    shim = runtime()
    shim.shim_guard_memory(True)
    try:
        guarded = [_guarded(arg) for arg in args]
        shim.shim_enter_device()
        try:
            result = function(*guarded)
        finally:
            touched = shim.shim_leave_device()
    finally:
        shim.shim_guard_memory(False)
    if touched:
        raise RuntimeError(f"{op}: the host's code touches memory of the device")
    return result


@contextmanager
def serving() -> Iterator[None]:
    """Let the ops of this context run on the CUDA kernels, compiled for the host."""
    load_kernels()

    def call_kernel(op: str, _: torch.device, *args: Any) -> Tensor:
        return call(f"{NAMESPACE}::{op}", *args)

    with mock.patch.multiple(backend, call=call_kernel, has_native=lambda op, _device: serves(op)):
        yield


FORWARD, REVERSE, SHUFFLED = 0, 1, 2


@contextmanager
def thread_order(seed: int) -> Iterator[None]:
    """Run blocks, and between barriers the threads of a block, in an order of one's choice."""
    runtime().shim_set_order(seed)
    try:
        yield
    finally:
        runtime().shim_set_order(FORWARD)


@contextmanager
def device(**attributes: int) -> Iterator[None]:
    """Pretend a device with other attributes than those of a small Hopper GPU."""
    set_attribute = runtime().shim_set_attribute
    before = {name: set_attribute(name.encode(), value) for name, value in attributes.items()}
    try:
        if -1 in before.values():
            raise ValueError(f"unknown among the attributes {list(attributes)}")
        yield
    finally:
        for name, value in before.items():
            set_attribute(name.encode(), value)
