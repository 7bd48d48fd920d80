"""Safe writing: a full disk, Ctrl-C or a kill at any point leaves the earlier files in place."""

from __future__ import annotations

import glob
import io
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from geffect_fast.errors import InputError
from geffect_fast.paths import is_there, user_path
from geffect_fast.ranks import Ranks

UNFINISHED = ".unfinished-"
"""Prefix of a folder in a run folder while a process fills or removes that folder."""

REPLACED = ".replaced-"
"""Prefix of a folder that holds the files set aside for a new run, until the run is in place."""

_RUN_PART = re.compile(r"\.(run\.yaml|manifest\.json|results\.nc|report\.html)\..+\.\d+\.part")
"""Names that `part_of` gives to a run's files; only the holder of the folder's lock writes them."""

_NOTE = "note.json"
_ASIDE = "aside"


def unwritable(what: str, place: str, error: OSError) -> InputError:
    """The error to raise where the disk refuses.

    Args:
        what: the file or folder that cannot be written, in words.
        place: the option with which another place can be chosen, such as `--out`.
        error: the disk's error.
    """
    reason = error.strerror or error
    return InputError(
        f"{what} cannot be written: {reason}; free some space or choose another {place}"
    )


@contextmanager
def folder_for(what: str, path: Path) -> Iterator[None]:
    """Make a folder and its parents; if the block fails, remove those that were made and are empty.

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


def shared_folder(folder: Path | None, ranks: Ranks) -> Path:
    """The folder in which the first rank works, once every rank has checked that it sees it.

    Args:
        folder: the folder, on the first rank; None on the other ranks.
        ranks: the ranks that work together.

    Raises:
        InputError: this rank does not see the folder.
    """
    folder = ranks.first_of(folder)
    assert folder is not None
    if not ranks.first and not folder.is_dir():
        raise InputError(
            f"--out: the folder {folder} of the first rank cannot be seen from this rank; "
            "choose one on a disk that all ranks share"
        )
    return folder


def check_usable(folder: str | Path) -> Path:
    """The absolute path of a run folder that exists or can be made; nothing is changed.

    Raises:
        InputError: the folder or one above it is a file, or cannot be written to.
    """
    path = user_path(folder).absolute()
    try:
        existing = next(p for p in (path, *path.parents) if is_there(p))
    except OSError as error:
        raise unwritable(f"run folder {folder}", "--out", error) from None
    if not existing.is_dir():
        raise InputError(f"run folder {folder}: {existing} is a file; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"run folder {folder}: {existing} is not writable; choose another --out")
    return path


@contextmanager
def set_aside(folder: Path, names: Iterable[str], source: Path | None = None) -> Iterator[None]:
    """Move files and folders out of the way, and put them back if the block fails.

    If the block fails, everything that it made under these names is removed. If the block ends
    well, the files that were set aside are removed. A note of what to put back is written before
    anything moves, so that `recovered` can put it back for a process that was killed in the block.

    Args:
        folder: holds the files and folders; folders inside that become empty are removed.
        names: paths in `folder`.
        source: folder inside `folder` out of which the block moves new files, and to which they
            return if the block fails; None: the block makes the files anew, and they are then
            removed.
    """
    names = sorted(set(names))
    above = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
    note: dict[str, Any] = {
        "names": names,
        "present": [name for name in names if is_there(folder / name)],
        "folders": sorted(each for each in above if not is_there(folder / each)),
        "source": None if source is None else source.relative_to(folder).as_posix(),
    }
    hidden = folder / f"{REPLACED}{time.time_ns()}"
    begun = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
    done = begun.with_name(f"{begun.name}-done")
    try:
        (begun / _NOTE).write_text(json.dumps(note), encoding="utf-8")
        synced(begun / _NOTE)
        synced(begun)
        begun.rename(hidden)
        for name in note["present"]:
            aside = hidden / _ASIDE / name
            aside.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(aside)
        yield
        synced(folder)
        hidden.rename(done)  # from here on the files that the block made count
        synced(folder)
        _remove_empty(folder, above)
    except BaseException:
        if is_there(hidden):
            _put_back(folder, hidden)
        raise
    finally:
        for left in (begun, done):
            shutil.rmtree(left, ignore_errors=True)


def recovered(folder: Path) -> None:
    """Recover a run folder from a killed process: put back files set aside, remove unfinished ones.

    The caller holds the folder's lock.

    Raises:
        OSError: the disk refuses.
        InputError: the note of the files set aside is missing or damaged, or names a path outside
            the folder.
    """
    for hidden in sorted(folder.glob(f"{REPLACED}*"), reverse=True):  # the innermost first
        _put_back(folder, hidden)
    remove_unfinished(folder)
    for left in folder.glob(".*.part"):
        if _RUN_PART.fullmatch(left.name):
            left.unlink()


def check_inside(folder: Path, name: str) -> None:
    """Raise `InputError` where a path read from a file is not strictly inside a folder."""
    try:
        above, root = os.path.realpath((folder / name).parent), os.path.realpath(folder)
        inside = Path(name).name not in ("", "..") and os.path.commonpath([above, root]) == root
        is_there(folder / name)
    except (OSError, ValueError):  # a name that no file can have
        inside = False
    if not inside:
        raise InputError(f"run folder {folder}: {name!r} is no file in it; it is left alone")


def _put_back(folder: Path, hidden: Path) -> None:
    """Undo an unfinished `set_aside`; this may itself be stopped at any point and done again."""
    note = _note_in(folder, hidden)
    source = note["source"]
    for name in [*note["names"], *note["folders"], *([source] if source else [])]:
        check_inside(folder, name)
    for name in note["names"]:
        # The disk shows which files were moved: a kill may come between a move and any note of it.
        aside, place = hidden / _ASIDE / name, folder / name
        if is_there(place) and (is_there(aside) or name not in note["present"]):
            origin = folder / source / name if source else None
            if origin is None or is_there(origin):
                remove(place)
            else:
                origin.parent.mkdir(parents=True, exist_ok=True)
                place.rename(origin)
        if is_there(aside):
            place.parent.mkdir(parents=True, exist_ok=True)
            aside.rename(place)
    _remove_empty(folder, note["folders"])
    synced(folder)
    remove(hidden)


def _note_in(folder: Path, hidden: Path) -> dict[str, Any]:
    """Read the note of the files set aside; raise `InputError` if it is missing or damaged."""
    try:
        note = json.loads((hidden / _NOTE).read_text(encoding="utf-8"))
        lists = [note["names"], note["present"], note["folders"]]
        whole = isinstance(note["source"], str | None) and all(
            isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(
            f"run folder {folder} holds {hidden.name}, an earlier run that a killed process set "
            f"aside, and the {_NOTE} in it is missing or damaged; move what is in "
            f"{hidden.name}/{_ASIDE} back to its place, or away, and remove {hidden.name}"
        )
    return dict(note)


def _remove_empty(folder: Path, names: Iterable[str]) -> None:
    for name in sorted(names, reverse=True):  # what is inside first
        with suppress(OSError):  # not empty, or not there
            (folder / name).rmdir()


@contextmanager
def whole_file(what: str, path: str | Path, option: str) -> Iterator[Path]:
    """A hidden file that replaces `path` when the block ends well, and is else removed.

    Args:
        what: the file in words, for errors.
        path: the file's path; an existing file is replaced.
        option: the option that gives the path, such as `--to`.

    Raises:
        InputError: the file's folder is missing, `path` is a folder, or the disk refuses, also in
            the block.
    """
    file = user_path(path)
    try:
        if not file.parent.is_dir():
            raise InputError(f"{what}: folder {file.parent} does not exist; make it first")
        if file.is_dir():
            raise InputError(f"{what} is a folder; choose another {option}")
    except OSError as error:
        raise unwritable(what, option, error) from None
    part = part_of(file)
    try:
        for left in file.parent.glob(f"{glob.escape(part.name.rsplit('.', 2)[0])}.*.part"):
            if not _lives(left.suffixes[-2].removeprefix(".")):
                left.unlink(missing_ok=True)
        yield part
        synced(part)
        part.replace(file)
        synced(file.parent)
    except OSError as error:
        raise unwritable(what, option, error) from error
    finally:
        with suppress(OSError):  # such as a name too long for the file system
            part.unlink(missing_ok=True)


def part_of(file: Path) -> Path:
    """The path to which this process writes a file before it is renamed to `file`."""
    return file.with_name(f".{file.name}.{platform.node()}.{os.getpid()}.part")


def _lives(pid: str) -> bool:
    """Whether a process of this number runs on this computer; True also where it is no number."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


def synced(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, link or whole folder, if it exists.

    A folder is renamed to a hidden name first, so that a process killed meanwhile leaves no half of
    a folder under the original name.
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
    """Remove the hidden folders that a killed process was filling or removing in a run folder."""
    for left in folder.glob(f"{UNFINISHED}*"):
        remove(left)


class DiskFile(io.FileIO):
    """A new file that keeps the first failed write for `check` instead of raising its error.

    HDF5 prints on stderr or ends the process where writing fails. With this file every write looks
    successful to HDF5.
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
