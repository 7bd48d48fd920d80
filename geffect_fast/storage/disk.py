"""Writing that a full disk or Ctrl-C may stop at any point, and leave what was there before."""

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
"""How the name of a folder in a run folder begins while a process fills or removes it."""

REPLACED = ".replaced-"
"""How the name of a folder begins that holds what a new run takes the place of, until it has."""

_RUN_PART = re.compile(r"\.(run\.yaml|manifest\.json|results\.nc|report\.html)\..+\.\d+\.part")
"""What `part_of` calls files of a run, which are written by who holds the folder's lock."""

_NOTE = "note.json"
_ASIDE = "aside"


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


def shared_folder(folder: Path | None, ranks: Ranks) -> Path:
    """The folder that the first of ranks works in, which all are to see.

    Args:
        folder: of the first; None: this is another rank.
        ranks: who work together.

    Raises:
        InputError: this rank does not see it.
    """
    folder = ranks.first_of(folder)
    assert folder is not None
    if not ranks.first and not folder.is_dir():
        raise InputError(
            f"--out: the folder {folder} of the first rank is not to be seen from this one; "
            "choose one on a disk that all ranks share"
        )
    return folder


def check_usable(folder: str | Path) -> Path:
    """The absolute path of a run folder that is there, or can be made; touches nothing.

    Raises:
        InputError: it is a file, or cannot be written to.
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
    """Move files and folders of these names out of the way; they are back if the block fails.

    Where it does, whatever it made under these names goes; where it does not, what was set aside
    goes. What is to be put back is written down before anything moves, so that `recovered` can do
    it for a process that was killed in the block.

    Args:
        folder: they are in; folders that become empty go.
        names: paths in it.
        source: folder in it that the block moves new ones out of, and to which these return where
            the block fails; None: they are made anew, and go then.
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
        hidden.rename(done)  # from here on what the block made counts
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
    """Put right what a killed process left in a run folder: what it set aside is back, halves go.

    The caller holds the folder's lock.

    Raises:
        OSError: the disk refuses.
        InputError: a version without notes set aside what cannot be put back without a loss.
    """
    for hidden in sorted(folder.glob(f"{REPLACED}*"), reverse=True):  # the innermost first
        _put_back(folder, hidden)
    remove_unfinished(folder)
    for left in folder.glob(".*.part"):
        if _RUN_PART.fullmatch(left.name):
            left.unlink()


def check_inside(folder: Path, name: str) -> None:
    """Raise `InputError` where a path that was read from a file leads out of a folder, or is it."""
    try:
        above, root = os.path.realpath((folder / name).parent), os.path.realpath(folder)
        inside = Path(name).name not in ("", "..") and os.path.commonpath([above, root]) == root
        is_there(folder / name)
    except (OSError, ValueError):  # of a name that no file has
        inside = False
    if not inside:
        raise InputError(f"run folder {folder}: {name!r} is no file in it; it is left alone")


def _put_back(folder: Path, hidden: Path) -> None:
    """Undo a `set_aside` that did not come to its end; may itself be stopped and done again."""
    if is_there(hidden / _NOTE):
        note = _note_in(folder, hidden)
    else:
        note = _note_of_old(folder, hidden)
    source = note["source"]
    for name in [*note["names"], *note["folders"], *([source] if source else [])]:
        check_inside(folder, name)
    for name in note["names"]:
        # What was moved is read from the disk: a kill may come between a move and any note of it.
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
    """The note of what was set aside; raise `InputError` where that is damaged."""
    try:
        note = json.loads((hidden / _NOTE).read_text(encoding="utf-8"))
        lists = [note["names"], note["present"], note["folders"]]
        whole = isinstance(note["source"], str | None) and all(
            isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(
            f"run folder {folder} holds {hidden.name}, an earlier run that a killed process set "
            f"aside, and the {_NOTE} in it is damaged; move what is in {hidden.name}/{_ASIDE} back "
            f"to its place, or away, and remove {hidden.name}"
        )
    return dict(note)


def _note_of_old(folder: Path, hidden: Path) -> dict[str, Any]:
    """The note of what a version without notes set aside, where all of it can be put back."""
    names = [path.name for path in hidden.iterdir() if path.name != _ASIDE]
    for name in names:
        if is_there(folder / name):
            raise InputError(
                f"run folder {folder} holds {hidden.name}, an earlier run that a killed process "
                f"set aside, and {name} beside it; move one of them away"
            )
        (hidden / _ASIDE).mkdir(exist_ok=True)
        (hidden / name).rename(hidden / _ASIDE / name)
    aside = hidden / _ASIDE
    names = [path.name for path in aside.iterdir()] if aside.is_dir() else []
    return {"names": names, "present": names, "folders": [], "source": None}


def _remove_empty(folder: Path, names: Iterable[str]) -> None:
    for name in sorted(names, reverse=True):  # what is inside first
        with suppress(OSError):  # not empty, or not there
            (folder / name).rmdir()


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
        with suppress(OSError):  # of a name too long to be looked for
            part.unlink(missing_ok=True)


def part_of(file: Path) -> Path:
    """Where this process writes a file, before that takes its place."""
    return file.with_name(f".{file.name}.{platform.node()}.{os.getpid()}.part")


def _lives(pid: str) -> bool:
    """Whether there is a process of that number here; also True of what is no number."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        pass
    return True


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
