"""Log-probabilities without tangents of logits: as with them, and left where they do not serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engines.forward_cases import FORGET, run
from models import build, fp64_throughout
from torch import nn
from torch.func import jvp, vmap

from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines import dual_output, dual_rule, forward_check
from geffect_fast.engines.dual import DualFunctions
from geffect_fast.engines.dual_layers import Linear
from geffect_fast.engines.dual_modules import fast_forwards
from geffect_fast.engines.dual_output import Factors, LabelNLL, OutputLayer
from geffect_fast.engines.forward import dual_model, dual_outputs


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def directions_of(model, n, moves=lambda name: True):
    return {
        name: noise(n, *p.shape, seed=i, dtype=p.dtype)
        for i, (name, p) in enumerate(Plan.of(model).parameters.items())
        if moves(name)
    }


def batches_of(layout):
    data = tokenize_rows(FORGET, None, name="forget")
    return make_batches(data, ("answer",), token_budget=60, reduction="token", layout=layout)


def both(model, directions, batch, needs=frozenset()):
    """Values, tangents and whether the layer served, without and with the logits' tangents."""
    found = []
    for layer in (OutputLayer(model), OutputLayer(model)):
        if found:
            layer.layer = None
        plan = Plan.of(model)
        with dual_model(plan, batch, fast_forwards(model)):
            own, along = dual_outputs(plan, directions, batch, needs, layer)
        assert not own.token_logprob.requires_grad
        tangents = torch.stack([one.token_logprob for one in along])
        found.append((own.token_logprob, tangents, layer.layer is not None))
    return found


def agree(model, directions, batch, tolerance=1e-12):
    (value, tangents, serves), (expected, plain, _) = both(model, directions, batch)
    assert torch.equal(value, expected)
    assert tangents.dtype == plain.dtype
    assert plain.any()
    limit = tolerance * float(plain.abs().max())
    torch.testing.assert_close(tangents, plain, rtol=0, atol=limit)
    return serves


# tied; untied; soft-capped; scaled; divided; with a bias; no positions to be packed by
MODELS = ["llama_tied", "llama", "gemma2", "cohere", "granite", "phi", "falcon_alibi", "mamba"]


@pytest.mark.parametrize("n_directions", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, n_directions, monkeypatch):
    monkeypatch.setattr(dual_rule, "BLOCK", 500)  # several blocks of tokens
    with fp64_throughout():
        model = build(name, torch.float64)
        for layout in ("packed", "single") if name == "llama" else ("single",):
            batch = batches_of(layout)[-1]
            assert agree(model, directions_of(model, n_directions), batch)


PARTS = {
    "head": lambda name: "lm_head" in name,
    "bias": lambda name: name == "lm_head.bias",
    "below": lambda name: "lm_head" not in name,
    "first": lambda name: "embed" in name,
}


@pytest.mark.parametrize("part", PARTS)
def test_parameters_of_one_group(part):
    """The layer's input moves, or its weight, or both."""
    model = build("phi", torch.float64)
    with fp64_throughout():
        assert agree(model, directions_of(model, 3, PARTS[part]), batches_of("packed")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """As far from fp32 as with the logits' tangents."""
    model = build("phi")
    directions, batch = directions_of(model, 2), batches_of("packed")[0]
    exact = both(model, directions, batch)[1][1]
    with torch.autocast("cpu", dtype):
        (_, found, serves), (_, plain, _) = both(model, directions, batch)
    assert serves
    error, usual = ((x - exact).norm() for x in (found, plain))
    assert 0 < error <= 2 * usual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    exact = build("gemma2").to(dtype).float()
    directions, batch = directions_of(exact, 2), batches_of("packed")[0]
    directions = {name: v.to(dtype).float() for name, v in directions.items()}
    expected = both(exact, directions, batch)[1][1]
    low = {name: v.to(dtype) for name, v in directions.items()}
    (_, found, serves), (_, plain, _) = both(exact.to(dtype), low, batch)
    assert serves and found.dtype == torch.float32
    error, usual = ((x - expected).norm() for x in (found, plain))
    assert 0 < error <= 2 * usual


# ---- the rule by itself ----


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("which", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
def test_against_the_framework(which, biased, monkeypatch):
    """With labels that are to be ignored, and what follows a layer as some models have it."""
    if "b" in which and not biased:
        which = which.replace("b", "") or "x"
    monkeypatch.setattr(dual_rule, "BLOCK", 14)
    primals = {"x": noise(2, 3, 4), "w": noise(7, 4, seed=1), "b": noise(7, seed=2)}
    labels = torch.tensor([1, -100, 0, 6, 6, -100])
    along = {key: noise(3, *primals[key].shape, seed=5 + i) for i, key in enumerate(which)}

    def nll(logits):
        capped = 5 * (logits / 5).tanh()
        return F.cross_entropy(capped.flatten(0, 1), labels, reduction="none")

    def plain(moving):
        given = primals | moving
        return nll(F.linear(given["x"], given["w"], given["b"] if biased else None))

    start = {key: primals[key] for key in which}
    expected = vmap(lambda v: jvp(plain, (start,), (v,))[1])(along)
    factors = Factors()

    def kept(moving):
        given = primals | moving
        return factors(given["x"], given["w"], given["b"] if biased else None)

    vmap(lambda v: jvp(kept, (start,), (v,))[1])(along)
    (grad,) = torch.autograd.grad(nll(factors.logits).sum(), factors.logits)
    rows = (labels != -100).nonzero()[:, 0]
    found = factors.change(grad, rows, 3)
    torch.testing.assert_close(found, expected[:, rows], rtol=1e-12, atol=1e-12)
    assert not expected[:, labels == -100].any()


def test_no_tangent_of_logits_is_formed(monkeypatch):
    """Nor is the softmax of every direction gone through."""
    widths, labelled = [], []
    tangent, of_labels = Linear.tangent, LabelNLL.tangent
    monkeypatch.setattr(Linear, "tangent", lambda *a: (widths.append(len(a[1][1])), tangent(*a))[1])
    monkeypatch.setattr(LabelNLL, "tangent", lambda *a: (labelled.append(1), of_labels(*a))[1])
    model = build("llama")
    directions, batch = directions_of(model, 2), batches_of("packed")[0]
    plan, layer = Plan.of(model), OutputLayer(model)
    vocab = model.config.vocab_size
    for needs, formed in ((frozenset(), False), (frozenset({"logits"}), True)):
        with dual_model(plan, batch, {}):
            dual_outputs(plan, directions, batch, needs, layer)
        assert widths and (vocab in widths) == bool(labelled) == formed
    assert layer.layer is model.lm_head


def test_profiles_take_it_and_find_the_same(monkeypatch):
    model = build("llama_tied", torch.float64)
    served = []
    change = OutputLayer.change
    monkeypatch.setattr(OutputLayer, "change", lambda *a: (served.append(1), change(*a))[1])
    objectives = ["ga", "npo(beta=0.5)", "rmu(layer=1)"]
    with fp64_throughout():
        found = run(model, None, objectives, ["group", "sample", "token"])
        assert served
        monkeypatch.setattr(OutputLayer, "change", lambda *a: None)
        expected = run(model, None, objectives, ["group", "sample", "token"])
    limit = 1e-12 * float(abs(expected.g_effect).max())
    assert float(abs(found.g_effect - expected.g_effect).max()) <= limit


# ---- what does not serve ----


class Small(nn.Module):
    """A language model whose last step can be anything."""

    def __init__(self, last=lambda logits: logits, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(600, 4)
        self.lm_head = nn.Linear(4, 600, bias=bias)
        self.last = last

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        return self.last(self.lm_head(self.embed_tokens(input_ids).tanh()))


class Twice(Small):
    def forward(self, input_ids):
        return super().forward(input_ids) + super().forward(input_ids.flip(-1))


class Constant(Small):
    """The layer's derivative does not count, what is below counts otherwise."""

    def forward(self, input_ids):
        h = self.embed_tokens(input_ids).tanh()
        with torch.no_grad():
            weight = self.lm_head(h)
        return weight * h.sum(-1, keepdim=True)


class ByFunction(Small):
    """Its layer is never called."""

    def forward(self, input_ids):
        return F.linear(self.embed_tokens(input_ids), self.lm_head.weight)


def in_place(logits):
    logits *= 2
    return logits


OTHERS = {
    "sum over tokens": Small(lambda z: z - 0.1 * z.mean(1, keepdim=True)),
    "next token": Small(lambda z: z + 0.1 * z.roll(1, 1)),
    "in place": Small(in_place),
    "detached": Small(lambda z: z.detach()),
    "one more token": Small(lambda z: torch.cat([z, z[:, :1]], 1)[:, 1:]),
    "twice": Twice(),
    "constant": Constant(),
    "by function": ByFunction(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_run_with_tangents_of_logits(name):
    model = OTHERS[name].double()
    batch = batches_of("single")[1]
    (value, tangents, serves), (expected, plain, _) = both(model, directions_of(model, 2), batch)
    assert not serves
    assert torch.equal(value, expected) and torch.equal(tangents, plain)
    assert "forward" not in vars(model.lm_head)


def test_elementwise_steps_serve():
    for last in (lambda z: z, lambda z: 30 * (z / 30).tanh(), lambda z: z.float().double() * 2):
        model = Small(last, bias=True).double()
        with fp64_throughout():
            assert agree(model, directions_of(model, 2), batches_of("single")[1])


def test_layers_with_a_forward_of_their_own_are_left():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    model = Small()
    assert OutputLayer(model).layer is model.lm_head
    for other in (Own(4, 600), nn.Identity(), None):
        model.lm_head = other
        assert OutputLayer(model).layer is None
    model.lm_head = nn.Linear(4, 600)
    model.lm_head.forward = lambda x: x
    assert OutputLayer(model).layer is None
    assert OutputLayer(nn.Linear(2, 2)).layer is None


def test_layers_that_hooks_look_at_are_left():
    model = build("llama")
    for register in (
        model.lm_head.register_forward_hook,
        model.lm_head.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert OutputLayer(model).layer is None
        handle.remove()
        assert OutputLayer(model).layer is model.lm_head


def test_the_forward_is_put_back_after_an_error():
    model = Small()
    layer = OutputLayer(model)
    with pytest.raises(KeyError), layer.calls():
        assert "forward" in vars(model.lm_head)
        raise KeyError
    assert "forward" not in vars(model.lm_head)


def test_too_little_memory_is_not_taken_for_another_layer(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Factors, "change", full)
    model = Small().double()
    with pytest.raises(torch.OutOfMemoryError):
        both(model, directions_of(model, 1), batches_of("single")[1])


def test_the_check_sees_what_the_layer_loses(monkeypatch):
    """Before a profile: parameters that count through the layer alone."""
    model = build("llama", torch.float64)
    data = tokenize_rows(FORGET, None, name="forget")
    plan = Plan.of(model)
    assert forward_check.forward_mode_problem(plan, data, "packed") is None
    change = Factors.change

    def lost(self, *args):
        self.tangents = (self.tangents[0], None, None)
        return change(self, *args)

    monkeypatch.setattr(dual_output.Factors, "change", lost)
    assert "lm_head.weight" in forward_check.forward_mode_problem(plan, data, "packed")


def test_labels_keep_their_rule_elsewhere():
    z, labels = noise(2, 3), torch.tensor([0, 2])
    with DualFunctions(labels=False):
        leaf = z.clone()
        leaf.requires_grad = True
        nll = F.cross_entropy(leaf, labels, reduction="none")
    assert nll.grad_fn.name().startswith("NllLoss")
    with DualFunctions():
        assert F.cross_entropy(leaf, labels, reduction="none").grad_fn.name() == "_DualBackward"
