"""What a file is where it is no text: a gzip, a table of columns, a pipe, a device."""

from __future__ import annotations

import codecs
import stat
from pathlib import Path

from geffect_fast.errors import InputError

_UNPACKED = "unpack it"
_AS_LINES = (
    "write its rows as JSON lines, such as with pandas' to_json(orient='records', lines=True)"
)
_NO_ROWS = "it holds no rows of text"

_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x1f\x8b", "gzip", _UNPACKED),
    (0, b"PK\x03\x04", "a zip archive", _UNPACKED),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACKED),
    (0, b"BZh", "bzip2", _UNPACKED),
    (0, b"\xfd7zXZ\x00", "xz", _UNPACKED),
    (0, b"\x28\xb5\x2f\xfd", "zstd", _UNPACKED),
    (0, b"\x04\x22\x4d\x18", "lz4", _UNPACKED),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACKED),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACKED),
    (257, b"ustar", "a tar archive", _UNPACKED),
    (0, b"PAR1", "Parquet", _AS_LINES),
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
"""Where in a file that is no text which bytes stand, what it is then, and what to do."""

_TEXTS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "git lfs pull"),
    (b"<!doctype html", "a web page, not the file itself", "download the raw file"),
    (b"<html", "a web page, not the file itself", "download the raw file"),
)
"""How texts begin that are no data, what they are, and what to do."""

_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\r\f")

_KINDS_OF_PLACE = (
    (stat.S_ISFIFO, "a pipe", "save what comes out of it as a file, which can be read again"),
    (stat.S_ISCHR, "a device", "give a file"),
    (stat.S_ISBLK, "a device", "give a file"),
    (stat.S_ISSOCK, "a socket", "give a file"),
)


def check_regular(path: Path, what: str) -> None:
    """Refuse what is there and no file: a read of it may wait or go on for ever.

    Args:
        path: a folder, or what is not there, passes, to be told of by who reads it.
        what: what messages call it.

    Raises:
        InputError: it is a pipe, a device or a socket.
        OSError: the disk refuses to say.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    for is_kind, kind, advice in _KINDS_OF_PLACE:
        if is_kind(mode):
            raise InputError(f"{what} is {kind}; {advice}")


def no_data(head: bytes) -> tuple[str, str] | None:
    """What a file is, and what to do, by its first bytes; None where it may be data.

    Args:
        head: the first 512 bytes, or all.
    """
    for begin, kind, advice in _TEXTS:
        if head.lstrip().lower().startswith(begin):
            return kind, advice
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a letter may be cut at the end
        if not _CONTROL.intersection(head):
            return None  # a text may begin with any of these letters
    except UnicodeDecodeError:
        pass
    for at, magic, kind, advice in _KINDS:
        if head.startswith(magic, at):
            return kind, advice
    # safetensors: the length of its header, and the header, a JSON object
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 2**32 and b"\0" in head[:8]:
        return "safetensors", _NO_ROWS
    return None


def folder_kind(folder: Path) -> str | None:
    """What a folder was made by, where that is a data set's way to lie on a disk."""
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "saved by datasets; give what its load_from_disk returns, or write it with to_json"
    if any(folder.glob("*.parquet")):
        return f"of Parquet files; {_AS_LINES.replace('its', 'their')}"
    return None
