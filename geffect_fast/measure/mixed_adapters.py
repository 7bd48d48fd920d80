"""Mixtures by adapters: an adapter added in part, or the way from one adapter to another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import is_sharded, own_part
from geffect_fast.capture.parts import whole_of
from geffect_fast.errors import InputError
from geffect_fast.measure.mixed_tensors import (
    MixedTensor,
    check_alike,
    check_same_config,
    check_same_parts,
    distinct,
    equal,
    tensors_of,
)
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.ranks import here

_SCALED = (".lora_B.", ".lora_embedding_B.")
_KEPT = (".lora_A.", ".lora_embedding_A.")
_SAVED = ".modules_to_save."

_NO_SUM = ("alora_invocation_tokens", "target_parameters", "layer_replication")
"""Fields of an adapter's config that the sum of two adapters, as one adapter, cannot express."""


def is_adapter(model: Any) -> bool:
    """Whether peft has put an adapter into a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def check_adapter(model: Any, what: str) -> str:
    """The name of a model's one adapter, which must do nothing but add `B A`.

    Raises:
        InputError: the model has several adapters, or the adapter does more than that.
    """
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
    elif getattr(config, "lora_bias", False):
        odd = "it adds biases of its own too (lora_bias)"
    elif config.trainable_token_indices is not None:
        odd = "it trains tokens' embeddings too (trainable_token_indices)"
    if odd:
        raise InputError(f"{what}: {odd}, which does not scale with a factor; {merge}")
    return str(name)


def _in_base(name: str, adapter: str) -> str:
    """The name in the base model of a tensor of the model with an adapter."""
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
        check_same_parts(_in_base(name, adapter), own, tensor, what)
        if _SAVED in name:
            check_alike(_in_base(name, adapter), own, tensor, what)
        elif own.dtype != tensor.dtype or not equal(own, tensor):
            raise InputError(
                f"{what}: its base model is not the original, whose "
                f"{_in_base(name, adapter)} differs; give the adapter's base model as the original"
            )


def pair_adapter(
    original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
) -> tuple[nn.Module, list[MixedTensor]]:
    """Pair an adapter with the original that it is on; the working model and its mixed tensors.

    Mixed are the adapter's `B`s, and the modules that the adapter replaces as a whole.
    """
    adapter = check_adapter(unlearned, what)
    base, given = tensors_of(original), tensors_of(unlearned)
    _check_base(base, given, adapter, what)
    model = (
        unlearned
        if is_sharded(original)
        else _copy_on_shared_base(working, original, unlearned, adapter)
    )
    target = tensors_of(model)
    mixed = []
    for name, tensor in distinct(target):
        if any(part in name for part in _SCALED):
            mixed.append(MixedTensor.of(tensor, _zeros_like_part(given[name]), given[name]))
        elif _SAVED in name:
            mixed.append(MixedTensor.of(tensor, base[_in_base(name, adapter)], given[name]))
    return model, mixed


@torch.no_grad()
def _copy_on_shared_base(
    working: nn.Module, original: nn.Module, adapted: nn.Module, adapter: str
) -> nn.Module:
    """A copy of the model `adapted` that shares the base's tensors with `working`.

    `working` is first given the original's values again, since another mixture may have written to
    its tensors.
    """
    of_base = {}
    own = tensors_of(original)
    for name, tensor in tensors_of(working).items():
        tensor.copy_(own[name])
        of_base[_in_base(name, adapter)] = tensor
    shared = {
        id(tensor): of_base[_in_base(name, adapter)]
        for name, tensor in tensors_of(adapted).items()
        if not any(part in name for part in (*_SCALED, *_KEPT, _SAVED))
    }
    device = next(working.parameters()).device
    return copy.deepcopy(adapted, shared).to(device)


def _zeros_like_part(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, or of this rank's part of it, that take no memory."""
    like = own_part(like.detach())
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def pair_adapters(
    original: Any, unlearned: Any, working: nn.Module, what: str
) -> tuple[nn.Module, str, list[MixedTensor], Callable[[], None]]:
    """Pair two adapters on one base in a working model in which both are active.

    Returns:
        The working model, the name of the unlearned model's adapter in it, the mixed tensors, and
        a function that takes that adapter out again.

    Raises:
        InputError: the sum of the two cannot be one adapter, or their bases differ.
    """
    import peft

    first, second = check_adapter(original, "original"), check_adapter(unlearned, what)
    for one, who in ((original, "original"), (unlearned, what)):
        ((_, settings),) = one.peft_config.items()
        if odd := next((name for name in _NO_SUM if getattr(settings, name, None)), None):
            raise InputError(
                f"{who}: its adapter has {odd}, which one adapter for the sum of two cannot have; "
                "merge both into their base (merge_and_unload) and give the merged models"
            )
        if any(_SAVED in name for name in tensors_of(one)):
            raise InputError(
                f"{who}: its adapter replaces whole modules (modules_to_save), so the two cannot "
                "be mixed as adapters; merge both into their base (merge_and_unload) and give the "
                "merged models"
            )
    check_same_config(original.get_base_model(), unlearned.get_base_model(), what)
    base = {
        _in_base(name, first): tensor
        for name, tensor in tensors_of(original).items()
        if not any(part in name for part in (*_SCALED, *_KEPT))
    }
    _check_base(base, tensors_of(unlearned), second, what)
    in_parts = is_sharded(original)
    state = peft.get_peft_model_state_dict(
        unlearned, adapter_name=second, save_embedding_layers=False
    )
    with here().in_step(in_parts):  # the adapter added below is whole on every rank
        state = {name: whole_of(tensor) for name, tensor in state.items()}
    model: Any = original if in_parts else _copy_on_shared_base(working, original, working, first)
    undo = undo_of_adapters(model)
    added = f"{first}_unlearned"
    with ExitStack() as on_error, quiet_transformers():
        on_error.callback(undo)
        model.add_adapter(added, copy.deepcopy(unlearned.peft_config[second]))
        peft.set_peft_model_state_dict(model, state, adapter_name=added)
        model.base_model.set_adapter([first, added])
        model.eval()
        mixed = []
        for name, tensor in tensors_of(model).items():
            if any(part in name for part in _SCALED):
                own, none = tensor, _zeros_like_part(tensor)
                ends = (own, none) if f".{first}." in name else (none, own)
                mixed.append(MixedTensor.of(tensor, *ends))
        on_error.pop_all()
    return model, added, mixed, undo


def savable_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters that peft may save: the adapters' own, modules they replace, and embeddings."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [p for end in ends if end is not None for p in end.parameters()]
    return found + [p for name, p in model.named_parameters() if "lora_" in name or _SAVED in name]


def undo_of_adapters(model: Any) -> Callable[[], None]:
    """A function that removes adapters added to a model later and makes the model as it is now."""
    active, adapters = list(model.active_adapters), set(model.peft_config)
    modules = [(module, dict(module._modules), module.training) for module in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]

    def undo() -> None:
        for name in set(model.peft_config) - adapters:
            model.delete_adapter(name)
        model.base_model.set_adapter(active)
        for module, children, mode in modules:
            module._modules.clear()
            module._modules.update(children)  # without the wrappers that new adapters have added
            module.training = mode
        for p, is_trained in trained:
            p.requires_grad_(is_trained)

    return undo
