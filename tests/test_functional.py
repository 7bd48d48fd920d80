"""The per-sample functions against plain autograd, one sample at a time."""

from __future__ import annotations

import contextlib
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, VOCAB
from models import FIVE, build, fp64_throughout
from torch import nn

from geffect_fast import functional
from geffect_fast.capture import GramOuter, Outer, Plan, Recorder, Segments, products
from geffect_fast.capture.layer_rules import InputGrams
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.functional import (
    grad_inner_products,
    pairwise_inner_products,
    per_sample_grad_norms,
    per_sample_inner_products,
)
from geffect_fast.ops import backend

native = pytest.mark.skipif(
    not backend.has_native("token_grams", "cpu"), reason="the native library is not built"
)
LENGTHS = [7, 2, 5]
OTHER_LENGTHS = [4, 6]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def sequences(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def padded(lengths, seed=0):
    ids = nn.utils.rnn.pad_sequence(sequences(lengths, seed), batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def packed(lengths, seed=0):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.cat(sequences(lengths, seed))[None]
    return {"input_ids": ids, "position_ids": positions, "cu_seqlens": cu}


def nll(logits, ids):
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum")


def loss_fn(model, batch):
    """One mean negative log-likelihood for each sample, of padded or packed samples."""
    if "cu_seqlens" in batch:
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]
        bounds = batch["cu_seqlens"].tolist()
        pieces = [slice(a, b) for a, b in pairwise(bounds)]
        losses = [nll(logits[p], batch["input_ids"][0, p]) / (p.stop - p.start) for p in pieces]
    else:
        logits = model(**batch, use_cache=False).logits
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = zip(logits, batch["input_ids"], lengths, strict=True)
        losses = [nll(row[:n], ids[:n]) / n for row, ids, n in rows]
    return torch.stack(losses)


def expected(model, lengths, seed=0):
    """Every sample's gradient `(n_samples, *shape)`, fp64, by parameter name."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for ids in sequences(lengths, seed):
        loss = nll(model(input_ids=ids[None], use_cache=False).logits[0], ids) / len(ids)
        rows.append(torch.autograd.grad(loss, params))
    stacked = [torch.stack(g).double() for g in zip(*rows, strict=True)]
    return dict(zip(names, stacked, strict=True))


def precise(dtype):
    return fp64_throughout() if dtype == torch.float64 else contextlib.nullcontext()


def close(actual, wanted, dtype, scale=None):
    """Compare relative to `scale`: the largest possible product, if the result is a difference."""
    scale = wanted.abs().max() if scale is None else scale
    assert actual.dtype == torch.float64 and actual.shape == wanted.shape
    assert float((actual - wanted).abs().max()) <= TOLERANCE[dtype] * float(scale)


def norm(own):
    return own.flatten(1).norm(dim=1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("architecture", [*FIVE, "qwen2_moe"])
def test_diagonal_of_the_fisher_matrix(architecture, dtype):
    with precise(dtype):
        model = build(architecture, dtype)
        found = functional.fisher_diagonal(model, loss_fn, packed(LENGTHS))
        wanted = {k: g.square().sum(0) for k, g in expected(model, LENGTHS).items()}
    largest = max(float(w.max()) for w in wanted.values())
    assert found.keys() == wanted.keys()
    for name, own in wanted.items():
        close(found[name].double(), own, dtype, max(float(own.max()), 1e-6 * largest))
    norms = per_sample_grad_norms(model, loss_fn, packed(LENGTHS), per_parameter=True)
    for name, own in norms.items():
        torch.testing.assert_close(
            found[name].double().sum(), own.square().sum(), rtol=1e-4, atol=0
        )


def directions(model, m, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = {k: p.shape for k, p in model.named_parameters() if p.requires_grad}
    return {
        k: torch.randn(*([m] if m else []), *shape, generator=generator).to(dtype)
        for k, shape in shapes.items()
    }


FORMS = {"packed": packed, "equal_length": padded}  # by the layout that an architecture allows
CASES = {
    f"{name}-{precision}-{form.__name__}": (name, dtype, form)
    for name, row in ARCHITECTURES.items()
    for precision, dtype in DTYPES.items()
    for form in FORMS.values()
    if name in FIVE or (precision == "fp64" and FORMS.get(row.layout) is form)
}
OF_FIVE = {key: case for key, case in CASES.items() if case[0] in FIVE}


@pytest.mark.parametrize(("architecture", "dtype", "form"), OF_FIVE.values(), ids=OF_FIVE)
def test_every_architecture_of_five_by_parameter_and_summed(architecture, dtype, form):
    exact(architecture, dtype, form, summed=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype", "form"),
    [pytest.param(*case, id=key) for key, case in CASES.items() if key not in OF_FIVE],
)
def test_every_architecture(architecture, dtype, form):
    exact(architecture, dtype, form, summed=False)


def exact(architecture, dtype, form, summed):
    """Check that norms and products, by parameter and summed, are those of plain autograd."""
    with precise(dtype):
        model = build(architecture, dtype)
        asking = [p.requires_grad for p in model.parameters()]
        one, two = expected(model, LENGTHS), expected(model, OTHER_LENGTHS, 1)
        batch, other = form(LENGTHS), form(OTHER_LENGTHS, 1)
        norms = per_sample_grad_norms(model, loss_fn, batch, per_parameter=True)
        whole = torch.stack([norm(g) for g in one.values()]).norm(dim=0)
        assert norms.keys() == one.keys()
        for name, own in one.items():
            close(norms[name], norm(own), dtype, max(norm(own).max(), 1e-2 * whole.max()))
        close(per_sample_grad_norms(model, loss_fn, batch), whole, dtype)

        v = directions(model, 2)
        found = per_sample_inner_products(model, loss_fn, batch, v, per_parameter=True)
        products = {k: v[k].flatten(1) @ own.flatten(1).T for k, own in one.items()}
        for name, product in products.items():
            largest = v[name].flatten(1).norm(dim=1).max() * whole.max()
            close(found[name], product, dtype, 0.1 * largest)
        if summed:
            total = per_sample_inner_products(model, loss_fn, batch, v)
            close(total, sum(products.values()), dtype, 0.1 * largest * len(products) ** 0.5)

        pairs = pairwise_inner_products(model, loss_fn, batch, other, per_parameter=True)
        crossed = {k: one[k].flatten(1) @ two[k].flatten(1).T for k in one}
        size = whole.max() * torch.stack([norm(g) for g in two.values()]).norm(dim=0).max()
        for name, cross in crossed.items():
            close(pairs[name], cross, dtype, size)
        if summed:
            total = pairwise_inner_products(model, loss_fn, batch, other)
            close(total, sum(crossed.values()), dtype, size)
    assert all(p.grad is None for p in model.parameters())
    assert asking == [p.requires_grad for p in model.parameters()]


ALONE = [name for name, row in ARCHITECTURES.items() if row.layout == "single"]


@pytest.mark.parametrize("architecture", ALONE)
def test_rows_that_a_model_mixes_are_refused_unless_of_one_sample(architecture):
    with fp64_throughout():
        model = build(architecture, torch.float64)
        with pytest.raises(UnsupportedModelError, match=r"module 'model\.layers.* apart by sample"):
            per_sample_grad_norms(model, loss_fn, padded(LENGTHS))
        own = expected(model, LENGTHS[:1])
        whole = torch.stack([norm(g) for g in own.values()]).norm(dim=0)
        close(per_sample_grad_norms(model, loss_fn, padded(LENGTHS[:1])), whole, torch.float64)


def test_identities():
    """The diagonal of all pairs is the squared norm, also with a sample's gradient as direction."""
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        batch = padded(LENGTHS)
        squares = per_sample_grad_norms(model, loss_fn, batch).square()
        pairs = pairwise_inner_products(model, loss_fn, batch, batch)
        torch.testing.assert_close(pairs.diagonal(), squares)
        torch.testing.assert_close(pairs, pairs.T)
        twice = pairwise_inner_products(model, loss_fn, batch, padded(LENGTHS))  # not one object
        torch.testing.assert_close(pairs, twice)
        own = {k: g[1] for k, g in expected(model, LENGTHS).items()}
        torch.testing.assert_close(
            per_sample_inner_products(model, loss_fn, batch, own), pairs[:, 1]
        )


def test_one_direction_some_parameters_and_frozen_ones():
    model = build("gpt2", torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_("h.1" in name or "wte" in name)
    asking = [p.requires_grad for p in model.parameters()]
    own = expected(model, LENGTHS)
    assert "transformer.h.0.mlp.c_fc.weight" not in own
    v = directions(model, 0)
    del v["transformer.wte.weight"]
    found = per_sample_inner_products(model, loss_fn, padded(LENGTHS), v, per_parameter=True)
    assert found.keys() == own.keys() and not found["transformer.wte.weight"].any()
    for name, direction in v.items():
        torch.testing.assert_close(found[name], own[name].flatten(1) @ direction.flatten())
    total = per_sample_inner_products(model, loss_fn, padded(LENGTHS), v)
    torch.testing.assert_close(total, sum(found.values()))
    assert total.shape == (3,) and per_sample_inner_products(
        model, loss_fn, padded(LENGTHS), directions(model, 1)
    ).shape == (1, 3)
    norms = per_sample_grad_norms(model, loss_fn, padded(LENGTHS))
    torch.testing.assert_close(norms, torch.stack([norm(g) for g in own.values()]).norm(dim=0))
    assert asking == [p.requires_grad for p in model.parameters()]


def test_no_direction_is_zero():
    model = build("llama")
    assert not per_sample_inner_products(model, loss_fn, padded(LENGTHS), {}).any()


def test_gradients_and_hooks_are_left_alone():
    model = build("llama")
    loss_fn(model, padded(LENGTHS)).sum().backward()
    before = {k: p.grad.clone() for k, p in model.named_parameters()}
    pairwise_inner_products(model, loss_fn, padded(LENGTHS), padded(OTHER_LENGTHS))
    assert all(torch.equal(p.grad, before[k]) for k, p in model.named_parameters())
    with pytest.raises(KeyError):
        per_sample_grad_norms(model, lambda m, b: {}["x"], padded(LENGTHS))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_under_no_grad_and_for_plain_tensors():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3).double()
    with torch.no_grad():
        norms = per_sample_grad_norms(model, lambda m, b: m(b)[:, 0], x)
        again = per_sample_grad_norms(model, lambda m, b: m(b[0])[:, 0], [x])
    wanted = []
    for row in x:
        grads = torch.autograd.grad(model(row)[0], list(model.parameters()))
        wanted.append(torch.cat([g.flatten() for g in grads]).norm())
    torch.testing.assert_close(norms, torch.stack(wanted))
    assert torch.equal(norms, again)


def test_bf16_within_twice_the_error_of_plain_bf16():
    model = build("llama", torch.bfloat16)
    found = per_sample_grad_norms(model, loss_fn, padded(LENGTHS))
    plain = torch.stack([norm(g) for g in expected(model, LENGTHS).values()]).norm(dim=0)
    with fp64_throughout():
        own = expected(model.double(), LENGTHS)
    exact = torch.stack([norm(g) for g in own.values()]).norm(dim=0)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 2**-8 * exact.max()


# ---- wrong calls ----


def call(model=None, loss=loss_fn, batch=None, direction=None):
    model = model or build("llama")
    batch = padded(LENGTHS) if batch is None else batch
    if direction is None:
        return per_sample_grad_norms(model, loss, batch)
    return per_sample_inner_products(model, loss, batch, direction)


def dropping():
    model = build("gpt2")
    return model.train()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": lambda m, b: loss_fn(m, b).mean()}, InputError, r"loss_fn: .* one loss a sample"),
        ({"loss": lambda m, b: loss_fn(m, b)[:2]}, InputError, r"shape \(3,\), got \(2,\)"),
        ({"loss": lambda m, b: [0.0]}, InputError, r"got list"),
        ({"loss": lambda m, b: torch.zeros(3)}, UnsupportedModelError, "depend on no module"),
        ({"loss": lambda m, b: loss_fn(m, b).detach()}, UnsupportedModelError, "depend on no"),
        ({"loss": lambda m, b: loss_fn(m, b) + m.lm_head.weight.norm()}, UnsupportedModelError,
         r"parameter 'lm_head\.weight' is used outside"),
        ({"batch": {"text": "a"}}, InputError, "batch: holds no tensor"),
        ({"model": dropping}, InputError, r"'transformer\.drop' .* call model\.eval\(\)"),
        ({"model": lambda: build("llama").requires_grad_(False)}, InputError, "every parameter"),
        ({"direction": {"lm_head": torch.zeros(1)}}, InputError, "'lm_head' is no trainable"),
        ({"direction": {"lm_head.weight": torch.zeros(VOCAB, 15)}}, InputError,
         r"'lm_head\.weight' has shape \(61, 15\), the parameter \(61, 16\)"),
        ({"direction": {"lm_head.weight": torch.zeros(2, VOCAB, 16),
                        "model.norm.weight": torch.zeros(3, 16)}}, InputError, "same number"),
    ],
)  # fmt: skip
def test_wrong_calls_get_one_line(arguments, error, message):
    if callable(arguments.get("model")):
        arguments = arguments | {"model": arguments["model"]()}
    with pytest.raises(error, match=message) as caught:
        call(**arguments)
    assert "\n" not in str(caught.value)


# ---- whole gradients ----


def grads(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).double() for shape in [(2, 3), (4,), (), (3, 2)]
    ]


def test_grad_inner_products():
    a, b = grads(0), grads(1)
    dots = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(grad_inner_products(a, b), dots)
    grouped = torch.stack([dots[0] + dots[3], dots[1] + dots[2]])
    torch.testing.assert_close(grad_inner_products(a, b, [0, 1, 1, 0]), grouped)
    torch.testing.assert_close(grad_inner_products(a, b, ["x", "y", "y", "x"]), grouped)
    names = ["p", "q", "r", "s"]
    as_dicts = [dict(zip(names, g, strict=True)) for g in (a, b)]
    shuffled = {k: as_dicts[1][k] for k in reversed(names)}
    torch.testing.assert_close(grad_inner_products(as_dicts[0], shuffled), dots)
    groups = {"s": "x", "r": "y", "q": "y", "p": "x"}
    torch.testing.assert_close(grad_inner_products(as_dicts[0], shuffled, groups), grouped)
    leaf = [g.requires_grad_() for g in a]
    assert not grad_inner_products(leaf, b).requires_grad
    assert (
        grad_inner_products([g.float() for g in a], [g.float() for g in b]).dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"p": torch.ones(2)}, [torch.ones(2)]), "both gradients as mappings, or neither"),
        (({"p": torch.ones(2)}, {"q": torch.ones(2)}), "parameter 'p' is in one gradient only"),
        (({"p": torch.ones(2)}, {"p": torch.ones(2)}, {"q": 0}), "lacks parameter 'p'"),
        (([torch.ones(2)], [torch.ones(2)], {"p": 0}), "goes with gradients by name"),
        (([torch.ones(2)], [torch.ones(3)]), r"shape \(3,\)"),
        (([torch.ones(2)], []), "has 0 tensors"),
        (([torch.ones(2)], [torch.ones(2)], [0, 1]), "2 groups for 1 tensors"),
        (([torch.ones(2)], [torch.ones(2)], [-1]), "must lie in"),
    ],
)
def test_grad_inner_products_wrong_calls(arguments, message):
    with pytest.raises(InputError, match=message):
        grad_inner_products(*arguments)


@pytest.mark.parametrize("condensed", [False, pytest.param(True, marks=native)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_of_one_input_share_its_gram_matrix(architecture, condensed, monkeypatch):
    """Queries, keys and values share one call, as do gate and up, for whole gradients only."""
    model, batch = build(architecture, torch.float64), padded(LENGTHS)
    widths = []
    if not condensed:  # as without the native op, or for long samples
        monkeypatch.setattr(InputGrams, "of", lambda *_: None)

    def watch(outers):
        widths.append(sum(one.g.shape[1] for one in outers))
        assert all(isinstance(one, GramOuter) == condensed for one in outers)
        return plain(outers)

    plain = products.squared_norms_of_one_input
    monkeypatch.setattr(products, "squared_norms_of_one_input", watch)
    monkeypatch.setattr(functional, "squared_norms_of_one_input", watch)
    apart = per_sample_grad_norms(model, loss_fn, batch, per_parameter=True)
    each = sorted(widths)
    widths.clear()
    whole = per_sample_grad_norms(model, loss_fn, batch)
    torch.testing.assert_close(whole, torch.stack(list(apart.values())).norm(dim=0))
    assert sum(widths) == sum(each)
    blocks = model.config.num_hidden_layers
    # gpt2 already projects queries, keys and values by one layer
    assert len(each) - len(widths) == (3 * blocks if architecture == "llama" else 0)


class Twice(nn.Module):
    """A model with a layer that is called twice, and one that is called once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.once = (nn.Linear(16, 16, dtype=torch.float64) for _ in "ab")

    def forward(self, x):
        x = torch.tanh(self.shared(x))
        return self.shared(x) + self.once(x)


def reduced(model, batch):
    return model(batch["x"]).square().sum((1, 2))


@native
def test_norms_of_a_layer_that_is_called_again():
    """Cross terms need the inputs: the forward runs again, and only the first time."""
    model, batch = Twice(), {"x": torch.randn(3, 5, 16, dtype=torch.float64)}
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    found = [per_sample_grad_norms(model, reduced, batch, per_parameter=True) for _ in range(2)]
    handle.remove()
    assert len(forwards) == 3
    for i in range(3):
        loss = reduced(model, {"x": batch["x"][i : i + 1]})[0]
        exact = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), exact, strict=True):
            for norms in found:
                torch.testing.assert_close(norms[name][i], g.norm(), rtol=1e-10, atol=0)


@native
def test_norms_alone_keep_inner_products_of_inputs():
    """Samples shorter than layers are wide keep inner products; longer ones keep their inputs."""
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 16))
    for length, kept in ((16, GramOuter), (17, Outer)):
        forms = []

        def sink(name, factors, _kept):
            forms.extend(type(factor) for factor in factors)  # noqa: B023

        plan = Plan.of(model)
        x = torch.randn(2, length, 16)
        axis = Segments.rectangular((2, length))
        with plan.frozen(), Recorder(plan, sink, axis, functional._NORMS) as recorder:
            torch.autograd.grad(model(x).sum(), recorder.roots)
        assert forms.count(kept) == 2 and len(forms) == 4
