"""Files with a checksum of their own content: JSON files in a field, results after their end."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

_TRAILER = re.compile(rb"\ngeffect_fast sha256 ([0-9a-f]{64})\n")
_TRAILER_BYTES = 86
_PIECE = 2**20
"""Bytes of a file that are read at a time."""


def write_sealed(file: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, with their checksum in the field `sha256`."""
    file.write_text(json.dumps({**values, "sha256": _sum(values)}, indent=1), encoding="utf-8")


def read_sealed(file: Path) -> dict[str, Any] | None:
    """The values that `write_sealed` wrote; None where the file is unreadable or has changed."""
    try:
        if not file.is_file():  # such as a pipe, which reading would wait for without end
            return None
        held = json.loads(file.read_text(encoding="utf-8"))
        seal = held.pop("sha256")
        return held if seal == _sum(held) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def seal(file: Path) -> None:
    """Write the checksum of an HDF5 file after its end, where HDF5 reads nothing.

    With this checksum a result can be checked without its run folder. It covers names and
    attributes too, which HDF5's own checksums leave out.
    """
    with file.open("r+b") as opened:
        found, _ = sha256_of(opened)
        opened.write(f"\ngeffect_fast sha256 {found}\n".encode())


def seal_holds(file: Path) -> bool:
    """Whether a file is unchanged since it was sealed; True also where the file has no seal.

    Files of other programs and of earlier versions have no seal. The file is read once, at about
    1 GB/s.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(size - _TRAILER_BYTES, 0))
        trailer = _TRAILER.fullmatch(opened.read())
        if trailer is None:
            return True
        opened.seek(0)
        found, _ = sha256_of(opened, size - _TRAILER_BYTES)
    return found.encode() == trailer[1]


def sha256_of(
    opened: BinaryIO, n_bytes: int | None = None, stop: Event | None = None
) -> tuple[str, int]:
    """The checksum of an open file from its current position on, and the number of bytes read.

    Args:
        opened: read piece by piece, at about 1 GB/s a core.
        n_bytes: the most bytes to read; None reads to the end.
        stop: ends the reading once it is set.
    """
    found, size = hashlib.sha256(), 0
    left = math.inf if n_bytes is None else n_bytes
    while (
        left > size
        and not (stop is not None and stop.is_set())
        and (piece := opened.read(int(min(_PIECE, left - size))))
    ):
        found.update(piece)
        size += len(piece)
    return found.hexdigest(), size


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
