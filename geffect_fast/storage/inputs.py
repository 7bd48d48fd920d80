"""The inputs of a run: their paths or hub ids, and checksums that show whether they changed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch
from torch import Tensor, nn

from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.paths import is_there, user_path
from geffect_fast.settings import RunConfig
from geffect_fast.storage.manifest import Manifest, Sums, checksums
from geffect_fast.storage.model_folder import base_of
from geffect_fast.storage.run_folder import RESULTS
from geffect_fast.storage.run_yaml import AnyConfig, load_config

Inputs = Mapping[str, str | Path]
"""Paths or hub ids by the option that gives them."""

_LOADED_ENDINGS = (".json", ".jsonl", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""Endings of files in a model's folder that decide what is loaded from it."""

_NOT_LOADED = ("trainer_state.json", "training_args.bin", "geffect_fast.json", "manifest.json")
"""Files with one of these endings from which no model is loaded."""


def inputs_of(config: AnyConfig) -> dict[str, str | Path]:
    """The inputs that a run's config names, by option; of an adapter also its base model."""
    named = _named(config) if isinstance(config, RunConfig) else config.inputs()
    found: dict[str, str | Path] = {key: s for key, s in named.items() if s is not None}
    for option, source in list(found.items()):
        base = base_of(source, option) if user_path(source).is_dir() else None
        if base is not None:
            found[f"{option}, base model"] = base
    return found


def _named(config: RunConfig) -> dict[str, str | None]:
    """The inputs that a config names, by option; None where an option is not given."""
    return {
        "--model": config.model,
        "--tokenizer": config.tokenizer,
        "--reference": config.reference,
        "--forget": config.forget,
        "--retain": config.retain,
        "--refusals": config.refusals,
        "--holdout": getattr(config, "holdout", None),
        "--retain-model": getattr(config, "retain_model", None),
        "--optimizer-state": getattr(config, "optimizer_state", None),
        **{f"--probe {name}": source for name, source in config.probes.items()},
        **{f"--checkpoints {path}": path for path in getattr(config, "checkpoints", ())},
    }


def input_sums(inputs: Inputs, stop: Event | None = None) -> dict[str, Sums]:
    """Sizes and checksums of the files behind inputs, each read once.

    A folder counts with the files from which a model or tokenizer is loaded, the hub id of a model
    with those files in the hub's cache. Data on the hub has no checksums here: a step's identity
    covers the rows.

    Args:
        inputs: paths or hub ids by option.
        stop: set once nobody needs the checksums any more; reading then ends.

    Raises:
        InputError: a file cannot be read.
    """
    found: dict[str, Sums] = {}
    for option, source in inputs.items():
        try:
            if (sums := _sums_behind(source, stop)) is not None:
                found[option] = sums
        except OSError as error:
            raise InputError(
                f"{option} {source} cannot be read: {error.strerror or error}; see that it stays "
                "as it is while the run goes"
            ) from error
    return found


@contextmanager
def summed_beside(inputs: Inputs) -> Iterator[Callable[[], dict[str, Sums]]]:
    """Run `input_sums` in a thread beside the work in the block, which may load the same files.

    Yields:
        A function that waits for the checksums and returns them.
    """
    stop = Event()
    with ThreadPoolExecutor(1, "inputs") as pool:
        sums = pool.submit(input_sums, inputs, stop)
        try:
            yield sums.result
        finally:
            stop.set()


def _sums_behind(source: str | Path, stop: Event | None) -> Sums | None:
    """The checksums of one input's files; None where no file is found."""
    place = user_path(source)
    if not is_there(place):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(str(source), "config.json")
        except HFValidationError:
            return None
        if not isinstance(config, str):
            return None
        place = Path(config).parent
    if place.is_dir():
        names = [each.name for each in place.iterdir() if each.suffix in _LOADED_ENDINGS]
        names = [name for name in names if name not in _NOT_LOADED and (place / name).is_file()]
        return checksums(place, sorted(names), stop)
    if place.is_file():
        return checksums(place.parent, [place.name], stop)
    return None


def result_sums(runs: Iterable[Path]) -> dict[str, Sums]:
    """Sizes and checksums of the results of runs, by the run's folder or file as given."""
    places = {str(run): user_path(run) for run in runs}
    files = {run: place / RESULTS if place.is_dir() else place for run, place in places.items()}
    return {run: checksums(file.parent, [file.name]) for run, file in files.items()}


def weights_sums(model: nn.Module) -> Sums:
    """The size and checksum of the weights of a model that comes from no file.

    All ranks that share the model must call this function.
    """
    found, size = hashlib.sha256(), 0
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            found.update(name.encode())
            found.update(data.tobytes())
            size += data.nbytes
    return {"weights": {"bytes": size, "sha256": found.hexdigest()}}


def check_replayed(file: str | Path | None, config: AnyConfig, now: Mapping[str, Sums]) -> None:
    """Warn where a replay of a run's `run.yaml` reads an input that has changed since that run.

    Args:
        file: the config that is replayed; with None, or a config that no run wrote, there is no
            warning.
        config: the config as it is run now; inputs that options replaced are not compared.
        now: current checksums, as `input_sums` returns them.

    Raises:
        InputError: the run's manifest is damaged.
    """
    if file is None:
        return
    folder = user_path(file).absolute().parent
    manifest = Manifest.of_a_run(folder)
    if manifest is None or not manifest.inputs:
        return
    try:
        begun, given = inputs_of(load_config(file)), inputs_of(config)
    except InputError:  # a config that lacks fields, which options supply: no run wrote it
        return
    same = {option for option in given if given[option] == begun.get(option)}
    sums = {option: each for option, each in manifest.inputs.items() if option in same}
    if changed := first_changed(sums, now):
        warnings.warn(
            f"{changed} is not what the run in {folder} was made from, so this is no replay",
            GEffectWarning,
            stacklevel=2,
        )


def first_changed(begun: Mapping[str, Sums], now: Mapping[str, Sums]) -> str | None:
    """The first file that differs between two results of `input_sums`, with its option, in words.

    Options that only `now` holds are not compared. The value is None where nothing differs.
    """
    for option, sums in begun.items():
        here = now.get(option, {})
        for name in sorted({*sums, *here}):
            if sums.get(name) != here.get(name):
                return f"{name} of {option}"
    return None


def check_unchanged(folder: Path, begun: Mapping[str, Sums], now: Mapping[str, Sums]) -> None:
    """Raise `InputError` naming the first input that has changed since a run was begun.

    Args:
        folder: the run's folder, for the message.
        begun: checksums when the run was begun, as `input_sums` returns them.
        now: current checksums, likewise.
    """
    if changed := first_changed(begun, now):
        raise InputError(
            f"resume: {changed} is not what the run in {folder} was begun with; put that back, or "
            "begin another run in another --out"
        )
