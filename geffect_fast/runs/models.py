"""Loading a language model and its tokenizer, with errors a person can act on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_model(
    source: str | Path, dtype: str = "auto", device: str = "auto", what: str = "model"
) -> PreTrainedModel:
    """A causal language model in evaluation mode, complete and finite, or an error that says why.

    transformers only warns when a checkpoint lacks weights and fills them with random numbers; here
    that is an error.

    Args:
        source: folder with `config.json` and weights, or a hub id.
        dtype: `float64`, `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        device: `cpu`, `cuda`, `cuda:N`, or `auto` for CUDA where there is one.
        what: what messages call it.

    Raises:
        InputError: the model is missing, broken, incomplete or not a causal language model.
        NonFiniteError: a weight is NaN or infinite; the first one is named.
    """
    check_model_source(source, what)
    place = resolve_device(device)
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=wanted, output_loading_info=True
            )
        except Exception as error:  # every loader beneath has errors of its own
            raise InputError(_why_not(source, what, error)) from error
    _check_complete(source, what, info)
    check_finite(model, f"{what} {source}")
    return model.to(place).eval()


def load_tokenizer(source: str | Path, what: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or at a hub id; messages call the place `what`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    _check_folder(source, what)
    folder = Path(source).expanduser()
    # some tokenizer classes start with an empty vocabulary where there are no files at all
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{what} {source}: no tokenizer files in the folder; give another with --tokenizer"
        )
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(source)
        except Exception as error:  # as above
            raise InputError(_why_not(source, what, error)) from error


def check_model_source(source: str | Path, what: str = "model") -> None:
    """What can be known of a model before its weights are read: a folder, a readable causal config.

    Raises:
        InputError: one line with the folder and the remedy.
    """
    _check_folder(source, what)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{what} {source}: no config.json; give a folder saved by save_pretrained")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {source}: config.json is not JSON: {_flat(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{what} {source}: config.json must hold an object of settings")
    names = content.get("architectures") or []
    if names and not any(str(name).endswith(_CAUSAL_ENDINGS) for name in names):
        raise InputError(
            f"{what} {source}: {', '.join(map(str, names))} is not a causal language model"
        )


def check_finite(model: nn.Module, name: str = "model") -> None:
    """Every parameter and buffer of a model is finite.

    Raises:
        NonFiniteError: naming the first tensor that is not.
    """
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"{name}: {key} holds {n_bad} NaN or infinite of {tensor.numel()} values; "
                "save the model again from a healthy checkpoint"
            )


def resolve_device(device: str) -> torch.device:
    """The device meant by `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: it is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(f"device {device} is not here ({found} CUDA devices); use --device cpu")
    return place


def _check_folder(source: str | Path, what: str) -> None:
    """Refuse a path that does not exist, or is no folder; a hub id passes."""
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise InputError(f"{what} {source} is a file; give the folder that holds it")
    text = str(source)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise InputError(f"{what} {source} does not exist; give a folder or a hub id")


def _check_complete(source: str | Path, what: str, info: dict[str, Any]) -> None:
    """Refuse a model some of whose parameters were not in its checkpoint."""
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{what} {source}: the checkpoint lacks {missing[0]}{more}; "
            "it is incomplete or belongs to another architecture"
        )


def _why_not(source: str | Path, what: str, error: Exception) -> str:
    """One line for whatever a loader raised."""
    text = _flat(error)
    if Path(source).expanduser().is_dir():
        if "Unrecognized configuration class" in text:
            return (
                f"{what} {source}: not a causal language model; give one that predicts next tokens"
            )
        if "ignore_mismatched_sizes" in text:
            reason = "the shapes of its weights do not fit its config.json"
        elif type(error).__name__ == "SafetensorError":
            reason = f"its weights are truncated or broken ({text})"
        elif isinstance(error, OSError) and "no file named" in text:
            reason = "no weights (model.safetensors) in the folder"
        else:
            reason = f"cannot be loaded ({text[:160]})"
        return f"{what} {source}: {reason}; save it again with save_pretrained"
    return (
        f"{what} {source}: no such folder, and not to be had from the hub "
        f"({text[:90].rstrip('. ')} ...); give a folder, or check the id and the network"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without warnings and advice, for the time of a load; downloads show a bar."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()  # the line above took the bars of downloads away too
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
