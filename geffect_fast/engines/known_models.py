"""The layout and the own loss of a model, as found out before the model is profiled.

Both are known for models whose code was read; other models are tried (`layout.py`, `own_loss.py`).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.capture.attribution import ANY
from geffect_fast.capture.compat import is_fsdp_group, is_shared_out, own_kind
from geffect_fast.capture.generic_rule import GenericCall
from geffect_fast.capture.layer_rules import NormCall
from geffect_fast.data import Layout, SampleSet
from geffect_fast.engines.layout import tried_layout
from geffect_fast.engines.model_outputs import WINDOWS, takes
from geffect_fast.engines.own_loss import OwnLoss, tried_own_loss
from geffect_fast.trying import Trying

KNOWN = frozenset(
    {
        "gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "nemotron", "olmo", "phi",
        "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
    }
)  # fmt: skip
"""Modelling files of transformers that were read. In these files tokens meet in attention alone,
attention comes from transformers' table under its mask of packed sequences, and positions are the
ones given. A trial agrees for every file (`tests/engines/test_known_models.py`)."""

HEADS_BEHIND = frozenset({"qwen3"})
"""Files that normalise by heads, on tensors `(batch, tokens, heads, d)`."""

_ROW_BY_ROW = frozenset(
    {
        nn.Dropout, nn.Embedding, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList,
        nn.ReLU, nn.SiLU, nn.Tanh,
    }
)  # fmt: skip
_ROW_BY_ROW_FILES = ("transformers.activations", "transformers.pytorch_utils")
"""Modules that treat every token by itself."""

_STILL_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary positions whose frequencies do not depend on the longest sequence of a batch."""


def choose_layout(plan: Plan, sample_set: SampleSet, longest: int | None = None) -> Layout:
    """The fastest layout that is exact for this model: `packed`, `equal_length` or `single`.

    The layout is known without a pass where the model's code shows it (`packs_by_its_code`).
    Otherwise `tried_layout` finds it, and moves parameters that are used outside their modules'
    forwards in the plan, see `Plan.widen`.

    Args:
        plan: the model's plan.
        sample_set: the samples, of which the first two, the longest and the shortest are tried.
        longest: tokens of the longest sequence of all data; None: of `sample_set`.

    Raises:
        UnsupportedModelError: the model does not run on one sequence; the message holds the first
            line of the model's error.
    """
    if packs_by_its_code(plan):
        plan.shown.add(ANY)
        return "packed"
    return tried_layout(plan, sample_set, longest)


def own_loss(plan: Plan, sample_set: SampleSet) -> OwnLoss | None:
    """The difference of a model's own loss from the risk; None: no difference, or no own loss.

    The answer is known without a pass where the model's code shows it. Otherwise `tried_own_loss`
    finds it.

    Args:
        plan: the model's plan, as `choose_layout` left it.
        sample_set: the samples, of which the first one's tokens are tried.

    Raises:
        UnsupportedModelError: the model gives other logits where it is given labels.
    """
    if not takes(plan.model, "labels") or _shifts_by_its_code(plan):
        return None
    return tried_own_loss(plan, sample_set)


def _shifts_by_its_code(plan: Plan) -> bool:
    """Whether the model's file was read, and its loss is transformers' for causal models."""
    model: nn.Module = plan.model
    replaced = "_loss_function" in vars(model)
    named = getattr(model, "loss_type", None) in (None, "ForCausalLM")
    return ANY in plan.shown and named and not replaced


def packs_by_its_code(plan: Plan) -> bool:
    """Whether a model's code alone shows that packing is exact; False where it does not show this.

    The only code that can run is transformers' own, of a file in `KNOWN`, and torch's: nothing is
    subclassed, replaced or hooked, except by FSDP2, which brings weights. Every trainable parameter
    has a rule that goes row by row. Attention is `sdpa` or `eager` from the table, without a
    window, under a mask that is tried here on five positions.

    The axes that a trial would have found are entered in the plan.
    """
    model, kind = plan.model, own_kind(plan.model)
    file, name = sys.modules.get(kind.__module__), kind.__module__.rpartition(".modeling_")[2]
    if (
        file is None
        or name not in KNOWN
        or kind.__module__ != f"transformers.models.{name}.modeling_{name}"
        or not kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))
    ):
        return False
    config: Any = getattr(model, "config", None)
    modules = list(model.modules())
    hooked = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
    if hooked or not all(_is_untouched(m, kind.__module__) for m in modules):
        return False
    if any(getattr(m, "config", config) is not config for m in modules):
        return False
    if not all(type(p) is nn.Parameter or is_shared_out(p) for p in model.parameters()):
        return False
    if any(own.rule is GenericCall for own in plan.owners.values()):
        return False
    own = [each.module for each in plan.owners.values() if each.rule is NormCall]
    by_head = [m for m in own if m.get_parameter("weight").numel() != config.hidden_size]
    if by_head and name not in HEADS_BEHIND:
        return False
    if not _names_are_its_own(file) or not _attention_is_known(config):
        return False
    for where, each in plan.owners.items():
        if each.module in by_head:
            plan.axes[where, 3] = 1
    return True


def _is_untouched(module: nn.Module, file: str) -> bool:
    """Whether a module runs the forward of its class, as the class's file defines both."""
    kind = own_kind(module)
    if kind not in _ROW_BY_ROW and kind.__module__ not in (file, *_ROW_BY_ROW_FILES):
        return False
    if getattr(sys.modules[kind.__module__], kind.__name__, None) is not kind:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if "forward" in vars(module) or not all(_brings_weights(module, hook) for hook in hooks):
        return False
    return bool(inspect.unwrap(kind.forward).__module__.startswith(("torch.nn.", "transformers.")))


def _brings_weights(module: Any, hook: Any) -> bool:
    """Whether a hook of a module is the one by which FSDP2 brings weights."""
    return is_fsdp_group(module) and getattr(hook, "__self__", 0) is module._get_fsdp_state()


def _names_are_its_own(file: Any) -> bool:
    """Whether a modelling file sees only torch's, transformers' and Python's functions and classes.

    Masks and attention must also come from the tables of transformers.
    """
    from transformers import masking_utils, modeling_utils

    packages = {
        x.__module__.partition(".")[0]
        for x in vars(file).values()
        if inspect.isfunction(x) or inspect.isclass(x)
    }
    return (
        packages <= {"torch", "transformers", "typing", "collections", "dataclasses", "builtins"}
        and vars(file).get("create_causal_mask") is masking_utils.create_causal_mask
        and vars(file).get("ALL_ATTENTION_FUNCTIONS") is modeling_utils.ALL_ATTENTION_FUNCTIONS
    )


def _attention_is_known(config: Any) -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = getattr(config, "_attn_implementation", None)
    if implementation == "sdpa":
        served = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if served.__module__ != "transformers.integrations.sdpa_attention":
            return False
    elif implementation != "eager":
        return False
    if any(getattr(config, window, None) is not None for window in WINDOWS):
        return False
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return False
    if getattr(config, "reorder_and_upcast_attn", False):
        return False
    rotary = getattr(config, "rope_parameters", None) or {}
    return rotary.get("rope_type", "default") in _STILL_ROTARY and _masks_packed(config)


def _masks_packed(config: Any) -> bool:
    """Whether transformers' mask hides a sequence of two tokens from one of three in its row."""
    from transformers.masking_utils import create_causal_mask

    positions = torch.tensor([[0, 1, 0, 1, 2]])
    sample = torch.tensor([0, 0, 1, 1, 1])
    expected = (sample[:, None] == sample) & torch.ones(5, 5, dtype=torch.bool).tril()
    mask = None
    with Trying():
        mask = create_causal_mask(config, torch.zeros(1, 5, 1), None, None, position_ids=positions)
    if not isinstance(mask, torch.Tensor) or mask.shape[-2:] != (5, 5):
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    return torch.equal(seen.reshape(-1, 5, 5), expected.expand(seen.numel() // 25, 5, 5))
