"""Data files, packed or not: opening, reading as text, and recognition of files without data.

This module does not know what rows are. Bytes that are not UTF-8 become half surrogates, which
UTF-8 cannot encode, so that the reader of a line can name the line in an error.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from geffect_fast.errors import InputError, in_one_line

HEAD = 2**16
"""Bytes of a file, unpacked, from which its format is found."""
_GZIP = b"\x1f\x8b"
_UNPACKED = "unpack it"
_AS_LINES = (
    "write its rows as JSON lines, such as with pandas' to_json(orient='records', lines=True)"
)
_NO_ROWS = "it holds no rows of text"

_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, _GZIP, "gzip in gzip", _UNPACKED),
    (0, b"PK\x03\x04", "a zip archive", _UNPACKED),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACKED),
    (0, b"BZh", "bzip2", _UNPACKED),
    (0, b"\xfd7zXZ\x00", "xz", _UNPACKED),
    (0, b"\x28\xb5\x2f\xfd", "zstd", _UNPACKED),
    (0, b"\x04\x22\x4d\x18", "lz4", _UNPACKED),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACKED),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACKED),
    (257, b"ustar", "a tar archive", _UNPACKED),
    (0, b"PARE", "encrypted Parquet", _AS_LINES),
    (0, b"ARROW1", "Arrow", _AS_LINES),
    (0, b"FEA1", "Feather", _AS_LINES),
    (0, b"\xff\xff\xff\xff", "Arrow (a stream)", _AS_LINES),
    (0, b"ORC", "ORC", _AS_LINES),
    (0, b"Obj\x01", "Avro", _AS_LINES),
    (0, b"SQLite format 3\x00", "a SQLite database", _AS_LINES),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file", _AS_LINES),
    (0, b"\x80\x02", "a pickle", _AS_LINES),
    (0, b"\x80\x03", "a pickle", _AS_LINES),
    (0, b"\x80\x04", "a pickle", _AS_LINES),
    (0, b"\x80\x05", "a pickle", _AS_LINES),
    (0, b"\x93NUMPY", "a numpy array", _AS_LINES),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 or NetCDF", _NO_ROWS),
    (0, b"CDF\x01", "NetCDF", _NO_ROWS),
    (0, b"GGUF", "a GGUF model", _NO_ROWS),
    (0, b"%PDF-", "a PDF", _NO_ROWS),
    (0, b"\x89PNG\r\n", "a picture", _NO_ROWS),
    (0, b"\xff\xd8\xff", "a picture", _NO_ROWS),
    (0, b"\x7fELF", "a program", _NO_ROWS),
    (0, b"\xff\xfe\x00\x00", "UTF-32", "save it as UTF-8"),
    (0, b"\x00\x00\xfe\xff", "UTF-32", "save it as UTF-8"),
    (0, b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (0, b"\xfe\xff", "UTF-16", "save it as UTF-8"),
)
"""Kinds of files that are not text: the place and value of their bytes, the kind, and advice."""

_TEXTS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "git lfs pull"),
    (b"<!doctype html", "a web page, not the file itself", "download the raw file"),
    (b"<html", "a web page, not the file itself", "download the raw file"),
)
"""Kinds of texts that hold no data: how they begin, the kind, and advice."""

_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f")

_KINDS_OF_PLACE = (
    (stat.S_ISFIFO, "a pipe", "save what comes out of it as a file, which can be read again"),
    (stat.S_ISCHR, "a device", "give a file"),
    (stat.S_ISBLK, "a device", "give a file"),
    (stat.S_ISSOCK, "a socket", "give a file"),
)


@dataclass(frozen=True)
class DataFile:
    """A data file that a user names.

    Attributes:
        path: path of the file.
        name: the argument that named the file, for messages.
        packed: whether the file is a gzip, by its content.
        head: the first `HEAD` bytes of the file, unpacked.
    """

    path: Path
    name: str
    packed: bool
    head: bytes

    @classmethod
    def found(cls, source: str | os.PathLike[str], name: str, remedy: str) -> DataFile:
        """The file at a path.

        Raises:
            InputError: the file does not exist, cannot be read, or is of a kind that holds no rows.
        """
        place = f"{name}: {shown(source)}"
        with reading(name, source, remedy):
            path = Path(source).expanduser()
            check_regular(path, place)
            with packed_bytes(path) as file:
                packed = file.read(len(_GZIP)) == _GZIP
            found = cls(path, name, packed, b"")
            with found.opened() as file:
                head = file.read(HEAD)
        if none := no_data(head[:512]):
            raise InputError(f"{place} is {none[0]}; {none[1]}; {remedy}")
        return cls(path, name, packed, head)

    @property
    def place(self) -> str:
        """The file's name in messages."""
        return f"{self.name}: {shown(self.path)}"

    @property
    def origin(self) -> str:
        """The end of a row's place in messages, which names the file."""
        return f" of {shown(self.path)}"

    def line(self, number: int) -> str:
        """The place of the file's line `number` in messages, counted from 1."""
        return f"{self.name}: line {number} of {shown(self.path)}"

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file's bytes, unpacked; raises `InputError` where disk or gzip are damaged."""
        advice = "mend it, or fetch it again"
        with reading(self.name, self.path, advice), packed_bytes(self.path) as file:
            if not self.packed:
                yield file
                return
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked  # type: ignore[misc]

    @contextmanager
    def text(self, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
        """Open the file's text, which is read on demand; `newline` is that of `open`."""
        with self.opened() as file:
            yield io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline)

    def head_text(self) -> str:
        """The text of the file's head, without leading white space; its last letter may be cut."""
        text = self.head.decode("utf-8-sig", "surrogateescape")
        return text.replace("\r\n", "\n").replace("\r", "\n").lstrip()

    def check_utf8(self, text: str, number: int) -> str:
        """The text itself, from line `number` on; raises `InputError` where it was not UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            number += text.count("\n", 0, error.start)
            raise InputError(f"{self.line(number)} is not UTF-8; save it as UTF-8") from None
        return text


def shown(source: object) -> str:
    """A path as messages show it, cut to 200 characters."""
    if not isinstance(source, str | os.PathLike):
        return "the data set"
    text = repr(os.fspath(source))
    return text if len(text) <= 200 else f"{text[:200]}..."


def packed_bytes(path: Path) -> BinaryIO:
    """Open a file's bytes as they lie on the disk."""
    return path.open("rb")


@contextmanager
def reading(name: str, source: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Turn errors in reading the file of an argument into an `InputError` of one line."""
    file = shown(source)
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}: file {file} does not exist; {remedy}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{name}: {file} is a damaged gzip ({in_one_line(error)}); fetch it again"
        ) from None
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = in_one_line(getattr(error, "strerror", None) or error)
        raise InputError(f"{name}: cannot read {file} ({reason}); {remedy}") from None


def check_regular(path: Path, what: str) -> None:
    """Refuse a pipe, a device or a socket, of which a read may wait or go on for ever.

    Args:
        path: the path. A folder, or a path that does not exist, passes: the reader tells of it.
        what: the path's name in messages.

    Raises:
        InputError: the path is a pipe, a device or a socket.
        OSError: the disk refuses to tell.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    for is_kind, kind, advice in _KINDS_OF_PLACE:
        if is_kind(mode):
            raise InputError(f"{what} is {kind}; {advice}")


def no_data(head: bytes) -> tuple[str, str] | None:
    """The kind of a file without data, and advice, by its first bytes; None where it may be data.

    Args:
        head: the first 512 bytes of the file, or all of a shorter one.
    """
    for begin, kind, advice in _TEXTS:
        if head.lstrip().lower().startswith(begin):
            return kind, advice
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
        if not _CONTROL.intersection(head):
            return None  # a text may begin with the letters of a magic number
    except UnicodeDecodeError:
        pass
    for at, magic, kind, advice in _KINDS:
        if head.startswith(magic, at):
            return kind, advice
    # safetensors begins with the length of its header, then the header, a JSON object.
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 2**32 and b"\0" in head[:8]:
        return "safetensors", _NO_ROWS
    return None
