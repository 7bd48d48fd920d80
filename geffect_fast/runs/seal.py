"""Files that carry a checksum of their own content: JSON in a field, results behind their end."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    found = hashlib.sha256()
    with file.open("r+b") as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
        opened.write(f"\ngeffect_fast sha256 {found.hexdigest()}\n".encode())


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
        found, left = hashlib.sha256(), size - _TRAILER_BYTES
        while left:
            piece = opened.read(min(_PIECE, left))
            found.update(piece)
            left -= len(piece)
    return found.hexdigest().encode() == trailer[1]


def _sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
