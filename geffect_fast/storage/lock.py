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
"""Lock file, held with flock while a process works in the folder; it names that process."""

_mine: set[tuple[str, int, int]] = set()
"""Folders that are locked here: path, process (a child of `fork` holds none), thread."""


@contextmanager
def locked(out: str | Path) -> Iterator[Path]:
    """Lock a run folder for this process and thread alone, and recover it from a killed process.

    The folder is made where it is missing, and removed at the end where it is empty. Within the
    block the same thread may lock the folder again.

    Args:
        out: run folder.

    Yields:
        The folder's absolute path.

    Raises:
        InputError: another process, which the message names, works in the folder, or the folder
            cannot be written to.
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
            with suppress(OSError):  # before the unlock: the next process then makes a new file
                (path / LOCK).unlink()
            os.close(handle)
        with suppress(OSError):  # not empty, or gone
            for parent in made:
                parent.rmdir()


def restored(path: Path) -> None:
    """Put back the files that a killed process set aside in a run folder, where there are any.

    Raises:
        InputError: the process that set files aside is still at work, or the folder cannot be
            written to.
    """
    if path.is_dir() and any(path.glob(f"{REPLACED}*")):
        with locked(path):
            pass


def in_use(out: str | Path, owner: str = "") -> InputError:
    """The error for a folder in which another process works, by default this process."""
    owner = owner or _this_process()
    return InputError(
        f"run folder {out} is in use by {owner}; wait for its end, or choose another --out"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _acquired(file: Path, out: str | Path) -> int:
    """Lock a file and return its handle; raise `InputError` where another process holds it."""
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
        # The previous owner may have unlinked the file meanwhile. A lock on a file without a name
        # keeps nobody out, so the file is opened again.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{_this_process()}\n".encode(), 0)
                return handle
        os.close(handle)


def _without_lock(file: Path, error: OSError) -> int:
    """Open a file without a lock, where the file system has no locks, and warn of this."""
    warnings.warn(
        f"run folder {file.parent} is not locked ({error.strerror}): see that no other process "
        "works in it",
        GEffectWarning,
        stacklevel=4,
    )
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
