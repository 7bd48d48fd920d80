"""Files that carry a checksum of their own content: JSON in a field, results behind their end."""

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
"""Bytes of a file in memory at a time."""


def write_sealed(file: Path, values: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of its own."""
    file.write_text(json.dumps({**values, "sha256": _sum(values)}, indent=1), encoding="utf-8")


def read_sealed(file: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None where it is unreadable or has changed since."""
    try:
        if not file.is_file():  # but what never ends, such as a pipe
            return None
        held = json.loads(file.read_text(encoding="utf-8"))
        seal = held.pop("sha256")
        return held if seal == _sum(held) else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def seal(file: Path) -> None:
    """Write the checksum of an HDF5 file behind its end, where HDF5 looks for nothing.

    So a result proves itself also where it lies alone, names and attributes included, which HDF5's
    own checksums leave out.
    """
    with file.open("r+b") as opened:
        found, _ = sha256_of(opened)
        opened.write(f"\ngeffect_fast sha256 {found}\n".encode())


def seal_holds(file: Path) -> bool:
    """Whether a file is what it was when it was sealed; also True of one without a seal.

    Files of other programs and of earlier versions have none. It reads the file once, at about
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
    """The checksum of what follows in an open file, and how many bytes that is.

    Args:
        opened: read piece by piece, about 1 GB/s a core.
        n_bytes: no more than these; None: to the end.
        stop: no more is read once it is set.
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
