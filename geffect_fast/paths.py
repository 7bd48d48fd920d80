"""Paths as users write them: `~`, folders that may be missing, patterns of checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from geffect_fast.errors import InputError

_NUMBER = re.compile(r".*[-_](\d+)")


def user_path(path: str | Path) -> Path:
    """A path with `~` written out; `~name` of an unknown user stays, and later errors name it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_there(path: Path) -> bool:
    """Whether a file, folder or link, even a broken one, is there; other errors are raised."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """Folders or hub ids by short names: as few of their last parts as tell them apart.

    Parts that all sources end with are left out: `ga/model` and `npo/model` become `ga` and `npo`.
    """
    parts = [source.rstrip("/").split("/") for source in sources]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    for n in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names) and all(names):
            return dict(zip(names, sources, strict=True))
    return {source: source for source in sources}


def find_checkpoints(checkpoints: str | Path | Sequence[str | Path]) -> dict[int, Path]:
    """Folders of checkpoints by the number of updates they were saved after, in order.

    Args:
        checkpoints: patterns such as `out/checkpoint-*`, or folders. The number is the one that
            ends a folder's name, or else the `global_step` of its `trainer_state.json`. A pattern
            skips folders that hold nothing but folders, such as evaluations kept by step.

    Raises:
        InputError: a pattern matches no folder, or only folders that are skipped; a folder has no
            number, or two have the same.
    """
    given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    found: dict[int, Path] = {}
    for each in given:
        folders = [user_path(each)]
        if not folders[0].is_dir():
            root = Path(folders[0].anchor)
            matching = root.glob(str(folders[0].relative_to(root)))
            among = [path for path in matching if path.is_dir()]
            folders = [path for path in among if not _holds_folders_alone(path)]
            if among and not folders:
                raise InputError(
                    f"checkpoints: no folder that matches {each} holds a model, {min(among)} has "
                    "folders alone; save checkpoints in training (save_strategy)"
                )
        if not folders:
            raise InputError(
                f"checkpoints: no folder matches {each}; give a pattern such as 'out/checkpoint-*'"
            )
        for folder in sorted(path.absolute() for path in folders):
            step = _step_of(folder)
            if found.setdefault(step, folder) != folder:
                raise InputError(
                    f"checkpoints: {found[step]} and {folder} are both of step {step}; leave one "
                    "out"
                )
    if not found:
        raise InputError(
            "checkpoints: the list is empty; give a pattern such as 'out/checkpoint-*'"
        )
    return dict(sorted(found.items()))


def _holds_folders_alone(folder: Path) -> bool:
    """Whether a folder holds folders and no file, and so no model.

    open-unlearning's evaluations lie in `checkpoint-STEP/evals`, whether a checkpoint was saved
    there or not.
    """
    try:
        held = [path.is_dir() for path in folder.iterdir()]
    except OSError:  # reading the checkpoint will raise the error
        return False
    return bool(held) and all(held)


def _step_of(folder: Path) -> int:
    named = _NUMBER.fullmatch(folder.name)
    if named is not None:
        return int(named[1])
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise InputError(
            f"checkpoint {folder}: neither its name ends in a number, as in checkpoint-10, nor is "
            "there a trainer_state.json with a global_step; rename it"
        ) from None
