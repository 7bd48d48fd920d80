"""A pass by duals against torch's own forward mode over the whole model, family by family."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from measure.wrapped_cases import lora
from models import build, fp64_throughout, samples
from torch.utils._python_dispatch import TorchDispatchMode

from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.batches import DataPass
from geffect_fast.engines.dual.attention import SHORTEST
from geffect_fast.engines.dual.model import DualModel
from geffect_fast.engines.forward import forward_effects, parameter_passes_for
from geffect_fast.engines.model_outputs import model_outputs
from geffect_fast.engines.reference import Reference
from geffect_fast.objectives import resolve

FAMILIES = (
    *("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
    *("phi", "phi3", "gpt2", "gpt_neox"),
)
"""The families that are used most. They have grouped heads, biases, tied embeddings, windows,
softcaps, norms of queries and keys, partial rotation, parallel residuals and fused projections."""

LENGTHS = (120, 12, 70, 7, 7, 5)
"""Lengths that form three groups, two of them padded."""


def batch_of(layout, lengths=LENGTHS):
    rows = tokenize_rows(samples(list(lengths), 1, 2), None, name="forget")
    batches = make_batches(rows, ("answer",), token_budget=sum(lengths), layout=layout)
    return max(batches, key=lambda b: b.n_samples)


def directions(plan, n, names=None):
    generator = torch.Generator().manual_seed(n)
    return {
        name: torch.randn(n, *p.shape, generator=generator, dtype=p.dtype)
        for name, p in plan.parameters.items()
        if names is None or name in names
    }


def both(model, batch, along, needs=frozenset()):
    """Outputs by duals, and by the framework."""
    dual = DualModel(Plan.of(model))
    found = dual.outputs(along, batch, needs)
    assert not dual.by_framework
    dual.run_by_framework()
    return found, dual.outputs(along, batch, needs)


def agree(model, batch, along, needs=frozenset()):
    (outputs, tangents), (value, expected) = both(model, batch, along, needs)
    assert len(tangents) == len(expected) == len(next(iter(along.values())))
    for ours, theirs in zip((outputs, *tangents), (value, *expected), strict=True):
        assert len(ours.tensors()) == len(theirs.tensors()) > 0
        for x, y in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert x.dtype == y.dtype
            limit = 1e-12 * float(y.abs().max())
            torch.testing.assert_close(x, y, rtol=0, atol=limit)
    assert all(t.token_logprob.any() for t in tangents)


@pytest.mark.parametrize("layout", ["packed", "equal_length", "single"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, layout):
    """Logits and hidden states are compared too, along two or three directions."""
    with fp64_throughout():
        model = build(name, torch.float64)
        plan, lengths = Plan.of(model), LENGTHS if layout == "packed" else (9, 9, 6)
        needs = frozenset({"logits", "hidden_states"} if layout == "packed" else ())
        n = 2 if layout == "packed" else 3
        agree(model, batch_of(layout, lengths), directions(plan, n), needs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_attention_of_either_kind(name, attention):
    """The families include models whose sliding windows cut sequences short."""
    with fp64_throughout():
        model = build(name, torch.float64)
        model.set_attn_implementation(attention)
        agree(model, batch_of("packed"), directions(Plan.of(model), 2))
        assert model.config._attn_implementation == attention


PARTS = {
    "a layer in the middle": lambda name: ".1." in name,
    "keys": lambda name: "k_proj" in name,
    "values and queries": lambda name: "v_proj" in name or "q_proj" in name,
    "norms": lambda name: "norm" in name,
    "embeddings": lambda name: "embed" in name,
    "one bias": lambda name: name.endswith("layers.0.self_attn.q_proj.bias"),
    "gates": lambda name: "gate_proj" in name,
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_the_parameters(part):
    """Layers before the parts that move have no tangents and run unchanged."""
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        names = {name for name in Plan.of(model).parameters if PARTS[part](name)}
        assert names
        agree(model, batch_of("packed"), directions(Plan.of(model), 2, names))


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_adapters(base):
    """Products of adapters move beside frozen weights, which do not."""
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[base]
    with fp64_throughout():
        model = lora(base, targets)(torch.float64)
        agree(model, batch_of("packed"), directions(Plan.of(model), 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_that_of_the_parameters(dtype):
    model = build("llama", dtype)
    along = {k: 0.1 * v for k, v in directions(Plan.of(model), 2).items()}
    (outputs, tangents), (value, expected) = both(model, batch_of("packed"), along, {"logits"})
    for ours, theirs in zip((outputs, *tangents), (value, *expected), strict=True):
        assert ours.logits.dtype == dtype and ours.token_logprob.dtype == torch.float32
        error = (ours.logits.double() - theirs.logits.double()).norm()
        assert error <= 8 * torch.finfo(dtype).eps * theirs.logits.double().norm()


# ---- the cost of a pass ----


class Calls(TorchDispatchMode):
    """A dispatch mode that counts calls and keeps the shapes of floating-point outputs."""

    def __init__(self):
        super().__init__()
        self.n, self.waits, self.shapes = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n += 1
        self.waits += func in WAITING
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.shapes.add(tuple(x.shape))
        return out


WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


def calls_of(run):
    with Calls() as calls:
        run()
    return calls


def sixteen_layers(config="Llama", **settings):
    import transformers

    size = {"vocab_size": 500, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 16}
    made = getattr(transformers, f"{config}Config")(**size, **heads, **settings)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


@pytest.mark.parametrize("config", ["Llama", "Qwen3", "Mistral"])
def test_a_pass_makes_few_calls_and_waits_for_none(config):
    """The batch holds sixteen samples of unequal lengths; the pass goes along two directions."""
    torch.manual_seed(0)
    model = sixteen_layers(config)
    batch = batch_of("packed", range(20, 36))
    along = directions(Plan.of(model), 2)
    dual = DualModel(Plan.of(model))
    dual.outputs(along, batch, frozenset())
    ours = calls_of(lambda: dual.outputs(along, batch, frozenset()))
    with torch.no_grad():
        plain = calls_of(lambda: model_outputs(model, batch))
    assert ours.n <= 4.5 * plain.n, (ours.n, plain.n)
    assert ours.waits == 0


def test_effects_of_an_objective_cost_few_calls_more():
    """The count is of a whole batch: trials of modules, the pass, an objective's terms, results."""
    torch.manual_seed(0)
    model = sixteen_layers()
    plan, batch = Plan.of(model), batch_of("packed", range(20, 36))
    data_pass, n = DataPass([batch], {0: resolve("npo")}), len(plan.parameters)
    kept = []

    def effects():
        forward_effects(
            plan,
            [data_pass],
            directions(plan, 2),
            1,
            Reference(),
            lambda *found: kept.append(found[2]),
            parameter_passes=parameter_passes_for(plan, [0] * n, 2),
            per_token=True,
            tick=lambda _: None,
        )

    effects()
    ours = calls_of(effects)
    with torch.no_grad():
        plain = calls_of(lambda: model_outputs(model, batch))
    assert ours.n <= 6 * plain.n, (ours.n, plain.n)
    assert ours.waits <= 10
    assert torch.equal(kept[0], kept[1]) and kept[0].any()


def test_more_lengths_make_few_more_calls(monkeypatch):
    """64 samples of 20 to 150 tokens form three groups; samples of one length form one.

    Attention is cut up as on a GPU.
    """
    monkeypatch.setitem(SHORTEST, "cpu", SHORTEST["cuda"])
    model = sixteen_layers()
    along = directions(Plan.of(model), 2)
    dual = DualModel(Plan.of(model))

    def count(lengths):
        return calls_of(lambda: dual.outputs(along, batch_of("packed", lengths), frozenset())).n

    one, many = count([30] * 64), count([20 + 2 * i for i in range(64)])
    assert many < 2 * one


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_no_matrix_of_all_tokens(name, attention):
    """The one matrix of all tokens is the mask that transformers makes, once for all layers."""
    model = build(name)
    if name != "gemma2":  # gemma2 knows eager attention alone
        model.set_attn_implementation(attention)
    batch = batch_of("packed")
    t = batch.total_tokens
    along = directions(Plan.of(model), 2)
    calls = calls_of(lambda: DualModel(Plan.of(model)).outputs(along, batch, frozenset()))
    square = {shape for shape in calls.shapes if shape[-2:] == (t, t)}
    assert all(torch.Size(shape).numel() == t * t for shape in square), square


def test_the_model_is_left_as_it_was():
    model = build("llama")
    held = {id(m): dict(m._parameters) for m in model.modules()}
    own = torch._functorch.utils.unwrap_dead_wrappers
    dual, along = DualModel(Plan.of(model)), directions(Plan.of(model), 2)
    dual.outputs(along, batch_of("packed"), frozenset())
    assert all(m._parameters == held[id(m)] for m in model.modules())
    assert torch._functorch.utils.unwrap_dead_wrappers is own
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_unknown_models_run_by_the_framework():
    """The experts are written into a constant tensor; the batch has the layout of the table."""
    with fp64_throughout():
        model = build("qwen2_moe", torch.float64)
        dual = DualModel(Plan.of(model))
        layout = ARCHITECTURES["qwen2_moe"].layout
        dual.outputs(directions(dual.plan, 2), batch_of(layout, (9, 9)), frozenset())
    assert dual.by_framework
    assert DualModel(Plan.of(model)).by_framework
    assert not DualModel(Plan.of(build("qwen2"))).by_framework
