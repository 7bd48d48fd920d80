"""What a run is made from: where it lies, and checksums that show whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from geffect_fast.errors import InputError
from geffect_fast.paths import is_there, user_path
from geffect_fast.settings import RunConfig
from geffect_fast.storage.manifest import Sums, checksums
from geffect_fast.storage.model_folder import base_of

Inputs = Mapping[str, str | Path]
"""Paths or hub ids by the option that gives them."""

_DECIDE = (".json", ".jsonl", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""Endings of files in a model's folder that decide what is loaded from it."""

_DO_NOT = ("trainer_state.json", "training_args.bin", "geffect_fast.json", "manifest.json")


def inputs_of(config: RunConfig) -> dict[str, str | Path]:
    """Everything that a run's config names to be read; of adapters also their base model."""
    named = {
        "--model": config.model,
        "--tokenizer": config.tokenizer,
        "--reference": config.reference,
        "--forget": config.forget,
        "--retain": config.retain,
        "--refusals": config.refusals,
        **{f"--probe {name}": source for name, source in config.probes.items()},
        **{f"--checkpoints {path}": path for path in getattr(config, "checkpoints", ())},
    }
    found: dict[str, str | Path] = {key: s for key, s in named.items() if s is not None}
    for option, source in list(found.items()):
        base = base_of(source, option) if user_path(source).is_dir() else None
        if base is not None:
            found[f"{option}, base model"] = base
    return found


def input_sums(inputs: Inputs) -> dict[str, Sums]:
    """Sizes and checksums of the files behind inputs, each read once.

    Of a folder the files in it that a model or tokenizer is loaded from; of a hub id those that the
    hub's cache holds; of data on the hub none, whose rows a step's identity knows.
    """
    found: dict[str, Sums] = {}
    for option, source in inputs.items():
        place = user_path(source)
        if not is_there(place):
            from huggingface_hub import try_to_load_from_cache
            from huggingface_hub.errors import HFValidationError

            try:
                config = try_to_load_from_cache(str(source), "config.json")
            except HFValidationError:
                continue
            if not isinstance(config, str):
                continue
            place = Path(config).parent
        if place.is_dir():
            names = [each.name for each in place.iterdir() if each.suffix in _DECIDE]
            names = [name for name in names if name not in _DO_NOT and (place / name).is_file()]
            found[option] = checksums(place, sorted(names))
        elif place.is_file():
            found[option] = checksums(place.parent, [place.name])
    return found


def weights_sums(model: nn.Module) -> Sums:
    """The size and checksum of a model's weights, for one that comes from no file."""
    found, size = hashlib.sha256(), 0
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            found.update(name.encode())
            found.update(data.tobytes())
            size += data.nbytes
    return {"weights": {"bytes": size, "sha256": found.hexdigest()}}


def check_unchanged(folder: Path, begun: Mapping[str, Sums], now: Mapping[str, Sums]) -> None:
    """Raise `InputError` naming the first input that is not what a run was begun with.

    Args:
        folder: of the run, for the message.
        begun, now: as `input_sums` returns them.
    """
    for option, sums in begun.items():
        here = now.get(option, {})
        for name in sorted({*sums, *here}):
            if sums.get(name) != here.get(name):
                raise InputError(
                    f"resume: {name} of {option} is not what the run in {folder} was begun with; "
                    "put that back, or begin another run in another --out"
                )
