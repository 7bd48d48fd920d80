"""Publicly reported models, wrappers and positions: right, or refused by one line of why.

Each case is a small model in the situation of the thread that the case names.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import LATENT_ATTENTION, SMALL, VOCAB, Architecture
from models import build, fp64_throughout, samples, shaken
from reference import close, effects
from torch import nn

import geffect_fast as gf
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.report.tables.check import verdict

peft = pytest.importorskip("peft")


def rows(lengths=(4, 6, 4, 4, 6, 6)):
    return samples(list(lengths), 1)


# ---- served ----


def roberta():
    """Positions from 0 in a packed batch would read another row of the table for every token."""
    settings = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "intermediate_size": 24, "is_decoder": True}
    return build(Architecture("Roberta", settings))


def dynamic():
    """One long prompt in a batch changed the rotation of all others."""
    rotary = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    return build(
        Architecture("Llama", SMALL | {"max_position_embeddings": 5, "rope_parameters": rotary})
    )


def longrope():
    """The longest sequence that shares a forward chooses the factors."""
    rotary = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0}
    rotary |= {"short_factor": [1.0, 1.2], "long_factor": [2.0, 3.0]}
    rotary |= {"original_max_position_embeddings": 5}
    return build(
        Architecture(
            "Phi3",
            SMALL
            | {
                "max_position_embeddings": 20,
                "original_max_position_embeddings": 5,
                "rope_parameters": rotary,
            },
        )
    )


EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 12}
HYBRID = (
    SMALL
    | LATENT_ATTENTION
    | EXPERTS
    | {
        "q_lora_rank": None,
        "linear_head_dim": 4,
        "linear_num_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    }
)


def kimi():
    """A norm with a gate that is an optional argument, without which the norm fails."""
    return build(Architecture("KimiLinear", HYBRID))


def bailing():
    return build(Architecture("BailingHybrid", HYBRID | {"num_expert_group": 2, "topk_group": 1}))


def dora():
    """The magnitude is trained beside matrices that its module runs inside."""
    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True, r=2)
    return shaken(peft.get_peft_model(build("llama"), config))


class Packed(nn.Parameter):
    """A frozen weight that alone knows how to read its numbers, like those of bitsandbytes."""

    state = None

    def __new__(cls, data, state=None):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.state = state
        return self

    def __deepcopy__(self, memo):
        return Packed(self.data.clone(), self.state)


class Product(torch.autograd.Function):
    """A product without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0], None


class FourBits(nn.Module):
    """A layer like `bitsandbytes.nn.Linear4bit`: a flat weight, which holds its scale and shape."""

    multiply = staticmethod(nn.functional.linear)

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 7
        ids = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = Packed(ids.reshape(-1, 1), (scale, linear.weight.shape))

    def forward(self, x):
        assert getattr(self.weight, "state", None) is not None
        scale, shape = self.weight.state
        return self.multiply(x, self.weight.data.view(shape).to(x.dtype) * scale.to(x.dtype))


class WithoutForwardMode(FourBits):
    multiply = Product.apply


def on_quantised(kind):
    def make():
        model = build("llama")
        for layer in model.model.layers:
            for name in ("q_proj", "v_proj"):
                setattr(layer.self_attn, name, kind(layer.self_attn.get_submodule(name)))
                # the class that peft takes for a linear layer
                layer.self_attn.get_submodule(name).in_features = 16
        config = peft.LoraConfig(r=2, target_modules=["o_proj", "up_proj"])
        return shaken(peft.get_peft_model(model, config))

    return make


SERVED = {
    "huggingface/sentence-transformers#3879": roberta,
    "QwenLM/Qwen#401": dynamic,
    "ggml-org/llama.cpp#7225": longrope,
    "vllm-project/vllm#35476": kimi,
    "vllm-project/vllm#35476, grouped experts": bailing,
    "huggingface/peft#1474": dora,
    "unslothai/unsloth-zoo#1132": on_quantised(FourBits),
    "unslothai/unsloth-zoo#1132, no forward mode": on_quantised(WithoutForwardMode),
}


@pytest.mark.parametrize("source", SERVED)
def test_check_finds_it_exact(source):
    found = gf.check(SERVED[source](), None, data=rows(), samples=4)
    assert found.exact, verdict(found)


@pytest.mark.parametrize("source", SERVED)
def test_its_numbers_are_those_of_one_sample_at_a_time(source):
    with fp64_throughout():
        model, data = SERVED[source]().double(), rows()
        if source.endswith(("experts", "vllm#35476")):
            model.set_experts_implementation("eager")
        result = gf.profile(model, None, forget=data, retain=data[:3], objectives=["ga"])
        plain = Trainable(model)
        expected = effects(plain, plain, [(1.0, "ga", {})], data, data[:3], None)
    close(result.g_effect[0].values, expected[..., : len(data)], 1e-9)


@pytest.mark.parametrize(
    ("source", "engine"),
    [
        ("unslothai/unsloth-zoo#1132", "forward"),
        ("unslothai/unsloth-zoo#1132, no forward mode", "reverse"),
    ],
)
def test_several_objectives_on_a_quantised_base(source, engine):
    objectives = ["ga", "npo", "gd", "simnpo"]
    given = {"forget": rows(), "retain": rows(), "objectives": objectives, "resolve": ["sample"]}
    result = gf.profile(SERVED[source](), None, **given)
    assert result.attrs["engine"] == engine
    reverse = gf.profile(SERVED[source](), None, engine="reverse", **given)
    close(result.g_effect.values, torch.from_numpy(reverse.g_effect.values), 1e-5)


# ---- refused ----


def offloaded():
    """Weights on `meta`, put in place only while a forward runs."""
    model = build("llama")
    weight = torch.empty_like(model.lm_head.weight, device="meta")
    model.lm_head.weight = nn.Parameter(weight)
    return model


def t5():
    """An encoder-decoder: called with a question alone, the model asks for its decoder's input."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def osf():
    """A model whose gradients are projected on their way to the optimizer."""
    config = peft.OSFConfig(target_modules=["q_proj"], effective_rank=4, task_type="CAUSAL_LM")
    return shaken(peft.get_peft_model(build("llama"), config))


REFUSED = {
    "huggingface/accelerate#2082": (offloaded, "lm_head.weight is on the device 'meta'"),
    "huggingface/transformers#16234": (t5, "T5ForConditionalGeneration reads the question by an"),
    "huggingface/peft#2685": (osf, "parameter '.*': a hook changes its gradient"),
}


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("source", REFUSED)
def test_refused_alike(source, n):
    make, message = REFUSED[source]
    data = rows()[:n]
    with pytest.raises((InputError, UnsupportedModelError), match=message) as of_profile:
        gf.profile(make(), None, forget=data, retain=data, objectives=["ga"])
    with pytest.raises((InputError, UnsupportedModelError), match=message) as of_check:
        gf.check(make(), None, data=data, samples=n)
    assert str(of_profile.value) == str(of_check.value)


def test_a_hook_that_only_looks_is_no_reason():
    seen, data = [], rows()
    model = build("llama")
    expected = gf.profile(model, None, forget=data, retain=data, objectives=["ga"])
    handle = model.lm_head.weight.register_hook(lambda g: seen.append(float(g.norm())))
    found = gf.profile(model, None, forget=data, retain=data, objectives=["ga"])
    assert seen and found.g_effect.identical(expected.g_effect)
    handle.remove()
    assert not model.lm_head.weight._backward_hooks


class Trainable:
    """A model as the reference implementation calls it, without frozen parameters."""

    def __init__(self, model):
        self.model = model

    def __call__(self, **kwargs):
        return self.model(**kwargs)

    def parameters(self):
        return (p for p in self.model.parameters() if p.requires_grad)
