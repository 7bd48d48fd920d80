"""The manifest of a run: sizes and checksums of the files that it wrote, and of its inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from geffect_fast.errors import InputError
from geffect_fast.paths import is_there
from geffect_fast.storage.disk import check_inside, part_of, synced
from geffect_fast.storage.seal import read_sealed, sha256_of, write_sealed

MANIFEST = "manifest.json"

Sums = Mapping[str, Mapping[str, Any]]
"""The `bytes` and `sha256` of files, by path within their folder."""


@dataclass(frozen=True)
class Manifest:
    """The checksums of a run's files and of its inputs.

    Attributes:
        files: checksums of the run's files, by path within its folder.
        inputs: checksums of the files behind each input, by option.
    """

    files: Sums
    inputs: Mapping[str, Sums] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read the manifest of a folder; None where there is none.

        Raises:
            InputError: the manifest is damaged, or names files outside of the folder.
        """
        file = folder / MANIFEST
        if not is_there(file):
            return None
        held = read_sealed(file)
        inputs = None if held is None else held.get("inputs")
        if (
            held is None
            or not isinstance(inputs, dict)
            or not all(map(_are_sums, (held.get("files"), *inputs.values())))
        ):
            raise InputError(
                f"{file} is not as a run wrote it: damaged, edited or of another program; move it "
                "away to go on without its checksums"
            )
        for name in held["files"]:
            check_inside(folder, name)
        return cls(held["files"], inputs)

    @classmethod
    def of_a_run(cls, folder: Path) -> Manifest | None:
        """Read the manifest like `read`; None also where another program's file has its name.

        A folder without `run.yaml` and `results.nc` is taken for another program's.

        Raises:
            InputError: the folder is a run's, and the manifest is damaged.
        """
        try:
            return cls.read(folder)
        except InputError:
            if is_there(folder / "run.yaml") or is_there(folder / "results.nc"):
                raise
            return None

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder; an existing one is replaced in one step."""
        part = part_of(folder / MANIFEST)
        try:
            write_sealed(part, {"files": dict(self.files), "inputs": dict(self.inputs)})
            synced(part)
            part.replace(folder / MANIFEST)
            synced(folder)
        finally:
            part.unlink(missing_ok=True)


def add_to_manifest(folder: Path, *names: str) -> None:
    """Add new or rewritten files to the manifest of a run, where it has one."""
    manifest = Manifest.read(folder)
    if manifest is not None:
        Manifest({**manifest.files, **checksums(folder, names)}, manifest.inputs).write(folder)


def check_file(folder: Path, name: str, advice: str = "repeat the run") -> bool:
    """Raise `InputError` where a file of a run is not what the run wrote.

    Returns:
        Whether the folder's manifest names the file. A file without a checksum passes, since runs
        of earlier versions have no manifest.
    """
    manifest = Manifest.read(folder)
    if manifest is None or name not in manifest.files:
        return False
    check_sums(folder, {name: manifest.files[name]}, advice)
    return True


def check_sums(folder: Path, sums: Sums, advice: str, place: str | None = None) -> None:
    """Raise `InputError` naming the first file that is missing or differs from its checksum.

    Args:
        folder: holds the files.
        sums: the checksums of the files.
        advice: the remedy in messages.
        place: what stands before a file's name in messages; None: its folder.
    """
    place = f"{folder}/" if place is None else place
    for name in sums:
        if not (folder / name).is_file():
            raise InputError(f"{place}{name} is missing, though the run wrote it; {advice}")
    found = checksums(folder, sums)
    for name, expected in sums.items():
        if found[name]["bytes"] != expected["bytes"]:
            raise InputError(
                f"{place}{name} is torn or was replaced: it has {found[name]['bytes']} bytes, "
                f"and {expected['bytes']} were written; {advice}"
            )
        if found[name] != expected:
            raise InputError(
                f"{place}{name} is damaged or was replaced: its checksum is not that of what was "
                f"written; {advice}"
            )


def checksums(folder: Path, names: Iterable[str], stop: Event | None = None) -> Sums:
    """Sizes and SHA-256 of files, each read once, piece by piece, several files at a time.

    Reading takes about 1 GB/s a core: the shards of a model of 14 GB take some four seconds on four
    cores.

    Args:
        folder: holds the files.
        names: paths of the files in `folder`.
        stop: set once nobody needs the checksums any more; those returned are then wrong.
    """
    names = list(names)

    def summed(name: str) -> dict[str, Any]:
        with (folder / name).open("rb") as file:
            found, size = sha256_of(file, stop=stop)
        return {"bytes": size, "sha256": found}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(summed, names), strict=True))


def files_below(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative to it, in order; links count as files."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _are_sums(held: object) -> bool:
    """Whether a value read from a manifest has the form of `Sums`."""
    return isinstance(held, dict) and all(
        isinstance(each, dict)
        and isinstance(each.get("bytes"), int)
        and isinstance(each.get("sha256"), str)
        for each in held.values()
    )
