"""The form of a row of the catalogue of mistakes, and ways to break a folder that works."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Break = Callable[[Path, object], object]
"""A function that breaks something in a folder, or in a module by `pytest.MonkeyPatch`."""


@dataclass(frozen=True)
class Case:
    """A mistake, and what is said of it.

    Attributes:
        id: the mistake.
        run: a command line, or a call in Python that is given the folder.
        culprit: what the line must name.
        remedy: what it must advise.
        broken: prepares the folder; None: it is fine as it is.
        code: the exit code, of a command or of the error that a call raises.
        largest_file: bytes beyond which no file may grow, which is what a full disk is to a
            program; None: no limit.
    """

    id: str
    run: list[str] | Callable[[Path], object]
    culprit: str
    remedy: str
    broken: Break | None = None
    code: int = 2
    largest_file: int | None = None


def profile(**changes: str | None) -> list[str]:
    """A `profile` command line that works, with some options changed; None leaves an option out."""
    options = {
        "model": "model",
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "refusals": "refusals.txt",
        "objectives": "ga",
        "out": "run",
    } | changes
    pairs = [(f"--{key.replace('_', '-')}", value) for key, value in options.items()]
    return ["profile", "--quiet", *(w for pair in pairs if pair[1] is not None for w in pair)]


def check(*more: str, data: str = "forget.jsonl") -> list[str]:
    """A `check` command line that works, with options added."""
    return ["check", "--quiet", "--model", "model", "--data", data, "--samples", "2", *more]


# ---- ways to break something ----


def both(*breaks: Break) -> Break:
    """Break a folder in all of the given ways, in order."""

    def apply(here: Path, patch: object) -> None:
        for each in breaks:
            each(here, patch)

    return apply


def holds(name: str, content: str | bytes) -> Break:
    """Write a file, and make the folders above it."""
    data = content.encode() if isinstance(content, str) else content

    def apply(here: Path, _patch: object) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)

    return apply


def line(name: str, number: int, text: str | bytes) -> Break:
    """Replace line `number` (from 1) of a file."""
    data = text.encode() if isinstance(text, str) else text

    def apply(here: Path, _patch: object) -> None:
        lines = (here / name).read_bytes().splitlines()
        lines[number - 1] = data
        (here / name).write_bytes(b"\n".join(lines) + b"\n")

    return apply


def row(number: int, name: str = "forget.jsonl", /, **fields: object) -> Break:
    """Write a row of these fields as line `number` of a data file."""
    return line(name, number, json.dumps(fields))


def rows(*several: dict[str, object], name: str = "forget.jsonl") -> Break:
    """Write a data file of these rows."""
    return holds(name, "\n".join(map(json.dumps, several)))


def cut(name: str, size: int) -> Break:
    """Keep only the first bytes of a file."""
    return lambda here, _patch: os.truncate(here / name, size)


def gone(*patterns: str) -> Break:
    """Remove files."""

    def apply(here: Path, _patch: object) -> None:
        for pattern in patterns:
            for file in here.glob(pattern):
                file.unlink()

    return apply


def settings(name: str, **values: object) -> Break:
    """Change values in a JSON file; None takes a value out."""

    def apply(here: Path, _patch: object) -> None:
        content = json.loads((here / name).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (here / name).write_text(json.dumps(kept))

    return apply


def weight(name: str, value: float, folder: str = "model") -> Break:
    """Set the first number of a weight to `value`."""

    def apply(here: Path, _patch: object) -> None:
        from safetensors.torch import load_file, save_file

        file = here / folder / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        tensors[name].view(-1)[0] = value
        save_file(tensors, file, {"format": "pt"})

    return apply


def patched(target: str, failure: BaseException | Callable[..., object]) -> Break:
    """Make a function or method raise an error, or replace it by another one."""

    def fail(*_args: object, **_kwargs: object) -> None:
        raise failure

    replacement = fail if isinstance(failure, BaseException) else failure
    return lambda _here, patch: patch.setattr(target, replacement)


def tokens(*ids: int, **more: object) -> dict[str, object]:
    """A tokenised row with labels on all but the first token."""
    return {"input_ids": list(ids), "labels": [-100, *ids[1:]]} | more


def no_memory(*_args: object, **_kwargs: object) -> None:
    """Fail as torch does on a CPU without memory: ask for more memory than exists anywhere."""
    torch.empty(2**60, dtype=torch.uint8)


def snapshot(folder: Path) -> dict[str, str]:
    """The digest of every file's bytes, by name, and the name of every folder."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:  # a case may have patched `read_bytes`
            return hashlib.sha256(opened.read()).hexdigest()

    return {
        str(path.relative_to(folder)): digest(path) if path.is_file() else "no file"
        for path in folder.rglob("*")
    }


@contextlib.contextmanager
def largest_file(size):
    """Limit files to `size` bytes: writing more is an OSError, as Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
