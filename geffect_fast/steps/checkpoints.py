"""Checkpoints of one training: found, put in order, and loaded one after the other into a model."""

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
    """Load one checkpoint after the other into a model; yields the step it is at.

    While a step is worked on, the next checkpoint's tensors are read from disk in a thread.

    Args:
        model: that of `first`, changed in place.
        first: folder that the model was loaded from.
        folders: of checkpoints by step.
        wanted: steps, in the order in which they are loaded.

    Raises:
        InputError: a checkpoint is damaged, or of another architecture; it is named with the
            tensor.
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
    """What a checkpoint's folder holds.

    Attributes:
        folder: it.
        settings: what its config.json and adapter_config.json hold.
        tensors: by name, in memory; None where they are not plain files of safetensors, or where
            reading failed: transformers' own loader is to say what is there then.
        damage: what a run's manifest says against them.
    """

    folder: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    damage: InputError | None = None

    @classmethod
    def of(cls, folder: Path, tensors: bool = True) -> _Read:
        """Read a folder; plain reading alone, as it may be in a thread."""
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
                    # A copy, as `load_file` maps the file and reads it when it is looked at.
                    found |= {name: x.clone() for name, x in load_file(folder / file).items()}
        except Exception:  # of whatever kind: the loader says it again, in the caller's thread
            found = None
        return cls(folder, settings, found, damage)

    def copy_to(self, model: nn.Module, other: _Read) -> None:
        """Copy the weights into a model that was loaded from another checkpoint, `other`.

        Where ranks share out the model each takes its part.

        Raises:
            InputError, NonFiniteError: as `loaded_in_turn`.
        """
        if self.damage is not None:
            raise self.damage
        own = model.state_dict(keep_vars=True)
        tensors = self.tensors
        if tensors is None or not _fit(own, tensors):
            # Weights that have other names and shapes in files than in the model (fused experts),
            # adapters, formats of old; and what is wrong is said there.
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
            # Adapters write a set of modules in any order.
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
    """Names of the files of safetensors that hold a model."""
    if (folder / _WHOLE).exists():
        return [_WHOLE]
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def _fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are all of a model's, by name and shape; of tied ones one is enough."""
    given = {id(own[name]) for name in tensors if name in own}
    return (
        tensors.keys() <= own.keys()
        and all(id(tensor) in given for tensor in own.values())
        and all(own[name].shape == tensor.shape for name, tensor in tensors.items())
    )


def _dtype_of(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
