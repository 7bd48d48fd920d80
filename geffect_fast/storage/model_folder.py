"""Checks of a model's folder before its weights are read: config, adapter, Python code of its own.

The module also makes new folders for models, whole or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geffect_fast.errors import InputError, in_one_line
from geffect_fast.paths import is_there, user_path
from geffect_fast.storage.disk import UNFINISHED, synced, unwritable
from geffect_fast.storage.manifest import files_below
from geffect_fast.storage.run_model import check_run_model

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ADAPTER_CONFIG = "adapter_config.json"
_LARGEST_SIZES = (
    (re.compile(r"layers?$|depth$|n_layer|num_layers|num_blocks"), 10_000),
    (re.compile(r"(size|dim|embd|inner|heads|experts|units|model)$"), 2**24),
    (re.compile(r"positions?|position_embeddings$|seq_len|n_ctx"), 2**27),
)
"""Limits of a config's whole numbers, by name: some hundred times those of existing models."""


def check_model_source(
    source: str | Path, what: str = "model", trust_remote_code: bool = False
) -> None:
    """Check a model as far as possible without its weights; a hub id passes.

    Its folder must exist and hold a readable config of a causal language model with possible sizes.
    The model must need no Python code of its own, unless `trust_remote_code` allows such code. Of
    an adapter the base model is checked, and that peft is installed.

    Raises:
        InputError: a check fails. The message is one line with the folder and the remedy.
    """
    check_folder(source, what)
    folder = user_path(source)
    if not folder.is_dir():
        return
    check_run_model(source, what, weights=False)
    base = base_of(source, what)
    if base is not None:
        if importlib.util.find_spec("peft") is None:
            raise InputError(
                f"{what} {source}: an adapter of peft, which is not installed; pip install peft"
            )
        return check_model_source(base, base_name(source, what), trust_remote_code)
    if not (folder / "config.json").is_file():
        raise InputError(f"{what} {source}: no config.json; give a folder saved by save_pretrained")
    content = folder_settings(source, "config.json", what)
    names = content.get("architectures") or []
    if names and not any(str(name).endswith(_CAUSAL_ENDINGS) for name in names):
        raise InputError(
            f"{what} {source}: {', '.join(map(str, names))} is not a causal language model; "
            "give one that predicts next tokens"
        )
    check_sizes(content, source, what)
    if not trust_remote_code and _needs_its_code(content):
        raise InputError(needs_trust(source, what))


def _needs_its_code(config: dict[str, Any]) -> bool:
    """Whether a config names Python code beside it, for a model type that transformers lacks."""
    if not config.get("auto_map"):
        return False
    from transformers import CONFIG_MAPPING

    return config.get("model_type") not in CONFIG_MAPPING


def needs_trust(source: str | Path, what: str) -> str:
    """The message that refuses a model whose own code the user has not allowed."""
    return (
        f"{what} {source}: needs Python code that it brings along (auto_map), which would run with "
        "all your rights; read that code, and allow it with --trust-remote-code "
        "(trust_remote_code=True)"
    )


def base_of(source: str | Path, what: str) -> str | None:
    """The folder or hub id of an adapter's base model; None where `source` is no adapter's folder.

    Raises:
        InputError: the adapter names no base model, or the chain of base models leads in a circle.
    """
    base = _named_base(source, what)
    seen, at = {user_path(source).resolve()}, base
    while at is not None:
        place = user_path(at).resolve()
        if place in seen:
            raise InputError(
                f"{what} {source}: {_ADAPTER_CONFIG} leads back to {at} as its own base model; "
                "write the base model's folder or hub id into base_model_name_or_path"
            )
        seen.add(place)
        at = _named_base(at, what)
    return base


def _named_base(source: str | Path, what: str) -> str | None:
    """The base model that the adapter in a folder names; None where the folder holds no adapter."""
    if not (user_path(source) / _ADAPTER_CONFIG).is_file():
        return None
    base = folder_settings(source, _ADAPTER_CONFIG, what).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(
            f"{what} {source}: {_ADAPTER_CONFIG} names no base_model_name_or_path; write the base "
            "model's folder or hub id there"
        )
    return base


def base_name(source: str | Path, what: str) -> str:
    """The name of an adapter's base model in messages."""
    return f"{what} {source}: base model"


def check_sizes(config: dict[str, Any], source: str | Path, what: str) -> None:
    """Refuse impossible sizes in a config, which might otherwise be tried for hours.

    Raises:
        InputError: a size is above its limit.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, source, what)
        elif isinstance(value, int) and not isinstance(value, bool):
            most = next((most for words, most in _LARGEST_SIZES if words.search(name)), None)
            if most is not None and value > most:
                raise InputError(
                    f"{what} {source}: its config.json asks for {name} = {str(value)[:20]}, more "
                    f"than {most}; save it again with save_pretrained, or mend the config"
                )


def folder_settings(source: str | Path, name: str, what: str) -> dict[str, Any]:
    """The settings in a JSON file of the folder `source`.

    Raises:
        InputError: the file is not JSON, or holds no object.
    """
    try:
        content = json.loads((user_path(source) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} {source}: {name} is not JSON ({in_one_line(error)}); save it again with "
            "save_pretrained"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{what} {source}: {name} must hold an object of settings; save it again with "
            "save_pretrained"
        )
    return content


def check_folder(source: str | Path, what: str) -> None:
    """Refuse a path that does not exist, or is no folder; a hub id passes.

    Raises:
        InputError: the path is refused.
    """
    path = user_path(source)
    if path.is_dir():
        return
    if path.exists():
        raise InputError(f"{what} {source} is a file; give the folder that holds it")
    text = str(source)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise InputError(f"{what} {source} does not exist; give a folder or a hub id")


def check_new_folder(folder: str | Path, option: str) -> Path:
    """The absolute path of a folder for models that does not exist yet; its parent does.

    Raises:
        InputError: the folder exists, or its parent does not.
    """
    path = user_path(folder).absolute()
    if is_there(path):
        raise InputError(f"{option} {folder} is there already; choose a new folder")
    if not path.parent.is_dir():
        raise InputError(f"{option} {folder}: folder {path.parent} does not exist; make it first")
    return path


@contextmanager
def new_folder(folder: str | Path, option: str) -> Iterator[Path]:
    """A hidden folder that is renamed to `folder` when the block ends well, and else removed.

    Args:
        folder: path that must not exist.
        option: the option that gives the path, such as `--save`.

    Raises:
        InputError: as in `check_new_folder`, or the disk refuses, also in the block.
    """
    path = check_new_folder(folder, option)
    hidden = None
    try:
        hidden = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent))
        made = hidden / path.name  # has a folder's usual permissions; mkdtemp's folder is private
        made.mkdir()
        yield made
        for name in files_below(made):
            synced(made / name)
        check_new_folder(folder, option)
        made.rename(path)
        synced(path.parent)
    except OSError as error:
        raise unwritable(f"{option} {folder}", option, error) from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
