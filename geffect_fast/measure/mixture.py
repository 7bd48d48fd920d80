"""An unlearned model mixed with the one it was made from, in memory:

    theta(alpha) = (1 - alpha) theta_original + alpha theta_unlearned

for parameters and buffers. What an adapter adds is linear in its `B`, not in `A` and `B` together:

    W + alpha s B A                              of an adapter on the original
    W + (1 - alpha) s1 B1 A1 + alpha s2 B2 A2    of two adapters on one base

so of adapters the `B`s alone are scaled, which is exact; means of `A`s and `B`s would be another
model.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.errors import InputError
from geffect_fast.measure.models import check_finite, quiet_transformers

_SCALED = (".lora_B.", ".lora_embedding_B.")
_KEPT = (".lora_A.", ".lora_embedding_A.")
_SAVED = ".modules_to_save."
_CHANGE_NOTHING = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype"),
        *("torch_dtype", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
        *("return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id"),
        *("_attn_implementation", "_commit_hash", "auto_map", "tie_word_embeddings"),
    }
)
"""Fields of a config that change no logit; whether weights are tied is seen in the weights."""


@dataclass(frozen=True)
class _Part:
    """A tensor of the working model, and what it is at either end."""

    target: Tensor
    start: Tensor
    end: Tensor


class Mixture:
    """Models between an original and an unlearned one, each in the same working model.

    Only one mixed tensor at a time is held beside it, in fp32 or wider.

    Args:
        original: a causal language model, or one with an adapter.
        unlearned: of the same structure, or an adapter on the original or on its base.
        working: an exact copy of the original, which is written to; an adapter on a plain original
            gets a working model of its own.
        what: what messages call the unlearned one.

    Raises:
        InputError: the two are no pair, or the same.
        NonFiniteError: a weight is not finite; it is named.
    """

    def __init__(
        self, original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
    ) -> None:
        if unlearned is original:
            raise InputError(f"{what}: it is the original itself; give an unlearned model")
        check_finite(unlearned, what)
        adapted = _is_adapter(original), _is_adapter(unlearned)
        self._second: str | None = None
        if adapted == (False, False):
            self.model = working
            self._parts = _of_models(original, unlearned, working, what)
        elif adapted == (False, True):
            _check_adapter(unlearned, what)
            adapter: Any = unlearned
            check_same_config(original, adapter.get_base_model(), what)
            device = next(working.parameters()).device
            self.model = copy.deepcopy(unlearned).to(device)
            self._parts = _of_adapter(original, unlearned, self.model, what)
        elif adapted == (True, True):
            self.model, self._second, self._parts = _of_adapters(original, unlearned, working, what)
        else:
            raise InputError(
                f"{what}: it is a whole model and the original has an adapter; merge that into its "
                "base (merge_and_unload) and give the merged model as the original"
            )
        if all(_same(part.start, part.end) for part in self._parts):
            raise InputError(
                f"{what}: its weights are the original's, so there is nothing to mix; give a model "
                "that unlearning has changed"
            )

    @torch.no_grad()
    def at(self, alpha: float) -> nn.Module:
        """The working model with the share `alpha` of the unlearned one; bit by bit the original at
        0 and the unlearned one at 1."""
        for part in self._parts:
            part.target.copy_(mixed(part.start, part.end, alpha))
        return self.model

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write the mixture as it is now into a folder, in the form of the unlearned one."""
        with quiet_transformers():
            model: Any = self.model
            if self._second is None:
                model.save_pretrained(folder)
            else:
                _save_sum(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)


def mixed(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) start + alpha end` in fp32 or wider; where both are equal, what they are."""
    if alpha in (0, 1) or not start.is_floating_point():
        return end if alpha == 1 else start
    wide = torch.promote_types(start.dtype, torch.float32)
    return torch.lerp(start.to(wide), end.to(start.device, wide), alpha)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, shared ones under every name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _once(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under its first name."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _ties(tensors: dict[str, Tensor]) -> set[tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return {tuple(names) for names in groups.values() if len(names) > 1}


def _of_models(
    original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
) -> list[_Part]:
    """Every parameter and buffer of two models of one structure."""
    one, other = _tensors(original), _tensors(unlearned)
    if type(original) is not type(unlearned):
        raise InputError(
            f"{what}: it is a {type(unlearned).__name__} and the original a "
            f"{type(original).__name__}; give models of one architecture"
        )
    _check_same_names(one, other, what)
    for name, tensor in one.items():
        _check_alike(name, tensor, other[name], what)
    if odd := sorted(_ties(one) ^ _ties(other)):
        which = "the original" if odd[0] in _ties(one) else "the unlearned model"
        raise InputError(
            f"{what}: {' and '.join(odd[0])} are one tensor in {which} only; save both with the "
            "same tie_word_embeddings"
        )
    check_same_config(original, unlearned, what)
    target = _tensors(working)
    return [_Part(target[name], tensor, other[name]) for name, tensor in _once(one)]


def _check_same_names(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    if odd := sorted(one.keys() ^ other.keys()):
        who = "the original" if odd[0] in one else "the unlearned model"
        raise InputError(
            f"{what}: only {who} has {odd[0]}; give models of one architecture and size"
        )


def _check_alike(name: str, one: Tensor, other: Tensor, what: str) -> None:
    """Raise `InputError` where two tensors cannot be mixed."""
    if one.shape != other.shape:
        raise InputError(
            f"{what}: {name} is {_size(other)} and the original's {_size(one)}; give models of one "
            "architecture, size and vocabulary"
        )
    if one.dtype != other.dtype:
        raise InputError(
            f"{what}: {name} is {_kind(other)} and the original's {_kind(one)}; load both in one "
            f"precision, such as --dtype {_kind(one)}"
        )
    if not one.is_floating_point() and not _same(one, other):
        raise InputError(
            f"{what}: {name} is of whole numbers that differ from the original's, which cannot be "
            "mixed; give models of one architecture"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other.to(one.device))


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_same_config(original: nn.Module, unlearned: nn.Module, what: str) -> None:
    """Raise `InputError` where two models compute in different ways with their weights."""
    given: list[Any] = [getattr(model, "config", None) for model in (original, unlearned)]
    configs: list[dict[str, Any]] = [
        config.to_dict() if hasattr(config, "to_dict") else {} for config in given
    ]
    one, other = ({k: v for k, v in c.items() if k not in _CHANGE_NOTHING} for c in configs)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise InputError(
                f"{what}: its config has {name} = {str(other.get(name))[:60]} and the original's "
                f"{str(one.get(name))[:60]}; give models of one architecture"
            )


# ---- adapters ----


def _is_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _check_adapter(model: Any, what: str) -> str:
    """The name of a model's one adapter, if all that it does is to add `B A`."""
    merge = "merge it into its base (merge_and_unload) and give the merged model"
    if len(model.peft_config) != 1:
        raise InputError(f"{what}: it has {len(model.peft_config)} adapters; {merge}")
    ((name, config),) = model.peft_config.items()
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    odd = None
    if kind != "LORA":
        odd = f"it is of the kind {kind}"
    elif config.use_dora:
        odd = "it is of the kind DoRA"
    elif config.bias != "none":
        odd = f"it trains biases of the model too (bias={config.bias})"
    elif config.trainable_token_indices is not None:
        odd = "it trains tokens' embeddings too (trainable_token_indices)"
    if odd:
        raise InputError(f"{what}: {odd}, which does not scale with a factor; {merge}")
    return str(name)


def _in_base(name: str, adapter: str) -> str:
    """What a tensor of a model with an adapter is called in its base model."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for inside in (f"{_SAVED}{adapter}.", ".original_module."):
        plain = plain.replace(inside, ".")
    return plain


def _check_base(
    base: dict[str, Tensor], tensors: dict[str, Tensor], adapter: str, what: str
) -> None:
    """Raise `InputError` where the weights beneath an adapter are not those of the original."""
    for name, tensor in tensors.items():
        if any(part in name for part in (*_SCALED, *_KEPT)):
            continue
        own = base.get(_in_base(name, adapter))
        if own is None or own.shape != tensor.shape:
            raise InputError(
                f"{what}: {_in_base(name, adapter)} of its base model is not in the original; give "
                "the adapter's base model as the original"
            )
        if _SAVED in name:
            _check_alike(_in_base(name, adapter), own, tensor, what)
        elif own.dtype != tensor.dtype or not _same(own, tensor):
            raise InputError(
                f"{what}: its base model is not the original, whose "
                f"{_in_base(name, adapter)} differs; give the adapter's base model as the original"
            )


def _of_adapter(
    original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
) -> list[_Part]:
    """An adapter on the original: its `B`s, and modules that it replaces as a whole."""
    adapter = _check_adapter(unlearned, what)
    base = _tensors(original)
    given, target = _tensors(unlearned), _tensors(working)
    _check_base(base, given, adapter, what)
    parts = []
    for name, tensor in _once(target):
        if any(part in name for part in _SCALED):
            parts.append(_Part(tensor, _nothing(given[name]), given[name]))
        elif _SAVED in name:
            parts.append(_Part(tensor, base[_in_base(name, adapter)], given[name]))
    return parts


def _nothing(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape that take no memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _of_adapters(
    original: Any, unlearned: Any, working: nn.Module, what: str
) -> tuple[nn.Module, str, list[_Part]]:
    """Two adapters on one base, both active in the working model."""
    import peft

    first, second = _check_adapter(original, "original"), _check_adapter(unlearned, what)
    for one, who in ((original, "original"), (unlearned, what)):
        if any(_SAVED in name for name in _tensors(one)):
            raise InputError(
                f"{who}: its adapter replaces whole modules (modules_to_save), and so may the "
                "other; merge both into their base (merge_and_unload) and give the merged models"
            )
    check_same_config(original.get_base_model(), unlearned.get_base_model(), what)
    base = {
        _in_base(name, first): tensor
        for name, tensor in _tensors(original).items()
        if not any(part in name for part in (*_SCALED, *_KEPT))
    }
    _check_base(base, _tensors(unlearned), second, what)
    model: Any = copy.deepcopy(working)
    added = f"{first}_unlearned"
    with quiet_transformers():
        settings = copy.deepcopy(unlearned.peft_config[second])
        model.add_adapter(added, settings)
        state = peft.get_peft_model_state_dict(
            unlearned, adapter_name=second, save_embedding_layers=False
        )
        peft.set_peft_model_state_dict(model, state, adapter_name=added)
    model.base_model.set_adapter([first, added])
    model.eval()
    parts = []
    for name, tensor in _tensors(model).items():
        if any(part in name for part in _SCALED):
            own = tensor.detach().clone()
            ends = (own, _nothing(own)) if f".{first}." in name else (_nothing(own), own)
            parts.append(_Part(tensor, *ends))
    return model, added, parts


def _save_sum(model: Any, folder: Path) -> None:
    """Write the active adapters as one, whose rank is the sum of theirs: exactly what they add."""
    active, name = list(model.active_adapters), "mixed"
    model.add_weighted_adapter(active, [1.0] * len(active), name, combination_type="cat")
    try:
        model.save_pretrained(str(folder), selected_adapters=[name])
    finally:
        model.delete_adapter(name)
        model.base_model.set_adapter(active)
    for file in (folder / name).iterdir():
        shutil.move(file, folder / file.name)
    (folder / name).rmdir()
