"""An unlearned model mixed with the one it was made from, in memory:

    theta(alpha) = (1 - alpha) theta_original + alpha theta_unlearned

for parameters and buffers. What an adapter adds is linear in its `B`, not in `A` and `B` together:

    W + alpha s B A                              of an adapter on the original
    W + (1 - alpha) s1 B1 A1 + alpha s2 B2 A2    of two adapters on one base

so of adapters the `B`s alone are scaled, which is exact; means of `A`s and `B`s would be another
model.

Of models that ranks share out each mixes its own parts. FSDP makes no copies, so that a model which
was given is written to, and put back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import check_finite, is_sharded, own_part, put_to_rest
from geffect_fast.capture.parts import whole_of
from geffect_fast.errors import InputError
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.measure.parts import whole_on_first
from geffect_fast.measure.saved_adapters import check_saved, save_adapter, save_sum
from geffect_fast.ranks import here

_SCALED = (".lora_B.", ".lora_embedding_B.")
_KEPT = (".lora_A.", ".lora_embedding_A.")
_SAVED = ".modules_to_save."
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
"""Fields of a config that change no logit in eval mode: names, special tokens, first weights,
losses and heads of other tasks. Whether weights are tied is seen in the weights."""

_CHANGES_NOTHING = re.compile(
    r"drop(out)?(_(prob|rate|p))?$|pdrop$|drop_path_rate$|^initializer_|^summary_"
)
"""Of such fields what many models call in their own ways: rates of dropout, which only training
has, spreads of first weights, and the head of GPT-2 for multiple choice."""

_NO_SUM = ("alora_invocation_tokens", "target_parameters", "layer_replication")
"""What an adapter of several can have and their sum as one adapter cannot say."""


@dataclass(frozen=True)
class _Part:
    """A tensor of the working model, and what it is at either end; of what ranks share out, this
    rank's part."""

    target: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def of(cls, target: Tensor, start: Tensor, end: Tensor) -> _Part:
        """Of whole tensors, or of parts alike; what is the target itself is copied."""
        start, end = (
            own_part(each.detach()).clone() if each is target else own_part(each.detach())
            for each in (start, end)
        )
        return cls(own_part(target.detach()), start, end)


class Mixture:
    """Models between an original and an unlearned one, each in the same working model.

    Only one mixed tensor at a time is held beside it, in fp32 or wider.

    Args:
        original: a causal language model, or one with an adapter.
        unlearned: of the same structure, or an adapter on the original or on its base.
        working: a copy of the original, which is written to. Of adapters the working model is
            another, which has the base's tensors in common with this one: only what adapters add,
            and modules that they replace, take memory beside it. Of models in parts it is the
            original, in whose place an adapter's own model is written to.
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
        if is_sharded(unlearned) != is_sharded(original):
            raise InputError(
                f"{what}: FSDP shares out one of the two models that are mixed, and not the other; "
                "give both alike"
            )
        for model in (original, unlearned):
            put_to_rest(model)
        # Of models in parts: the share at which the one that is written to is as it was, and what
        # takes out of it what was added.
        self._rests_at: float | None = None
        self._undo: Callable[[], None] = lambda: None
        adapted = _is_adapter(original), _is_adapter(unlearned)
        self._second: str | None = None
        if adapted == (False, False):
            self.model = working
            self._parts = _of_models(original, unlearned, working, what)
            if is_sharded(original):
                self._rests_at = 0.0
        elif adapted == (False, True):
            _check_adapter(unlearned, what)
            adapter: Any = unlearned
            check_same_config(original, adapter.get_base_model(), what)
            self.model, self._parts = _of_adapter(original, unlearned, working, what)
            if is_sharded(original):
                self._rests_at, self._undo = 1.0, _as_it_is(unlearned)
        elif adapted == (True, True):
            self.model, self._second, self._parts, undo = _of_adapters(
                original, unlearned, working, what
            )
            if is_sharded(original):
                self._rests_at, self._undo = 0.0, undo
        else:
            raise InputError(
                f"{what}: it is a whole model and the original has an adapter; merge that into its "
                "base (merge_and_unload) and give the merged model as the original"
            )
        with ExitStack() as on_error:
            on_error.callback(self.put_back)
            if all(here().meet(all(_same(part.start, part.end) for part in self._parts))):
                raise InputError(
                    f"{what}: its weights are the original's, so there is nothing to mix; give a "
                    "model that unlearning has changed"
                )
            on_error.pop_all()

    @torch.no_grad()
    def at(self, alpha: float) -> nn.Module:
        """The working model with the share `alpha` of the unlearned one; bit by bit the original at
        0 and the unlearned one at 1."""
        for part in self._parts:
            part.target.copy_(mixed(part.start, part.end, alpha))
        return self.model

    def put_back(self) -> None:
        """Have models in parts, which are written to, be as they were; nothing comes after it."""
        put_to_rest(self.model)
        if self._rests_at is not None:
            self.at(self._rests_at)
        self._undo()

    def save(self, folder: Path | None, tokenizer: Any = None) -> None:
        """Write the mixture as it is now into a folder, in the form of the unlearned one.

        Args:
            folder: None on ranks that write nothing, which bring their parts of it all the same.
            tokenizer: to be saved beside it.

        Raises:
            InputError: an adapter that was written adds something else than the one in memory.
        """
        model: Any = self.model
        whole: Any = nullcontext()
        if is_sharded(model):
            saved = _of_adapter_files(model) if _is_adapter(model) else model.parameters()
            whole = whole_on_first(model, saved)
        with whole, quiet_transformers():
            if folder is None:
                return
            if not _is_adapter(model):
                model.save_pretrained(folder)
            else:
                if self._second is None:
                    save_adapter(model, folder, *model.peft_config)
                else:
                    save_sum(model, folder)
                check_saved(model, folder)
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
    return [_Part.of(target[name], tensor, other[name]) for name, tensor in _once(one)]


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
    _check_same_parts(name, one, other, what)
    if not one.is_floating_point() and not _same(one, other):
        raise InputError(
            f"{what}: {name} is of whole numbers that differ from the original's, which cannot be "
            "mixed; give models of one architecture"
        )


def _check_same_parts(name: str, one: Any, other: Any, what: str) -> None:
    """Raise `InputError` where this rank's parts of two tensors are not of the same places."""
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


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors, or this rank's parts of them, are equal."""
    return torch.equal(own_part(one), own_part(other).to(one.device))


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_same_config(original: nn.Module, unlearned: nn.Module, what: str) -> None:
    """Raise `InputError` where two models compute in different ways with their weights."""
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
        # a switch of such a name, as ESM's token_dropout, changes what is computed
        if name not in _CHANGE_NOTHING
        and (isinstance(value, bool) or not _CHANGES_NOTHING.search(name))
    }


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
    elif getattr(config, "lora_bias", False):
        odd = "it adds biases of its own too (lora_bias)"
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
        _check_same_parts(_in_base(name, adapter), own, tensor, what)
        if _SAVED in name:
            _check_alike(_in_base(name, adapter), own, tensor, what)
        elif own.dtype != tensor.dtype or not _same(own, tensor):
            raise InputError(
                f"{what}: its base model is not the original, whose "
                f"{_in_base(name, adapter)} differs; give the adapter's base model as the original"
            )


def _of_adapter(
    original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
) -> tuple[nn.Module, list[_Part]]:
    """An adapter on the original: its `B`s, and modules that it replaces as a whole."""
    adapter = _check_adapter(unlearned, what)
    base, given = _tensors(original), _tensors(unlearned)
    _check_base(base, given, adapter, what)
    model = unlearned if is_sharded(original) else _upon(working, original, unlearned, adapter)
    target = _tensors(model)
    parts = []
    for name, tensor in _once(target):
        if any(part in name for part in _SCALED):
            parts.append(_Part.of(tensor, _nothing(given[name]), given[name]))
        elif _SAVED in name:
            parts.append(_Part.of(tensor, base[_in_base(name, adapter)], given[name]))
    return model, parts


@torch.no_grad()
def _upon(working: nn.Module, original: nn.Module, adapted: nn.Module, adapter: str) -> nn.Module:
    """A copy of a model with an adapter that has the base's tensors in common with `working`, which
    is made the original again: another mixture may have written to it."""
    of_base = {}
    own = _tensors(original)
    for name, tensor in _tensors(working).items():
        tensor.copy_(own[name])
        of_base[_in_base(name, adapter)] = tensor
    shared = {
        id(tensor): of_base[_in_base(name, adapter)]
        for name, tensor in _tensors(adapted).items()
        if not any(part in name for part in (*_SCALED, *_KEPT, _SAVED))
    }
    device = next(working.parameters()).device
    return copy.deepcopy(adapted, shared).to(device)


def _nothing(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, or of this rank's part of it, that take no memory."""
    like = own_part(like.detach())
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def _of_adapters(
    original: Any, unlearned: Any, working: nn.Module, what: str
) -> tuple[nn.Module, str, list[_Part], Callable[[], None]]:
    """Two adapters on one base, both active in the working model."""
    import peft

    first, second = _check_adapter(original, "original"), _check_adapter(unlearned, what)
    for one, who in ((original, "original"), (unlearned, what)):
        ((_, settings),) = one.peft_config.items()
        if odd := next((name for name in _NO_SUM if getattr(settings, name, None)), None):
            raise InputError(
                f"{who}: its adapter has {odd}, which the sum of two adapters has not; merge both "
                "into their base (merge_and_unload) and give the merged models"
            )
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
    in_parts = is_sharded(original)
    state = peft.get_peft_model_state_dict(
        unlearned, adapter_name=second, save_embedding_layers=False
    )
    with here().in_step(in_parts):  # what is added below is not shared out any more
        state = {name: whole_of(tensor) for name, tensor in state.items()}
    model: Any = original if in_parts else _upon(working, original, working, first)
    undo = _as_it_is(model)
    added = f"{first}_unlearned"
    with ExitStack() as on_error, quiet_transformers():
        on_error.callback(undo)
        model.add_adapter(added, copy.deepcopy(unlearned.peft_config[second]))
        peft.set_peft_model_state_dict(model, state, adapter_name=added)
        model.base_model.set_adapter([first, added])
        model.eval()
        parts = []
        for name, tensor in _tensors(model).items():
            if any(part in name for part in _SCALED):
                own, none = tensor, _nothing(tensor)
                ends = (own, none) if f".{first}." in name else (none, own)
                parts.append(_Part.of(tensor, *ends))
        on_error.pop_all()
    return model, added, parts, undo


def _of_adapter_files(model: Any) -> list[nn.Parameter]:
    """Parameters that peft may write: what adapters add and replace, and embeddings beside it."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [p for end in ends if end is not None for p in end.parameters()]
    return found + [p for name, p in model.named_parameters() if "lora_" in name or _SAVED in name]


def _as_it_is(model: Any) -> Callable[[], None]:
    """To be called once other adapters were added to a model: makes it what it is now."""
    active, adapters = list(model.active_adapters), set(model.peft_config)
    modules = [(module, dict(module._modules), module.training) for module in model.modules()]
    trained = [(p, p.requires_grad) for p in model.parameters()]

    def undo() -> None:
        for name in set(model.peft_config) - adapters:
            model.delete_adapter(name)
        model.base_model.set_adapter(active)
        for module, children, mode in modules:
            module._modules.clear()
            module._modules.update(children)  # without modules around those that were adapted
            module.training = mode
        for p, is_trained in trained:
            p.requires_grad_(is_trained)

    return undo
