"""Models as others write them: checks, sizes, unwrapping, and code that is off for a while.

Compiled modules and activation checkpointing compute the same function in another way. Compiled
code knows nothing of hooks, and checkpointing runs parts of the forward again inside the backward.
Both are off for as long as hooks watch (`eagerly`). Rotary frequencies that a longer sequence left
behind are reset for a forward (`frequencies_at_first`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.errors import InputError, NonFiniteError, UnsupportedModelError
from geffect_fast.ranks import Ranks
from geffect_fast.transfer import are_finite

COMPILED = "_orig_mod."
"""The prefix that `torch.compile` puts into the names of a module's parameters."""


def check_is_model(model: object, what: str = "model") -> None:
    """Raise `InputError`, which calls it `what`, where `model` is no module, such as a path."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{what}: expected a loaded model, got {type(model).__name__}; load it with "
            "transformers' AutoModelForCausalLM.from_pretrained"
        )


def is_shared_out(x: Tensor) -> bool:
    """Whether FSDP2 has given this rank a part of a tensor."""
    # Importing `torch.distributed.tensor` takes most of a second, and nothing else needs it.
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def is_fsdp_group(module: nn.Module) -> bool:
    """Whether `fully_shard` has wrapped a module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def own_kind(module: nn.Module) -> type[nn.Module]:
    """A module's class from before `fully_shard` put its own class in front."""
    return type(module).__mro__[2] if is_fsdp_group(module) else type(module)


def fsdp_groups(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` has wrapped, in the model's order."""
    return [module for module in model.modules() if is_fsdp_group(module)]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has shared out a model's parameters, even if one is whole at the moment."""
    return bool(fsdp_groups(model)) or any(map(is_shared_out, model.parameters()))


def put_to_rest(model: nn.Module) -> None:
    """Have every FSDP group of a model hold parts again; a root stays whole after a forward."""
    for group in fsdp_groups(model):
        group.reshard()


def own_part(x: Tensor) -> Tensor:
    """This rank's part of a tensor that is shared out; any other tensor as it is."""
    return x.to_local() if is_shared_out(x) else x  # type: ignore[attr-defined]


def check_finite(model: nn.Module, name: str = "model") -> None:
    """Check that every parameter and buffer of a model is there and finite.

    Raises:
        InputError: a tensor has no numbers, being on the device `meta`; the first is named.
        NonFiniteError: a tensor is not finite; the first is named.
    """
    every = [*model.named_parameters(), *model.named_buffers()]
    for key, tensor in every:
        if tensor.is_meta:
            raise InputError(
                f"{name}: {key} is on the device 'meta', where accelerate leaves weights that it "
                "offloads; load the model whole, without device_map and offload_folder"
            )
    tensors = {key: tensor for key, tensor in every if tensor.is_floating_point()}
    good = are_finite([own_part(tensor) for tensor in tensors.values()])
    for (key, tensor), is_good in zip(tensors.items(), good, strict=True):
        if not is_good:
            n_bad = int((~torch.isfinite(own_part(tensor.detach()))).sum())
            raise NonFiniteError(
                f"{name}: {key} holds {n_bad} NaN or infinite of {tensor.numel()} values",
                remedy="save the model again from a healthy checkpoint",
            )


def check_replicas(model: nn.Module, ranks: Ranks, what: str = "model") -> None:
    """Raise `InputError` naming the first parameter or buffer that differs between ranks."""
    if ranks.size == 1 or is_sharded(model):
        return
    every = dict((*model.named_parameters(), *model.named_buffers()))
    numbers = {key: x.detach() for key, x in every.items() if x.is_floating_point()}
    sizes = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in numbers.values()]
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    ranks.check_same({what: f"{len(numbers)} tensors, and trains {', '.join(trained)}"})
    for rank, others in enumerate(told := ranks.meet(torch.stack(sizes).cpu())):
        # The norm of the same weights may round differently on other hardware.
        apart = (others - told[0]).abs() > 1e-6 * told[0]
        if apart.any():
            key = list(numbers)[int(apart.nonzero()[0])]
            raise InputError(
                f"{what}: {key} is not the same on rank {rank} as on rank 0; load the same weights "
                "on all ranks, and give what is drawn, such as an adapter, the same seed"
            )


def mixing_module(model: nn.Module) -> str | None:
    """A sentence on the first module whose gradients are random or depend on other samples.

    It says why, and what to do. None where there is no such module.
    """
    for name, module in model.named_modules():
        where = f"'{name or type(module).__name__}'"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            return f"{where} normalises over the samples of a batch; call model.eval() first"
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            return f"{where} scales gradients by the ids of other samples; unset scale_grad_by_freq"
        if not module.training:
            continue
        rates = {k: v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        if any(rate > 0 for rate in rates.values()):
            return (
                f"{where} is in train mode with active dropout, so gradients would be random; "
                "call model.eval() first"
            )
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrapper of `torch.compile`.

    Raises:
        UnsupportedModelError: the model is inside a wrapper that spreads it over devices.
    """
    while hasattr(model, "_modules") and "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    kind = type(model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModelError(
            f"model: it is wrapped in {kind.__name__}, which copies it to other devices; give the "
            "model inside, `model.module`"
        )
    wrapper = any(base.__module__.startswith("torch.distributed.fsdp") for base in kind.__mro__)
    if wrapper and not is_sharded(model):  # FSDP2 wraps nothing
        raise UnsupportedModelError(
            f"model: it is wrapped in {kind.__name__}, which holds parts of its parameters; load "
            "the model without it, or give `model.module` gathered on one device"
        )
    return model


def plain_name(name: str) -> str:
    """The name of a parameter without the prefix that `torch.compile` puts into it."""
    return name.replace(COMPILED, "")


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Inside, nothing of `model` runs compiled, and no activation is computed a second time.

    The fused path of `nn.TransformerEncoderLayer`, which bypasses the layer's modules, is off too.
    """
    checkpointed: list[Any] = [
        m for m in model.modules() if vars(m).get("gradient_checkpointing") is True
    ]
    fused = torch.backends.mha.get_fastpath_enabled()
    # Where dynamo was never imported nothing is compiled, and importing it takes seconds.
    compiled = "torch._dynamo" in sys.modules
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in checkpointed:
            module.gradient_checkpointing = False
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in checkpointed:
            module.gradient_checkpointing = True


_FUSED = {
    "_attn_implementation": (("flash", "flex"), "sdpa"),
    "_experts_implementation": (("grouped", "gemm"), "eager"),
}
"""Settings of transformers: words in the names of code without a forward-mode derivative, and the
name of code that computes the same instead. Unknown names are left: the check of the forward engine
shows whether they have a derivative."""


@contextmanager
def forward_differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, transformers runs no fused code without a forward-mode derivative."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed: list[tuple[Any, str, str]] = []
    try:
        for config in configs.values():
            for setting, (fused, instead) in _FUSED.items():
                chosen = getattr(config, setting, None)
                if isinstance(chosen, str) and any(word in chosen for word in fused):
                    changed.append((config, setting, chosen))
                    setattr(config, setting, instead)
        yield
    finally:
        for config, setting, chosen in changed:
            setattr(config, setting, chosen)


# ---- peft ----


def with_signature(model: nn.Module) -> nn.Module:
    """The module whose `forward` names the arguments that `model` takes.

    A peft model passes arguments that it does not know to the model inside. Where peft puts a soft
    prompt before the input, positions mean something else, and the peft model itself is returned.
    """
    model = unwrapped(model)
    if not _is_peft(model) or puts_prompt(model):
        return model
    return with_signature(model.base_model.model)  # type: ignore[union-attr, arg-type]


def puts_prompt(model: nn.Module) -> bool:
    """Whether a model of peft puts virtual tokens before the input (prompt and prefix tuning)."""
    model = unwrapped(model)
    config: Any = getattr(model, "active_peft_config", None) if _is_peft(model) else None
    return bool(getattr(config, "is_prompt_learning", False))


def _is_peft(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def check_adapters(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` naming a trainable LoRA on a parameter, not on a module.

    The wrappers of such parameters (`target_parameters`) are nested, and write into the base
    model's weights whenever they run. So no wrapper can be run again without the others, and no
    graph can be used after another forward.
    """
    if "peft" not in sys.modules:
        return
    for where, module in model.named_modules():
        kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
        if "peft.tuners.lora.layer.ParamWrapper" in kinds and any(
            p.requires_grad for p in module.parameters()
        ):
            raise UnsupportedModelError(
                f"module '{where}': LoRA on a parameter (target_parameters) cannot be told apart "
                "by sample; adapt modules instead (target_modules), or freeze it"
            )


# ---- rotary positions whose frequencies follow the longest sequence of a forward ----
#
# Two of transformers' kinds, `dynamic` and `longrope`, change their frequencies for a sequence
# longer than those that the model was first trained on. All sequences of the same forward get the
# changed frequencies; `dynamic` keeps them for later forwards too.


def still_up_to(model: nn.Module) -> float:
    """Tokens of the longest sequence that changes no frequency of `model`; inf where none does."""
    limits = [math.inf]
    modules: Iterator[Any] = model.modules()
    for module in modules:
        for kind, prefix in _kinds(module):
            if "dynamic" in kind:
                limits.append(module.original_max_seq_len)
            elif kind == "longrope":
                settings = module.config.rope_parameters
                settings = settings[prefix.removesuffix("_")] if prefix else settings
                limits.append(settings["original_max_position_embeddings"])
    return min(limits)


def text_config(model: nn.Module) -> Any:
    """A model's config; of a model that reads images too, the part of it that is of text."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "get_text_config", lambda: config)()


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of tokens in a model's vocabulary; None where its config does not give the number."""
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def made_for_positions(model: nn.Module) -> int | None:
    """Number of positions in a model's config; None for no limit, which XLNet writes as -1."""
    n_positions = getattr(text_config(model), "max_position_embeddings", None)
    return n_positions if isinstance(n_positions, int) and n_positions > 0 else None


def table_of_positions(model: nn.Module) -> int | None:
    """Number of positions in a model's table of positions; None for a model without a table.

    Some models' tables have a few more rows than positions.
    """
    n_positions = made_for_positions(model)
    if n_positions is None or not isinstance(model, nn.Module):
        return None
    tokens = getattr(model, "get_input_embeddings", lambda: None)()
    found = any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and 0 <= module.num_embeddings - n_positions < 8
        for module in model.modules()
    )
    return n_positions if found else None


@contextmanager
def frequencies_at_first(model: nn.Module) -> Iterator[None]:
    """Inside, frequencies that an earlier, longer sequence changed are reset; afterwards put back.

    Meant for one forward, of sequences of one length or of none longer than `still_up_to`.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    for module in model.modules():
        for kind, prefix in _kinds(module):
            if "dynamic" in kind:
                found.append((module, _start_again(module, prefix)))
    try:
        yield
    finally:
        for module, before in reversed(found):
            for name, value in before.items():
                setattr(module, name, value)


def _start_again(module: Any, prefix: str) -> dict[str, Any]:
    """Give a rotary module its first frequencies; return the earlier values by attribute name."""
    inv_freq, longest = f"{prefix}inv_freq", f"{prefix}max_seq_len_cached"
    before = {inv_freq: getattr(module, inv_freq)}
    before[longest] = getattr(module, longest, module.max_seq_len_cached)
    if hasattr(module, "attention_scaling"):
        before["attention_scaling"] = module.attention_scaling
    first = getattr(module, f"{prefix}original_inv_freq")
    setattr(module, inv_freq, first.to(before[inv_freq].device))
    setattr(module, longest, module.original_max_seq_len)
    return before


def _kinds(module: nn.Module) -> list[tuple[str, str]]:
    """The kinds of rotary positions that a module makes, each with its buffers' prefix.

    Names of buffers begin with the prefix, which is empty, or a kind of layer and an underscore.
    """
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return [(str(kind), f"{layer}_") for layer, kind in kinds.items()]
    return [] if kinds is None or not hasattr(module, "original_inv_freq") else [(str(kinds), "")]
