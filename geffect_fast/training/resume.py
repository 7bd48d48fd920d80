"""Checkpoints to resume from; a checkpoint is either complete or does not exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.parts import part_of
from geffect_fast.errors import InputError
from geffect_fast.measure.models import has_remote_code, load_like
from geffect_fast.storage.disk import UNFINISHED, remove, synced
from geffect_fast.storage.manifest import check_sums, checksums, files_below
from geffect_fast.storage.seal import read_sealed, write_sealed

MARK = "geffect_fast.json"
"""File that marks a checkpoint of ours and names its run and step; it is written last."""

RULE_STATE = "update_rule.pt"
"""File of a checkpoint with the state of an update rule other than the plain gradient."""

_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""Files of a checkpoint without which transformers would resume too, but to other numbers."""


def saving_folder(run: Path) -> Path:
    """The folder where a checkpoint is written until it is complete and moved to its place."""
    return run / f"{UNFINISHED}checkpoint"


@contextmanager
def saving(run: Path, step: int, identity: str) -> Iterator[None]:
    """Make a checkpoint of what the block writes to `checkpoint-STEP` in `saving_folder`.

    Args:
        run: folder of the run.
        step: updates done.
        identity: identity of the run.
    """
    remove(saving_folder(run))  # left by a killed process
    try:
        yield
        written = saving_folder(run) / f"checkpoint-{step}"
        names = files_below(written)
        sums = checksums(written, names)
        write_sealed(written / MARK, {"identity": identity, "step": step, "files": dict(sums)})
        for name in [*names, MARK]:
            synced(written / name)
        synced(written)
        remove(run / written.name)  # only one of this run and step can be there
        written.rename(run / written.name)
        synced(run)
    finally:
        remove(saving_folder(run))


def checkpoints(run: Path, identity: str | None = None) -> dict[int, Path]:
    """The complete checkpoints in a folder by step, in ascending order.

    Args:
        run: the folder.
        identity: identity of the run that the checkpoints belong to; None: any unlearning run.
    """
    found = {}
    for folder in run.glob("checkpoint-*") if run.is_dir() else ():
        held = _mark_of(folder)
        if held is not None and identity in (None, held["identity"]):
            found[int(held["step"])] = folder
    return dict(sorted(found.items()))


def check_whole(folder: Path) -> None:
    """Raise `InputError` where a file of a checkpoint is missing or not as it was saved."""
    advice = f"remove the folder {folder.name} to train again from what is before it"
    mark = _mark_of(folder)
    assert mark is not None
    if "files" in mark:
        check_sums(folder, mark["files"], advice)
    for name in _STATE:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing, though the run wrote it; {advice}")


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint, a model's or an adapter's, into a model of the same kind.

    A model's weights come through transformers' own loader, since the saved tensors may have other
    names and shapes than the model's parameters (fused experts).

    Raises:
        InputError: the checkpoint is damaged, or belongs to another model.
    """
    if hasattr(model, "peft_config"):
        import peft

        saved = peft.utils.load_peft_weights(str(folder), device="cpu")
        if not is_sharded(model):
            peft.set_peft_model_state_dict(model, saved)
            return
        own = peft.get_peft_model_state_dict(model)
    else:
        saved, own = _saved_weights(model, folder), model.state_dict()
    odd = sorted(saved.keys() ^ own.keys()) or [
        name for name, tensor in own.items() if tensor.shape != saved[name].shape
    ]
    if odd:
        raise InputError(f"checkpoint {folder}: {odd[0]} is not as in the model; remove the folder")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(part_of(saved[name], tensor))


def _saved_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    trusted = has_remote_code(model)
    return load_like(folder, model, "checkpoint", trusted, whole_on="cpu").state_dict()


def _mark_of(folder: Path) -> dict[str, Any] | None:
    """The mark of a checkpoint; None where no unlearning run made it, or the mark is damaged."""
    try:
        held = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if {"files", "sha256"} & held.keys():  # marks of earlier versions have neither
            held = read_sealed(folder / MARK)
        known = isinstance(held["identity"], str) and isinstance(held["step"], int)
        return held if known else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
