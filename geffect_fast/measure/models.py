"""Loading a language model and its tokenizer, with errors a person can act on."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.capture.compat import check_finite, is_sharded
from geffect_fast.capture.parts import mesh_of
from geffect_fast.capture.shards import shard
from geffect_fast.capture.structure import structure_of
from geffect_fast.errors import InputError, in_one_line
from geffect_fast.measure.precision import dtype_name
from geffect_fast.paths import user_path
from geffect_fast.ranks import here
from geffect_fast.results.groups import OUTSIDE, block_of
from geffect_fast.storage.model_folder import (
    base_name,
    base_of,
    check_folder,
    check_model_source,
    check_sizes,
    needs_trust,
)
from geffect_fast.storage.run_model import check_run_model
from geffect_fast.trying import no_memory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_model(
    source: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    what: str = "model",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, complete and finite, or say why not.

    transformers only warns when a checkpoint lacks weights and fills them with random numbers; here
    that is an error. For an adapter of peft the base model is loaded too, and frozen, while the
    adapter's weights are trainable.

    Args:
        source: folder with `config.json` and weights, folder of an adapter (`adapter_config.json`),
            or a hub id of a model.
        dtype: `float64`, `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own. An
            adapter has its base's precision, or float32 where that is bfloat16 or float16.
        device: `cpu`, `cuda`, `cuda:N`, or `auto` for CUDA where there is one; `meta` for a model
            without numbers, whose shapes, precisions and trainable parameters are known.
        what: the model's name in messages.
        trust_remote_code: run the Python code that a folder or hub id may bring along
            (`auto_map`), with all rights of this process; otherwise such a model is refused
            without a prompt.

    Raises:
        InputError: the model is missing, broken, incomplete or not a causal language model, or
            needs code of its own.
        NonFiniteError: a weight is NaN or infinite; the first one is named.
    """
    check_model_source(source, what, trust_remote_code)
    place = resolve_device(device)
    numbers = place.type != "meta"
    check_run_model(source, what, weights=numbers)
    base = base_of(source, what)
    if base is not None:
        name = base_name(source, what)
        inside = load_model(base, dtype, str(place), name, trust_remote_code=trust_remote_code)
        adapter = _with_adapter(inside, source, what)
        if numbers:
            check_finite(adapter, f"{what} {source}")
        return adapter.to(place).eval()
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, PreTrainedConfig

        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        try:
            check_sizes(PreTrainedConfig.get_config_dict(source)[0], source, what)  # of a hub id
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=wanted,
                device_map=None if numbers else "meta",
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        except InputError:
            raise
        except Exception as error:  # each loader of transformers raises errors of its own
            raise InputError(_why_not(source, what, error)) from error
    _check_complete(source, what, model, info)
    if not numbers:
        return model.eval()
    check_finite(model, f"{what} {source}")
    try:
        return model.to(place).eval()
    except torch.OutOfMemoryError as error:
        raise InputError(_why_not(source, what, error)) from error


def load_like(
    source: str | Path,
    model: nn.Module,
    what: str,
    trust_remote_code: bool,
    whole_on: str | None = None,
) -> nn.Module:
    """Load a further model in another's precision, on its device, and shared out if the other is.

    Args:
        source, what, trust_remote_code: as for `load_model`.
        model: the other model.
        whole_on: device of a model that is not shared out; None: the other model's device.
    """
    first = next(model.parameters())
    dtype = dtype_name(first.dtype)
    if is_sharded(model):
        mesh = mesh_of(model)
        return load_parts(source, dtype, first.device, what, trust_remote_code, mesh=mesh)
    where = whole_on or str(first.device)
    return load_model(source, dtype, where, what, trust_remote_code=trust_remote_code)


def load_parts(
    source: str | Path,
    dtype: str,
    device: torch.device,
    what: str,
    trust_remote_code: bool,
    adapted: Callable[[Any], Any] = lambda model: model,
    mesh: DeviceMesh | None = None,
) -> Any:
    """Load this rank's part of a model: the first rank reads the files and sends the weights.

    The first rank holds the whole model in its host's memory at first. No other rank reads the
    files, or holds more of the model than its part and one block.

    Args:
        source, dtype, what, trust_remote_code: as for `load_model`.
        device: where the parts will be.
        adapted: changes the whole model, on the first rank, before ranks share it out, for instance
            adds an adapter.
        mesh: as `shard` takes it.

    Raises:
        As `load_model`, on all ranks.
    """
    ranks, whole = here(), []

    def read() -> bytes:
        model = load_model(source, dtype, "cpu", what, trust_remote_code=trust_remote_code)
        whole.append(adapted(model))
        return structure_of(whole[0], f"{what} {source}")

    structure = ranks.by_first(read)
    if not ranks.first:
        if trust_remote_code:
            _import_code(source, what)
        whole.append(pickle.loads(structure))
    model = whole.pop()
    with ranks.in_step(True):
        shard(model, ranks, device, what, mesh=mesh, sent=True)
    return model


def _import_code(source: str | Path, what: str) -> None:
    """Import the classes that a model's folder or hub id brings along, so pickle can find them."""
    from transformers import PreTrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    while (base := base_of(source, what)) is not None:
        source = base
    classes = PreTrainedConfig.get_config_dict(source)[0].get("auto_map") or {}
    for kind in {"AutoConfig", "AutoModelForCausalLM"} & classes.keys():
        get_class_from_dynamic_module(classes[kind], source)


def _with_adapter(base: PreTrainedModel, source: str | Path, what: str) -> PreTrainedModel:
    """Put the adapter in the folder `source` around its base model.

    Raises:
        InputError: the adapter cannot be loaded, or has other weights than its config says.
    """
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing keys are an error below
        import peft

        try:
            saved = set(peft.utils.load_peft_weights(str(source), device="cpu"))
            model = peft.PeftModel.from_pretrained(base, str(source), is_trainable=True)
        except Exception as error:  # peft raises errors of its own
            raise InputError(
                f"{what} {source}: the adapter cannot be loaded ({in_one_line(error)}); save it "
                "again with save_pretrained, or correct its base_model_name_or_path"
            ) from error
        wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    odd = sorted(wanted - saved) or sorted(saved - wanted - set(model.state_dict()))
    if odd:
        raise InputError(
            f"{what} {source}: {odd[0]} is {'not ' if odd[0] in wanted else 'only '}among the "
            "adapter's weights; it is incomplete or belongs to another base model"
        )
    return model


def load_tokenizer(
    source: str | Path, what: str = "tokenizer", *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder or at a hub id; messages call the place `what`.

    `trust_remote_code` is as for `load_model`.

    Raises:
        InputError: there is no tokenizer, or it cannot be read, or it needs code of its own.
    """
    check_folder(source, what)
    check_run_model(source, what, weights=False)
    folder = user_path(source)
    # Some tokenizer classes start with an empty vocabulary where there are no files at all.
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        base = base_of(source, what)
        if base is not None:
            name = base_name(source, what)
            return load_tokenizer(base, name, trust_remote_code=trust_remote_code)
        raise InputError(
            f"{what} {source}: no tokenizer files in the folder; give another with --tokenizer"
        )
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except Exception as error:  # each tokenizer class raises errors of its own
            raise InputError(_why_not(source, f"tokenizer of {what}", error)) from error


def has_remote_code(model: nn.Module) -> bool:
    """Whether a model's class is code that came with the model and was allowed to run."""
    return any(kind.__module__.startswith("transformers_modules") for kind in type(model).__mro__)


def resolve_device(device: str) -> torch.device:
    """The device meant by `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        InputError: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise InputError(
            f"device {device} does not exist on this machine ({found} CUDA devices); use --device "
            "cpu"
        )
    return place


def _check_complete(source: str | Path, what: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of the model, or has weights that the model lacks.

    Whole modules that the architecture does not have, such as a value head, may be left out. A
    layer too many, or a bias that config.json denies, would make another model.

    Raises:
        InputError: naming the first such weight.
    """
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{what} {source}: the checkpoint lacks {missing[0]}{more}; "
            "it is incomplete or belongs to another architecture"
        )
    n_blocks = 1 + max((block_of(name) for name, _ in model.named_modules()), default=OUTSIDE)
    leaves = {name for name, module in model.named_modules() if not any(module.children())}
    for key in sorted(info.get("unexpected_keys") or []):
        if block_of(key) >= max(n_blocks, 1) or key.rpartition(".")[0] in leaves:
            raise InputError(
                f"{what} {source}: the checkpoint holds {key}, which its config.json leaves out; "
                "mend the config, such as num_hidden_layers, or save the model again"
            )


def _why_not(source: str | Path, what: str, error: Exception) -> str:
    """The message, in one line, for any error of a loader."""
    text = in_one_line(error, 2000)
    if "trust_remote_code=True" in text:
        return needs_trust(source, what)
    if no_memory(error):
        return f"{what} {source} does not fit in memory; use --dtype bfloat16 or another --device"
    if user_path(source).is_dir():
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
        f"{what} {source}: no such folder, and the hub has no such model or cannot be reached "
        f"({text[:90].rstrip('. ')} ...); give a folder, or check the id and the network"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings and advice of transformers for the time of a load; downloads show a bar."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()  # the line above disabled the bars of downloads too
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
