"""Writing that a full disk or Ctrl-C may stop at any point, and leave what was there before."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from geffect_fast.errors import InputError

UNFINISHED = ".unfinished-"
"""How the name of a folder in a run folder begins while a process fills or removes it."""


def user_path(path: str | Path) -> Path:
    """A path with `~` written out; `~name` of nobody here stays, to be named by who looks there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Whether there is a file, folder or link, also one to nowhere; raises what else is wrong."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def unwritable(what: str, place: str, error: OSError) -> InputError:
    """What to raise where the disk refuses.

    Args:
        what: that cannot be written.
        place: what may be chosen anew, such as `--out`.
        error: of the disk.
    """
    reason = error.strerror or error
    return InputError(
        f"{what} cannot be written: {reason}; free some space or choose another {place}"
    )


@contextmanager
def folder_for(what: str, path: Path) -> Iterator[None]:
    """Make a folder and all above it; where the block fails, what was made and is empty goes.

    Raises:
        InputError: the disk refuses, here or in the block.
    """
    made = [p for p in (path, *path.parents) if not is_there(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise unwritable(what, "--out", error) from error
        raise


@contextmanager
def set_aside(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Move files and folders of these names out of the way; they are back if the block fails.

    Where it does, whatever it made under these names goes; where it does not, what was set aside
    goes.
    """
    names = set(names)
    hidden = Path(tempfile.mkdtemp(prefix=".replaced-", dir=folder))
    present = {name for name in names if is_there(folder / name)}
    try:
        for name in present:
            (folder / name).rename(hidden / name)
        yield
    except BaseException:
        # What was moved is read from the disk: Ctrl-C may come between a move and any note of it.
        for name in names:
            if is_there(hidden / name):
                remove(folder / name)
                (hidden / name).rename(folder / name)
            elif name not in present:
                remove(folder / name)
        raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def whole_file(what: str, path: str | Path, option: str) -> Iterator[Path]:
    """A hidden file to write; it takes the place of `path` where the block ends well, else it goes.

    Args:
        what: that is written, for errors.
        path: the file; one that is there is replaced.
        option: what chooses it, such as `--to`.

    Raises:
        InputError: its folder is missing, it is a folder, or the disk refuses, also in the block.
    """
    file = user_path(path)
    try:
        if not file.parent.is_dir():
            raise InputError(f"{what}: folder {file.parent} does not exist; make it first")
        if file.is_dir():
            raise InputError(f"{what} is a folder; choose another {option}")
    except OSError as error:
        raise unwritable(what, option, error) from None
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(file)
    except OSError as error:
        raise unwritable(what, option, error) from error
    finally:
        with suppress(OSError):  # of a name too long to be looked for
            part.unlink(missing_ok=True)


def synced(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, link or whole folder, if it is there.

    A folder loses its name first: a process killed meanwhile leaves no half of one behind.
    """
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f"{UNFINISHED}{path.name.removeprefix(UNFINISHED)}")
        if hidden != path:
            if is_there(hidden):
                shutil.rmtree(hidden)
            path.rename(hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was filling or removing in a run folder."""
    for left in folder.glob(f"{UNFINISHED}*"):
        remove(left)


class DiskFile(io.FileIO):
    """A new file that keeps the first failure to write for `check`, in place of raising it.

    It is for HDF5, which where writing fails prints on stderr or ends the process; so it is told
    that all went well.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, "w+")
        self.failure: OSError | None = None

    def check(self) -> None:
        """Raise the `OSError` of the first write that failed, if one did."""
        if self.failure is not None:
            raise self.failure

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while len(rest) and self.failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        self.seek(len(rest), os.SEEK_CUR)
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return self.tell() if size is None else size
