"""One process at a time in a run folder: a lock that the kernel holds, and frees with its owner."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.paths import is_there
from geffect_fast.storage.disk import REPLACED, check_usable, recovered, unwritable

LOCK = ".lock"
"""Held with flock while a process works in the folder; in it, for messages, who that is."""

_mine: set[tuple[str, int, int]] = set()
"""Folders that are locked here: path, process (a child of `fork` holds none), thread."""


@contextmanager
def locked(out: str | Path) -> Iterator[Path]:
    """A run folder for this process and thread alone; what a killed one left in it is put right.

    The folder is made where it is missing, and goes again where it is empty in the end. Within the
    block the same thread may lock it again.

    Args:
        out: run folder.

    Yields:
        Its absolute path.

    Raises:
        InputError: another process works in it (it is named), or it cannot be written to.
    """
    path = check_usable(out)
    key = (os.path.realpath(path), os.getpid(), threading.get_ident())
    if key in _mine:
        yield path
        return
    made = [p for p in (path, *path.parents) if not is_there(p)]
    handle = None
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            handle = _acquired(path / LOCK, out)
            _mine.add(key)
            recovered(path)
        except OSError as error:
            raise unwritable(f"run folder {out}", "--out", error) from error
        yield path
    finally:
        _mine.discard(key)
        if handle is not None:
            with suppress(OSError):  # the name first: who finds none makes a new one
                (path / LOCK).unlink()
            os.close(handle)
        with suppress(OSError):  # not empty, or gone
            for parent in made:
                parent.rmdir()


def restored(path: Path) -> None:
    """Put back what a killed process set aside in a run folder, where there is such.

    Raises:
        InputError: it is no killed one, but at work; or the folder cannot be written to.
    """
    if path.is_dir() and any(path.glob(f"{REPLACED}*")):
        with locked(path):
            pass


def in_use(out: str | Path, owner: str = "") -> InputError:
    """What to raise where another one works in a folder; by default this very process."""
    owner = owner or _this_process()
    return InputError(
        f"run folder {out} is in use by {owner}; wait for its end, or choose another --out"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _acquired(file: Path, out: str | Path) -> int:
    """The handle of a file that is locked; raise `InputError` where another process has it."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(handle, 300, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return _without_lock(file, error)
            raise in_use(out, owner or "another process") from None
        # An owner that left has taken the name away: a lock on what it named keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{_this_process()}\n".encode(), 0)
                return handle
        os.close(handle)


def _without_lock(file: Path, error: OSError) -> int:
    """Go on where the file system has no locks, and say so."""
    warnings.warn(
        f"run folder {file.parent} is not locked ({error.strerror}): see that no other process "
        "works in it",
        GEffectWarning,
        stacklevel=4,
    )
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
