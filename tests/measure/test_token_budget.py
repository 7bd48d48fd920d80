"""The token budget against the memory that profiles take: between 0.6 and 0.95 of what is free."""

from __future__ import annotations

import pytest
import torch
import transformers
from live_memory import LiveMemory
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from geffect_fast.data import estimate_token_budget, token_budget
from geffect_fast.errors import InputError
from geffect_fast.measure.profiler import Profiler

VOCAB = 2000
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCAB, "n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 512,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS = {
    "llama": ("Llama", SIZE),
    "eager": ("Llama", SIZE | {"attn_implementation": "eager"}),
    "qwen2": ("Qwen2", SIZE),
    "gemma2": ("Gemma2", SIZE | {"head_dim": 16}),
    "gpt2": ("GPT2", GPT),
    "gpt_neox": ("GPTNeoX", SIZE),
    "phi": ("Phi", SIZE | {"num_key_value_heads": 8}),
}
PARAMETERS = {"engine": "reverse", "resolve": ("parameter", "sample")}
FOUR = ["ga", "wga", "npo", "simnpo"]
JOBS = {
    "norms": (["ga"], PARAMETERS),
    "no norms": (["ga"], PARAMETERS | {"norms": False}),
    "four, norms": (FOUR, PARAMETERS),
    "four": (FOUR, PARAMETERS | {"norms": False}),
    "whole gradients": (["ga"], {"engine": "reverse", "resolve": ("parameter",)}),
    "forward": (FOUR, {"engine": "forward", "resolve": ("sample", "token"), "norms": False}),
    "distributions": (["kl"], PARAMETERS | {"norms": False}),
}
CASES = [
    *(("llama", torch.float32, job) for job in JOBS),
    *((name, torch.float32, "no norms") for name in MODELS if name != "llama"),
    ("llama", torch.bfloat16, "no norms"),
    ("llama", torch.bfloat16, "four"),
    ("llama", torch.float64, "no norms"),
]


def make(name, dtype):
    config, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{config}Config")(**settings)
    )
    return model.eval().to(dtype)


def rows(n, seed):
    """Rows half of whose tokens are answers, as with questions and answers."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in torch.randint(30, 60, (n,), generator=generator).tolist():
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        hidden = length // 2
        found.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "job"), CASES, ids=str)
def test_a_profile_takes_most_of_the_memory_and_not_all(name, dtype, job, monkeypatch):
    objectives, settings = JOBS[job]
    # Whole gradients of four objectives fill a memory that is enough for others.
    free = (90 if job == "four, norms" else 60) * 2**20 * (2 if dtype == torch.float64 else 1)
    monkeypatch.setattr(token_budget, "free_memory", lambda _: free)
    monkeypatch.setattr(token_budget, "MIN_CPU_CAP", 2**40)
    monkeypatch.setattr("geffect_fast.measure.profiler.check_memory", lambda *_: None)
    many, few = rows(26, 1), rows(6, 2)
    forget, retain = (few, many) if objectives == ["kl"] else (many, few)
    profiler = Profiler.of(
        make(name, dtype), None, forget=forget, retain=retain, objectives=objectives, **settings
    )
    assert 200 < profiler.token_budget < 1000, "batches should be full, and several"
    with LiveMemory() as memory:
        profiler.measure()
    assert 0.6 * free <= memory.most <= 0.95 * free, memory.most / free


def llama(hidden, layers=2, vocab=50, **options):
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, vocab_size=vocab, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def uncapped(monkeypatch):
    monkeypatch.setattr(token_budget, "MIN_CPU_CAP", 2**40)


def test_budget_solves_its_own_formula(uncapped):
    model = llama(32, attn_implementation="sdpa")
    trained = sum(p.numel() for p in model.parameters())
    layer = 4 * (32 + 32) + 3 * (32 + 64)
    # A norm keeps its input, the input divided by its size, and the size; SiLU keeps its output.
    per_token = 4 * (2 * layer + 2 * 64 + 5 * (2 * 32 + 1)) + 4 * 3 * 50
    for wanted in (5, 80, 200):
        for m in (0, 1, 3):
            need = 4 * m * trained + 4 * 32 * 50 + per_token * wanted + (1 + 4 * 2) * wanted**2
            found = estimate_token_budget(model, n_directions=m, memory_bytes=int(need / 0.8) + 2)
            assert found == wanted


@pytest.mark.parametrize(
    "more",
    [
        {"n_directions": 4},
        {"n_gradients": 1},
        {"shared": True},
        {"logits": True},
        {"predicted": 1.0},
        {"by_sample": False},
        {"n_trained": 2**20},
        {"memory_bytes": 2**22},
    ],
    ids=str,
)
def test_whatever_takes_memory_takes_tokens(more, uncapped):
    model = llama(32, vocab=500, attn_implementation="sdpa")
    less = {"n_directions": 1, "predicted": 0.5, "by_sample": True, "memory_bytes": 2**23}
    with_less = estimate_token_budget(model, **less)
    assert estimate_token_budget(model, **(less | more)) < 0.95 * with_less


def test_other_attention_frozen_layers_and_too_little_memory(uncapped):
    eager, fused = (llama(32, attn_implementation=kind) for kind in ("eager", "sdpa"))
    given = {"n_directions": 1, "memory_bytes": 4_000_000}
    assert estimate_token_budget(eager, **given) < estimate_token_budget(fused, **given)
    whole = estimate_token_budget(fused, **given)
    fused.model.requires_grad_(False)
    assert estimate_token_budget(fused, **given) > whole
    assert estimate_token_budget(fused, n_directions=1, memory_bytes=1) == 1


def test_many_directions_count_in_forward_mode(uncapped):
    model = llama(32, vocab=20_000, attn_implementation="sdpa")
    given = {"n_directions": 8, "by_sample": True, "memory_bytes": 2**28}
    assert estimate_token_budget(model, forward=True, **given) < estimate_token_budget(
        model, **given
    )


@pytest.mark.parametrize(("hidden", "cap"), [(32, 256), (256, 256), (512, 512)])
def test_budget_on_a_cpu_is_capped_by_the_cost_of_attention(hidden, cap):
    model = llama(hidden, layers=1)
    assert estimate_token_budget(model, n_directions=2, memory_bytes=2**40) == cap
    assert 1 <= estimate_token_budget(model, n_directions=2) <= cap


def test_budget_knows_transposed_weights():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    assert estimate_token_budget(model, n_directions=1, memory_bytes=2**40) == 256


def test_what_modules_keep_is_tried_without_a_trace():
    model = llama(32)
    norm = model.model.norm
    norm.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    norm.weight.grad = None
    estimate_token_budget(model, n_directions=1)
    assert norm.weight.grad is None


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Linear(2, 2), {"n_directions": -1}, r"n_directions: -1 is negative"),
        (nn.Linear(2, 2), {"n_directions": 1, "memory_bytes": 0}, r"memory_bytes: 0"),
        (nn.ReLU(), {"n_directions": 1}, r"model: it has no weight matrix"),
    ],
)
def test_bad_budget_arguments(model, arguments, message):
    with pytest.raises(InputError, match=message):
        estimate_token_budget(model, **arguments)
