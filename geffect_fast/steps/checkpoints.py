"""Loading of a training's checkpoints, one after the other, into one model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import check_finite, own_part
from geffect_fast.capture.parts import part_of
from geffect_fast.errors import InputError
from geffect_fast.measure.models import has_remote_code, load_model
from geffect_fast.measure.precision import dtype_name
from geffect_fast.storage.run_model import check_run_model

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_SAME_NUMBERS = re.compile(
    r"_.*|.*_token_id|.*_version|(torch_)?dtype|use_cache|architectures|inference_mode"
)
"""Settings of models and adapters that change no number of a profile."""


def loaded_in_turn(
    model: nn.Module, first: Path, folders: Mapping[int, Path], wanted: Sequence[int]
) -> Iterator[int]:
    """Load one checkpoint after the other into a model, and yield the step of each.

    While the caller works on a step, a thread reads the next checkpoint's tensors from disk.

    Args:
        model: the model of `first`, changed in place.
        first: folder from which the model was loaded.
        folders: folders of checkpoints, by step.
        wanted: steps, in the order in which they are loaded.

    Raises:
        InputError: a checkpoint is damaged, or has another config or architecture. The message
            names the checkpoint, and the setting or tensor.
        NonFiniteError: a weight is NaN or infinite.
    """
    held = _Read.of(first, tensors=False)
    with ThreadPoolExecutor(1, "checkpoint") as pool:
        ahead: Future[_Read] | None = None
        for number, step in enumerate(wanted):
            folder = folders[step]
            read = ahead.result() if ahead is not None else _Read.of(folder)
            ahead = None
            if folder != held.folder:
                read.copy_to(model, held)
            held = _Read(folder, read.settings, None)
            if number + 1 < len(wanted):
                ahead = pool.submit(_Read.of, folders[wanted[number + 1]])
            del read
            yield step


@dataclass(frozen=True)
class _Read:
    """The content of a checkpoint's folder, in memory.

    Attributes:
        folder: path of the folder.
        settings: contents of its config.json and adapter_config.json.
        tensors: weights by name; None where they are not plain safetensors files, or where reading
            failed. The loader of transformers then loads them, or says what is wrong.
        damage: the error where a run's manifest shows that a file is missing or changed.
    """

    folder: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    damage: InputError | None = None

    @classmethod
    def of(cls, folder: Path, tensors: bool = True) -> _Read:
        """Read a folder, without raising errors, since this may run in a thread."""
        from safetensors.torch import load_file

        settings: dict[str, Any] = {}
        found: dict[str, Tensor] | None = None
        damage = None
        try:
            check_run_model(folder, "checkpoint", weights=tensors)
        except InputError as error:
            damage = error
        try:
            for name in ("config.json", "adapter_config.json"):
                if (folder / name).exists():
                    settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            if tensors and not (folder / "adapter_config.json").exists():
                found = {}
                for file in _files(folder):
                    # Copies, since `load_file` maps the file and reads it on access.
                    found |= {name: x.clone() for name, x in load_file(folder / file).items()}
        except Exception:  # any error: the loader raises it again, in the caller's thread
            found = None
        return cls(folder, settings, found, damage)

    def copy_to(self, model: nn.Module, other: _Read) -> None:
        """Copy the weights into a model that was loaded from another checkpoint, `other`.

        Where ranks share the model each rank copies its part.

        Raises:
            InputError, NonFiniteError: as in `loaded_in_turn`.
        """
        if self.damage is not None:
            raise self.damage
        own = model.state_dict(keep_vars=True)
        tensors = self.tensors
        if tensors is None or not _fit(own, tensors):
            # Weights with other names and shapes in files than in the model (fused experts),
            # adapters, and old formats. The loader also raises the errors for damaged files.
            loaded = load_model(
                self.folder,
                _dtype_of(model),
                "cpu",
                "checkpoint",
                trust_remote_code=has_remote_code(model),
            )
            tensors = loaded.state_dict()
            self._check_same(own, tensors, other)
        for key in sorted({*self.settings, *other.settings}):
            values = [read.settings.get(key) for read in (self, other)]
            # Adapters write their set of modules in any order, so lists are compared sorted.
            values = [sorted(map(str, v)) if isinstance(v, list) else v for v in values]
            if values[0] != values[1] and not _SAME_NUMBERS.fullmatch(key):
                raise InputError(
                    f"checkpoint {self.folder}: {key} of its config is {values[0]!r}, and "
                    f"{values[1]!r} in {other.folder}; profile models that differ in more than "
                    "weights apart"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                own_part(own[name]).copy_(own_part(part_of(tensor, own[name])))
        check_finite(model, f"checkpoint {self.folder}")

    def _check_same(
        self, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], other: _Read
    ) -> None:
        """Raise `InputError` naming the first tensor that the two models do not share."""
        for name in [*own, *tensors]:
            shapes = [list(of[name].shape) if name in of else None for of in (tensors, own)]
            if shapes[0] != shapes[1]:
                there = "has no" if shapes[0] is None else f"has {shapes[0]} as"
                here = "none" if shapes[1] is None else str(shapes[1])
                raise InputError(
                    f"checkpoint {self.folder} {there} {name}, and {other.folder} {here}: it is of "
                    "another architecture; profile it apart"
                )


def _files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a model's weights."""
    if (folder / _WHOLE).exists():
        return [_WHOLE]
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def _fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors fit a model in names and shapes; one of several tied tensors is enough."""
    given = {id(own[name]) for name in tensors if name in own}
    return (
        tensors.keys() <= own.keys()
        and all(id(tensor) in given for tensor in own.values())
        and all(own[name].shape == tensor.shape for name, tensor in tensors.items())
    )


def _dtype_of(model: nn.Module) -> str:
    return dtype_name(next(model.parameters()).dtype)
