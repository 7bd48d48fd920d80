"""Threads of torch on a machine that others use too: their number, and whether they spin waiting.

OpenMP reads its settings when torch is loaded, so commands set them before. A program that imports
the package is told what to set.
"""

from __future__ import annotations

import logging
import os
import sys
from itertools import pairwise
from pathlib import Path

COMMAND = "geffect-fast"

_OF_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_OF_NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def is_command() -> bool:
    """Whether this process is the command line: by its script, or `python -m geffect_fast`."""
    modules = {("-m", name) for name in ("geffect_fast", "geffect_fast.cli")}
    return (
        not modules.isdisjoint(pairwise(sys.orig_argv))
        or Path(sys.argv[0] if sys.argv else "").name == COMMAND
    )


def prepare() -> None:
    """Set up threads for a command, or tell a program what to set, before torch is loaded.

    Settings of the user stay as they are.
    """
    if "torch" in sys.modules:
        return
    if is_command():
        if not any(name in os.environ for name in _OF_WAITING):
            os.environ["OMP_WAIT_POLICY"] = "passive"
        if not any(name in os.environ for name in _OF_NUMBER):
            os.environ["OMP_NUM_THREADS"] = str(usable_cores())
        return
    advice = _advice()
    if advice is not None:
        logging.getLogger("geffect_fast").warning(advice)


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of cores that this process may use, at least 1.

    These are the cores of its affinity, at most as many as its control group's share of time is
    worth.

    Args:
        root: the folder of the control groups.
    """
    if not hasattr(os, "sched_getaffinity"):  # outside of Linux neither limit is known
        return os.cpu_count() or 1
    mine = os.sched_getaffinity(0)
    cores = {_core(cpu) for cpu in mine}
    share = _share(root)
    return len(cores) if share is None else max(1, min(len(cores), int(share)))


def _core(cpu: int) -> str:
    """The core of a logical processor, named by all processors that share its units."""
    place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return place.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return str(cpu)


def _share(root: Path) -> float | None:
    """Number of processors whose time the control group may use; None: no limit is known."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return None
    inside = next((line[3:].strip("/\n") for line in group.splitlines() if line[:3] == "0::"), "")
    shares = []
    folders = [root / inside, *(root / inside).parents] if ".." not in inside else [root]
    for folder in folders:
        if folder == root.parent:
            break
        shares += _limit(folder)
    return min(shares, default=None)


def _limit(folder: Path) -> list[float]:
    """The limit of one group, of either version of control groups; empty where it has none."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return [] if quota == "max" else [int(quota) / int(period)]
    except (OSError, ValueError):
        pass
    try:
        quota, period = (
            (folder / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
            for name in ("quota", "period")
        )
        return [] if int(quota) < 0 else [int(quota) / int(period)]
    except (OSError, ValueError, ZeroDivisionError):
        return []


def _advice() -> str | None:
    """Advice on settings, if neither waiting nor number is set and cores are busy; else None."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return None
    if any(name in os.environ for name in (*_OF_WAITING[1:], *_OF_NUMBER)):
        return None
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], usable_cores()
    if load < 0.5 * cores:
        return None
    return (
        f"other processes keep this machine busy (load {load:.1f} on {cores} cores), and torch's "
        "threads spin while they wait, which makes everything many times slower: set "
        f"OMP_WAIT_POLICY=passive, and OMP_NUM_THREADS={cores} or less, before Python starts"
    )
