"""Free memory of a device, within the limits that this process runs under."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the reclaimable part of the use in `memory.stat`, of cgroup versions 2 and 1."""


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be allocated on `device`.

    On CUDA this is the memory that the driver reports as free plus the memory that torch's
    allocator holds unused. On the CPU it is the least of `MemAvailable` and the rest of every
    control group above this process: its limit minus its use, without file cache that can be
    dropped.

    Args:
        device: CPU or CUDA.
        root: where `proc` and `sys` are mounted.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return max(min([_available(root), *_cgroup_rests(root)]), 0)


def _available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} has no MemAvailable")


def _cgroup_rests(root: Path) -> Iterator[int]:
    """Bytes that each control group of this process leaves; groups without a limit are skipped."""
    for folder in _cgroup_folders(root):
        for limit_file, use_file, reclaimable in _CGROUP_FILES:
            try:
                limit = (folder / limit_file).read_text().strip()
                use = int((folder / use_file).read_text())
                stat = (folder / "memory.stat").read_text().split()
            except OSError:
                continue
            if limit != "max":
                cache = dict(zip(stat[::2], stat[1::2], strict=True)).get(reclaimable, "0")
                yield int(limit) - use + int(cache)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # Inside a container the path may be the host's; folders that are not mounted are skipped.
        inner = Path(path.lstrip("/"))
        yield from (mount / part for part in (inner, *inner.parents))
