"""The check that a model in a run folder is the one that the run wrote there."""

from __future__ import annotations

from pathlib import Path

from geffect_fast.errors import InputError
from geffect_fast.paths import user_path
from geffect_fast.storage.manifest import Manifest, check_sums

_WEIGHTS = (".safetensors", ".bin")


def check_run_model(source: str | Path, what: str, *, weights: bool) -> None:
    """Raise `InputError` where a file of a model in a run folder is missing, or has other bytes.

    A folder that no manifest names passes: its files have no recorded checksums.

    Args:
        source: folder of a model or tokenizer, such as `RUN/model`; hub ids pass.
        what: the model's name in messages.
        weights: whether the bytes of the weights are checked too, at about 1 GB/s a core; otherwise
            only that the weights' files exist.
    """
    folder = user_path(source).resolve()
    if not folder.is_dir():
        return
    manifest = Manifest.of_a_run(folder.parent)
    if manifest is None:
        return
    begin = f"{folder.name}/"
    sums = {
        name.removeprefix(begin): each
        for name, each in manifest.files.items()
        if name.startswith(begin)
    }
    advice = "bring it back, or move the folder out of its run to use it as it is"
    for name in sums:
        if not (folder / name).is_file():
            raise InputError(
                f"{what} {source}: {name} is missing, though the run wrote it; {advice}"
            )
    if not weights:
        sums = {name: each for name, each in sums.items() if Path(name).suffix not in _WEIGHTS}
    try:
        check_sums(folder, sums, advice, f"{what} {source}: ")
    except OSError as error:
        raise InputError(f"{what} {source} cannot be read: {error.strerror}; {advice}") from None
