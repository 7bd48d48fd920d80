"""Tensors of a working model, each mixed from its values in two models of one structure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import own_part
from geffect_fast.errors import InputError
from geffect_fast.measure.precision import dtype_name

_CHANGE_NOTHING = frozenset(
    {
        *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype"),
        *("torch_dtype", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
        *("return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id"),
        *("_attn_implementation", "_commit_hash", "auto_map", "tie_word_embeddings"),
        *("init_std", "embed_init_std", "init_xavier_std", "rescale_prenorm_residual"),
        *("output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef"),
        *("problem_type", "num_labels", "loss_type", "label_smoothing", "gradient_checkpointing"),
        *("chunk_size_feed_forward", "task_specific_params", "sep_token_id"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    }
)
"""Fields of a config that change no logit in eval mode: names, special tokens, initialisation,
losses and heads of other tasks. Ties between weights are compared in the models themselves."""

_CHANGES_NOTHING = re.compile(
    r"drop(out)?(_(prob|rate|p))?$|pdrop$|drop_path_rate$|^initializer_|^summary_"
)
"""Further fields that change no logit, which models name in different ways: rates of dropout, which
only training uses, ranges of initialisation, and the head of GPT-2 for multiple choice."""


@dataclass(frozen=True)
class MixedTensor:
    """A tensor of the working model, and its values at either end of the mixture.

    Where ranks share out the model, all three are this rank's parts.

    Attributes:
        target: the working model's tensor, which is written to.
        start: values in the original.
        end: values in the unlearned model.
    """

    target: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def of(cls, target: Tensor, start: Tensor, end: Tensor) -> MixedTensor:
        """Make one of tensors that are whole or in parts; an end that is `target` is copied."""
        start, end = (
            own_part(each.detach()).clone() if each is target else own_part(each.detach())
            for each in (start, end)
        )
        return cls(own_part(target.detach()), start, end)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; a tensor with several names stands under each."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def distinct(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
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


def pair_models(
    original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
) -> list[MixedTensor]:
    """Pair the parameters and buffers of two models of one structure; the mixed tensors.

    Raises:
        InputError: the models differ in class, tensors, ties or config.
    """
    one, other = tensors_of(original), tensors_of(unlearned)
    if type(original) is not type(unlearned):
        raise InputError(
            f"{what}: it is a {type(unlearned).__name__} and the original a "
            f"{type(original).__name__}; give models of one architecture"
        )
    _check_same_names(one, other, what)
    for name, tensor in one.items():
        check_alike(name, tensor, other[name], what)
    if odd := sorted(_ties(one) ^ _ties(other)):
        which = "the original" if odd[0] in _ties(one) else "the unlearned model"
        raise InputError(
            f"{what}: {' and '.join(odd[0])} are one tensor in {which} only; save both with the "
            "same tie_word_embeddings"
        )
    check_same_config(original, unlearned, what)
    target = tensors_of(working)
    return [MixedTensor.of(target[name], tensor, other[name]) for name, tensor in distinct(one)]


def _check_same_names(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> None:
    if odd := sorted(one.keys() ^ other.keys()):
        who = "the original" if odd[0] in one else "the unlearned model"
        raise InputError(
            f"{what}: only {who} has {odd[0]}; give models of one architecture and size"
        )


def check_alike(name: str, one: Tensor, other: Tensor, what: str) -> None:
    """Raise `InputError` where two tensors cannot be mixed."""
    if one.shape != other.shape:
        raise InputError(
            f"{what}: {name} is {_size(other)} and the original's {_size(one)}; give models of one "
            "architecture, size and vocabulary"
        )
    if one.dtype != other.dtype:
        raise InputError(
            f"{what}: {name} is {dtype_name(other.dtype)} and the original's "
            f"{dtype_name(one.dtype)}; load both in one precision, such as --dtype "
            f"{dtype_name(one.dtype)}"
        )
    check_same_parts(name, one, other, what)
    if not one.is_floating_point() and not equal(one, other):
        raise InputError(
            f"{what}: {name} holds whole numbers that differ from the original's, which cannot "
            "be mixed; give models of one architecture"
        )


def check_same_parts(name: str, one: Any, other: Any, what: str) -> None:
    """Raise `InputError` where two tensors are not shared out among ranks in the same way."""
    laid_out = [
        (tensor.placements, tensor.device_mesh.mesh.tolist())
        for tensor in (one, other)
        if hasattr(tensor, "placements")
    ]
    if len(laid_out) == 1 or laid_out[:1] != laid_out[1:]:
        raise InputError(
            f"{what}: {name} is shared out among ranks in another way than the original's; wrap "
            "both models by fully_shard alike"
        )


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors, or this rank's parts of them, are equal."""
    return torch.equal(own_part(one), own_part(other).to(one.device))


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def check_same_config(original: nn.Module, unlearned: nn.Module, what: str) -> None:
    """Raise `InputError` where the configs of two models have them compute in different ways."""
    given: list[Any] = [getattr(model, "config", None) for model in (original, unlearned)]
    one, other = (_computing(c.to_dict()) if hasattr(c, "to_dict") else {} for c in given)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            raise InputError(
                f"{what}: its config has {name} = {str(other.get(name))[:60]} and the original's "
                f"{str(one.get(name))[:60]}; give models of one architecture"
            )


def _computing(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of configs in it, that may change a logit."""
    return {
        name: _computing(value) if isinstance(value, dict) else value
        for name, value in config.items()
        # A boolean of such a name, such as ESM's token_dropout, changes what is computed.
        if name not in _CHANGE_NOTHING
        and (isinstance(value, bool) or not _CHANGES_NOTHING.search(name))
    }
