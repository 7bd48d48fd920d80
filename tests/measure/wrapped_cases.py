"""Models inside something else, one row each, for `test_wrapped_models.py`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from architectures import ARCHITECTURES
from models import FIVE, build, shaken
from torch import nn
from torch.utils.checkpoint import checkpoint

QV = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Case:
    """A wrapped model, and how it is expected to be served.

    Attributes:
        build: the model in a precision.
        layout: how samples may share a forward.
        generic: the kinds of parameters that take the generic rule; all others have a fast one.
        plain: the same model without the wrapper, where plain autograd is to run on that.
        forward: the class of the module that forward mode cannot pass; None: it passes all.
    """

    build: Callable[[torch.dtype], nn.Module]
    layout: str = "packed"
    generic: tuple[str, ...] = ()
    plain: Callable[[torch.dtype], nn.Module] | None = None
    forward: str | None = None


# ---- adapters ----


def adapted(config: str, base="llama", *, mixed=False, **settings):
    """A function that builds `base` with an adapter by `peft.<config>Config(**settings)`."""

    def make(dtype):
        peft = pytest.importorskip("peft")
        chosen = getattr(peft, f"{config}Config")(task_type="CAUSAL_LM", **settings)
        model = build(base, dtype)
        torch.manual_seed(3)
        soft = chosen.is_prompt_learning  # peft makes it in fp32
        # BOFT names another compiler in the environment, and does not restore it on failure.
        with mock.patch.dict(os.environ):
            wrapped = peft.get_peft_model(model, chosen, mixed=mixed)
        return shaken(wrapped, dtype if soft else None)

    return make


def lora(base="llama", targets=QV, **settings):
    return adapted("Lora", base, r=2, target_modules=targets, **settings)


def two_adapters(dtype):
    """A model with an inactive second adapter, whose trainable parameters have no gradient."""
    peft = pytest.importorskip("peft")
    model = lora()(dtype)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "second" in name)
    return model.to(dtype).eval()


def merged(dtype):
    """A model whose adapter is merged: only the head, saved with the adapter, has a gradient."""
    model = lora(modules_to_save=["lm_head"])(dtype)
    model.merge_adapter()
    return model


def injected(dtype):
    """A model whose adapter transformers put in place, so that its class stays the same."""
    peft = pytest.importorskip("peft")
    model = build("llama", dtype)
    config = peft.LoraConfig(r=2, target_modules=QV)
    try:
        model.add_adapter(config)
    except ValueError:  # asks for a later peft than there is; its call, made here
        peft.inject_adapter_in_model(config, model)
    return shaken(model)


MLP = ["q_proj", "down_proj"]
PREFIX = {"num_virtual_tokens": 3}
ADAPTERS = {
    "lora": Case(lora()),
    "lora_everywhere": Case(lora("llama_tied", "all-linear", bias="lora_only", use_rslora=True)),
    "lora_with_biases": Case(lora(lora_bias=True)),
    "lora_gpt2": Case(lora("gpt2", ["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora_embedding": Case(
        lora(targets=["embed_tokens", "q_proj"]),
        generic=("embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B"),
    ),
    "lora_saved_modules": Case(lora(modules_to_save=["lm_head", "embed_tokens"])),
    "lora_saved_tied": Case(lora("llama_tied", modules_to_save=["lm_head", "embed_tokens"])),
    "lora_tokens": Case(
        lora(trainable_token_indices=list(range(3, 30))),
        generic=("embed_tokens.trainable_tokens_delta",),
    ),
    "lora_two_adapters": Case(two_adapters),
    "lora_merged": Case(merged),
    "lora_mixed_model": Case(lora(mixed=True)),
    "lora_injected": Case(injected),
    "dora": Case(
        lora(targets=MLP, use_dora=True),
        generic=("q_proj.lora_magnitude_vector", "down_proj.lora_magnitude_vector"),
    ),
    "dora_gpt2": Case(
        lora("gpt2", ["c_attn"], fan_in_fan_out=True, use_dora=True),
        generic=("c_attn.lora_magnitude_vector",),
    ),
    "dora_embedding": Case(  # a scale of all samples at once is among what a module returns
        lora(targets=["embed_tokens"], use_dora=True),
        "single",
        generic=(
            "embed_tokens.lora_embedding_A",
            "embed_tokens.lora_embedding_B",
            "embed_tokens.lora_magnitude_vector",
        ),
    ),
    "ia3": Case(
        adapted("IA3", target_modules=MLP, feedforward_modules=["down_proj"]),
        generic=("q_proj.ia3_l", "down_proj.ia3_l"),
    ),
    "adalora": Case(
        adapted(
            "AdaLora",
            init_r=3,
            target_r=2,
            total_step=10,
            tinit=1,
            tfinal=2,
            target_modules=["q_proj"],
        ),
        generic=("q_proj.lora_A", "q_proj.lora_B", "q_proj.lora_E", "q_proj.ranknum"),
    ),
    "loha": Case(
        adapted("LoHa", r=2, target_modules=["q_proj"]),
        generic=tuple(f"q_proj.hada_w{i}_{k}" for i in (1, 2) for k in "ab"),
        forward="Linear",
    ),
    "lokr": Case(
        adapted("LoKr", r=2, target_modules=["q_proj"]),
        generic=("q_proj.lokr_w1", "q_proj.lokr_w2_a", "q_proj.lokr_w2_b", "q_proj.lokr_w2"),
    ),
    "oft": Case(
        adapted("OFT", r=0, oft_block_size=4, target_modules=["q_proj"]),
        generic=("q_proj.oft_R",),
    ),
    "boft": Case(
        adapted("BOFT", boft_block_size=4, target_modules=["q_proj"]),
        generic=("q_proj.boft_R", "q_proj.boft_s"),
    ),
    "vera": Case(
        adapted("Vera", r=4, target_modules=["q_proj", "o_proj"]),
        generic=tuple(f"{m}.vera_lambda_{k}" for m in ("q_proj", "o_proj") for k in "bd"),
    ),
    "vblora": Case(  # the bank of vectors is shared by all layers
        adapted("VBLoRA", r=2, num_vectors=8, vector_length=8, target_modules=["q_proj"]),
        generic=("q_proj.vblora_vector_bank", "q_proj.vblora_logits_A", "q_proj.vblora_logits_B"),
    ),
    "hra": Case(adapted("HRA", r=2, target_modules=["q_proj"]), generic=("q_proj.hra_u",)),
    "norms": Case(adapted("LNTuning", target_modules=["input_layernorm", "norm"])),
    "tokens_tied": Case(
        adapted("TrainableTokens", "llama_tied", token_indices=list(range(3, 30))),
        generic=("embed_tokens.trainable_tokens_delta",),
    ),
    "adaption_prompt": Case(
        adapted("AdaptionPrompt", adapter_len=3, adapter_layers=2),
        generic=("self_attn.adaption_prompt", "self_attn.adaption_gate"),
    ),
    # One prompt is made for all samples of a batch.
    "prompt_tuning": Case(adapted("PromptTuning", **PREFIX), "single"),
    "p_tuning": Case(adapted("PromptEncoder", encoder_hidden_size=6, **PREFIX), "single"),
    "prefix_tuning": Case(adapted("PrefixTuning", **PREFIX), "equal_length"),
    "prefix_tuning_gpt2": Case(adapted("PrefixTuning", "gpt2", **PREFIX), "equal_length"),
    "prefix_tuning_projected": Case(
        adapted("PrefixTuning", prefix_projection=True, encoder_hidden_size=6, **PREFIX),
        "equal_length",
    ),
}


# ---- the same function, run in another way ----


def never(*_args):
    raise AssertionError("compiled")


def compiled(base="llama", part=None, in_place=False, forward=False):
    """A model compiled by a compiler that fails: compiled code must not run."""

    def make(dtype):
        model = (base if callable(base) else lambda d: build(base, d))(dtype)
        inside = model.get_submodule(part or "")
        if forward:
            inside.forward = torch.compile(inside.forward, backend=never)
        elif in_place:
            inside.compile(backend=never)
        elif part:
            model.set_submodule(part, torch.compile(inside, backend=never))
        else:
            return torch.compile(model, backend=never)
        return model

    return make


def without_dropout():
    from transformers import GPT2LMHeadModel

    config = ARCHITECTURES["gpt2"]().config
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def plain(base):
    return lambda dtype: build(base, dtype)


def checkpointed(base, reentrant, around=None):
    """A model in train mode, where alone transformers computes activations a second time."""

    def make(dtype):
        model = (around or plain(base))(dtype)
        model.enable_input_require_grads()
        with contextlib.suppress(FutureWarning):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model.train()

    return make


class Checkpointed(nn.Module):
    """A model that calls torch's checkpoint itself, which no setting of the model turns off."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.model = inner
        for layer in inner.model.layers:
            layer.forward = self.around(layer.forward, reentrant)

    @staticmethod
    def around(forward, reentrant):
        def recomputed(hidden, **kwargs):
            return checkpoint(lambda h: forward(h, **kwargs), hidden, use_reentrant=reentrant)

        return recomputed

    def forward(self, input_ids, position_ids=None, output_hidden_states=False):
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            output_hidden_states=output_hidden_states,
            use_cache=False,
        )


def hooked(dtype):
    """A model whose modules' forwards are replaced, as accelerate places models on devices."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama", dtype)
    for module in [model, *model.model.layers[0].modules()]:
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def weight_norm(dtype):
    model = build("llama", dtype)
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    return model


class Int8(nn.Module):
    """A linear map with a frozen weight in int8, and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def quantised(dtype):
    model = build("llama", dtype)
    for layer in model.model.layers:
        layer.mlp.up_proj = Int8(layer.mlp.up_proj)
    return model


LINEARS = tuple(f"{k}_proj" for k in ("q", "k", "v", "o", "up", "gate", "down"))
LLAMA = plain("llama")
WRAPPED = {
    "compiled": Case(compiled(), plain=LLAMA),
    "compiled_in_place": Case(compiled(in_place=True), plain=LLAMA),
    "compiled_forward": Case(compiled(forward=True), plain=LLAMA),
    "compiled_layer": Case(compiled(part="model.layers.0"), plain=LLAMA),
    "compiled_head": Case(compiled(part="lm_head"), plain=LLAMA),
    "compiled_linear_forward": Case(
        compiled(part="model.layers.0.mlp.up_proj", forward=True), plain=LLAMA, generic=("up_proj",)
    ),
    "compiled_adapter": Case(compiled(lora()), plain=lora()),
    "checkpointed": Case(checkpointed("llama", False), plain=LLAMA),
    "checkpointed_reentrant": Case(checkpointed("llama", True), plain=LLAMA),
    "checkpointed_gpt2": Case(checkpointed(without_dropout, True), plain=plain(without_dropout)),
    "checkpointed_adapter": Case(checkpointed("llama", False, lora()), plain=lora()),
    "checkpointed_by_itself": Case(lambda dtype: Checkpointed(LLAMA(dtype), False)),
    "hooks_of_accelerate": Case(hooked, generic=(*LINEARS, "input_layernorm",
                                                 "post_attention_layernorm")),
    "weight_norm": Case(weight_norm, generic=("weight.original0", "weight.original1"),
                        forward="_WeightNorm"),
    "quantised": Case(quantised),
}  # fmt: skip

CASES = ADAPTERS | WRAPPED


# ---- refused ----


def all_merged(dtype):
    model = lora()(dtype)
    model.merge_adapter()
    return model


def unloaded(dtype):
    return lora()(dtype).merge_and_unload()


def on_experts(dtype):
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return lora("mixtral", target_parameters=parameters)(dtype)


class FullyShardedDataParallel(nn.Module):
    """A class with the name of torch's, without the processes that torch's needs."""

    __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"


REFUSED = {
    "all_merged": (all_merged, "no trainable parameter .an adapter that is merged"),
    "unloaded": (unloaded, "every parameter is frozen"),
    "experts": (on_experts, r"module '.*layers\.0\.mlp\.experts': LoRA on a parameter"),
    "data_parallel": (lambda d: nn.DataParallel(LLAMA(d)), "DataParallel.*`model.module`"),
    "sharded": (lambda _: FullyShardedDataParallel(), "FullySharded.*`model.module`"),
    "reentrant": (lambda d: Checkpointed(LLAMA(d), True), "use_reentrant=False"),
    "dropout": (lambda d: lora(lora_dropout=0.1)(d).train(), "lora_dropout.*active dropout"),
}


# ---- low precision ----


def fp32_norms(dtype):
    """A model with fp32 norms: Gemma's norms compute in fp32 and cast back, so they may stay."""
    model = build("gemma2", dtype)
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    return model


class InFp32(nn.Module):
    """A head in fp32 behind a half-precision model."""

    def __init__(self, head):
        super().__init__()
        self.head = head.float()

    def forward(self, x):
        return self.head(x.float())


def fp32_head(dtype):
    model = build("llama", dtype)
    model.lm_head = InFp32(model.lm_head)
    return model


def half_adapters(dtype):
    """A model with half-precision adapters on an fp32 base, which peft does not make by itself."""
    model = lora()(torch.float32)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return model


LOW = {
    **{name: plain(name) for name in FIVE},
    "fp32_norms": fp32_norms,
    "fp32_head": fp32_head,
    "lora_in_fp32": lora(),
    "half_lora_on_fp32": half_adapters,
    "dora_in_fp32": ADAPTERS["dora"].build,
    "ia3": ADAPTERS["ia3"].build,
    "prefix_tuning": ADAPTERS["prefix_tuning"].build,
    "checkpointed": checkpointed("llama", False),
}
AUTOCAST = {"llama": LLAMA, "lora": lora()}
