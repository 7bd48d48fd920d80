"""A layout known from a model's code is the one that trying finds; unknown models are tried."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, SMALL, Architecture
from models import build, samples
from torch import nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import tokenize_rows
from geffect_fast.engines import layout as module
from geffect_fast.engines.known_models import KNOWN, choose_layout, packs_by_its_code

ROWS = tokenize_rows(samples([9, 12, 4], 1), None, name="forget")
BARE = SMALL | {"sliding_window": None}
WITHOUT_WINDOW = {
    "mistral": Architecture("Mistral", BARE),
    "starcoder2": Architecture("Starcoder2", BARE | {"use_bias": True}),
}
SHOWN = {name: ARCHITECTURES[name] for name in sorted(KNOWN | {"llama_tied"})} | WITHOUT_WINDOW


def known(model):
    return packs_by_its_code(Plan.of(model))


def tried(model):
    plan = Plan.of(model)
    return module._try(plan, ROWS), plan


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHOWN)
def test_what_is_known_is_what_trying_finds(name, attention):
    model = build(SHOWN[name])
    model.set_attn_implementation(attention)
    found, plan = tried(model)
    own = Plan.of(model)
    assert packs_by_its_code(own) and found == "packed"
    # Trying teaches the axis of every module; modules that may be in doubt are known from code as
    # well.
    assert own.axes.items() <= plan.axes.items()
    assert {place for place in plan.axes if place[1] > 2} == set(own.axes)


def test_nothing_else_is_known():
    assert {name for name in ARCHITECTURES if known(build(name))} == set(SHOWN) - set(
        WITHOUT_WINDOW
    )


def test_heads_as_many_as_tokens():
    """Axes are known without a trial, or else rows could not be told apart."""
    forget, retain = samples([2, 2], 1), samples([3], 2)  # four heads
    result = gf.profile(
        build("qwen3"), None, forget=forget, retain=retain, objectives=["ga"], token_budget=4
    )
    assert result.attrs["layout"] == "packed"


# ---- changed models are tried ----


class Own(modeling_llama.LlamaAttention):
    """A subclass, which may do anything."""


def swapped(model):
    old = model.model.layers[1].self_attn
    model.model.layers[1].self_attn = own = Own(model.config, 1)
    own.load_state_dict(old.state_dict())


def replaced(model):
    layer = model.model.layers[0]
    layer.forward = layer.forward


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def convolved(model):
    model.model.layers[0].mlp.act_fn = nn.Conv1d(1, 1, 1).requires_grad_(False)


def other_config(model):
    model.model.layers[0].self_attn.config = copy.deepcopy(model.config)


def setting(**values):
    return lambda model: [setattr(model.config, name, value) for name, value in values.items()]


def rotary(kind):
    return lambda model: model.config.rope_parameters.update(rope_type=kind)


CHANGES = {
    "subclass": swapped,
    "forward": replaced,
    "hook": hooked,
    "convolution": convolved,
    "config of a part": other_config,
    "flash": setting(_attn_implementation="flash_attention_2"),
    "window": setting(sliding_window=4),
    "chunks": setting(attention_chunk_size=8),
    "layers of another type": setting(layer_types=["full_attention", "linear_attention"]),
    "both directions": setting(is_causal=False),
    "dynamic rotary": rotary("dynamic"),
    "long rotary": rotary("longrope"),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.model.layers[0].mlp.up_proj),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_not_known(name):
    model = build("llama")
    assert known(model)
    CHANGES[name](model)
    assert not known(model)


def other_forward(*args, **kwargs):
    raise AssertionError


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        (modeling_llama.LlamaMLP, "forward", other_forward),
        (modeling_llama, "apply_rotary_pos_emb", other_forward),
        (modeling_llama, "create_causal_mask", other_forward),
        (modeling_llama, "LlamaRMSNorm", Own),
        (ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other_forward),
    ],
    ids=["forward of a class", "function", "mask", "class", "attention"],
)
def test_patched_code_is_not_known(monkeypatch, target, name, value):
    model = build("llama")
    assert known(model)
    if isinstance(target, dict):
        monkeypatch.setitem(target, name, value)
    else:
        monkeypatch.setattr(target, name, value)
    assert not known(model)


def test_a_mask_that_lets_samples_meet_is_seen(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(
        masking_utils, "packed_sequence_mask_function", lambda _: masking_utils.causal_mask_function
    )
    assert not known(model)
    assert tried(model)[0] == "equal_length"


# ---- models are tried once ----


@pytest.fixture
def tries(monkeypatch):
    """The number of times that a model was tried."""
    count = []
    real = module._try
    monkeypatch.setattr(module, "_try", lambda *a: count.append(1) or real(*a))
    return count


def layout_of(model):
    return choose_layout(Plan.of(model), ROWS)


def test_a_model_is_tried_once(tries):
    models = [build("gemma2"), build("gemma2")]
    for model in models * 2:
        assert layout_of(model) == "packed"
    assert len(tries) == 2
    assert layout_of(build("llama")) == "packed" and len(tries) == 2


def test_what_trying_taught_the_plan_is_remembered():
    from small_models import SecondHead, ready

    model = ready(SecondHead)
    plans = [Plan.of(model), Plan.of(model)]
    assert {choose_layout(plan, ROWS) for plan in plans} == {"single"}
    first, second = ({where: own.names for where, own in p.owners.items()} for p in plans)
    assert first == second and "" in first
    assert plans[0].axes == plans[1].axes


def written(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(2)


def moved(model):
    weight = model.model.norm.weight
    weight.data = weight.data.clone()


def frozen(model):
    model.lm_head.weight.requires_grad_(False)


def other_attention(model):
    now = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if now == "eager" else "eager")


STATES = {
    "attention": other_attention,
    "weights": written,
    "other memory": moved,
    "trainable": frozen,
    "precision": lambda m: m.to(torch.float64),
    "mode of a part": lambda m: m.model.layers[0].train(),
    "a setting": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.3),
    "a config": lambda m: setattr(m.config, "sliding_window", 3),
    "a hook": hooked,
    "a forward": replaced,
    "a module": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.SiLU()),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_model_that_changes_is_tried_again(tries, name):
    model = build("olmo2")
    layout_of(model)
    STATES[name](model)
    layout_of(model)
    layout_of(model)
    assert len(tries) == 2


def test_autocast_is_another_precision(tries):
    model = build("gemma2")
    layout_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        layout_of(model)
    assert len(tries) == 2


def test_an_adapter_that_is_switched_off_is_tried_again(tries):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    model.get_base_model().lm_head.weight.requires_grad_(True)
    model.eval()
    layout_of(model)
    layout_of(model)
    assert len(tries) == 1
    with model.disable_adapter():
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name or "lm_head" in name)
        layout_of(model)
    assert len(tries) == 2
