"""The rules of forward mode against the framework's own, and against differences of values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from geffect_fast.engines.dual import attention, layers
from geffect_fast.engines.dual import rule as dual_rule
from geffect_fast.engines.dual.modes import DualFunctions

quick = settings(deadline=None, max_examples=25)
sizes = st.integers(1, 5)
seeds = st.integers(0, 1000)
blocks = st.sampled_from([1, 7, 2**22])
"""Sizes of blocks, from one row at a time to all rows at once."""


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def along(function, primals, tangents):
    """Values, and derivatives in every direction at once, `(M, ...)`; None: no tangent."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def moved(*some):
        every = list(primals)
        for i, x in zip(moving, some, strict=True):
            every[i] = x
        return function(*every)

    start = tuple(primals[i] for i in moving)

    def derivative(*directions):
        return jvp(moved, start, directions)

    return vmap(derivative, out_dims=(None, 0))(*(tangents[i] for i in moving))


def agrees(function, primals, which, *, n_directions=3, block=2**22, seed=0):
    """Check that a function gives the same inside `DualFunctions`, for one and more directions."""
    tangents = [
        noise(n_directions, *x.shape, seed=seed + i) if moves else None
        for i, (x, moves) in enumerate(zip(primals, which, strict=True))
    ]
    with sdpa_kernel(SDPBackend.MATH):  # the only backend with a forward-mode rule
        value, expected = along(function, primals, tangents)
    with pytest.MonkeyPatch.context() as patch, DualFunctions():
        patch.setattr(dual_rule, "BLOCK", block)
        own, found = along(function, primals, tangents)
        first = tuple(t[0] for t in tangents if t is not None)
        moving = [i for i, moves in enumerate(which) if moves]

        def one(*some):
            every = dict(enumerate(primals)) | dict(zip(moving, some, strict=True))
            return function(*every.values())

        alone = jvp(one, tuple(primals[i] for i in moving), first)[1]
    for ours, theirs in ((own, value), (found, expected), (alone, expected[0])):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def some_of(n):
    """A choice of the arguments, of `n`, that have tangents: at least one."""
    return st.lists(st.booleans(), min_size=n, max_size=n).filter(any)


# ---- the rules ----


@quick
@given(st.lists(st.integers(0, 3), max_size=3), sizes, sizes, st.booleans(), some_of(3), seeds)
def test_linear(rows, d_in, d_out, biased, which, seed):
    """Inputs include a single vector and a matrix without rows."""
    primals = [noise(*rows, d_in, seed=seed), noise(d_out, d_in, seed=1), noise(d_out, seed=2)]
    if biased:
        agrees(F.linear, primals, which, seed=seed)
    elif any(which[:2]):
        agrees(F.linear, primals[:2], which[:2], seed=seed)


def test_linear_of_one_output():
    """The weight is a vector, which the framework accepts too."""
    agrees(F.linear, [noise(3, 4), noise(4)], [True, True])


@quick
@given(st.lists(sizes, max_size=2), sizes, sizes, st.data())
def test_embedding(shape, n_rows, d, data):
    ids = torch.randint(0, n_rows, shape, generator=torch.Generator().manual_seed(1))
    padding = data.draw(st.none() | st.integers(-n_rows, n_rows - 1))
    weight, direction = noise(n_rows, d), noise(3, n_rows, d, seed=1)
    with DualFunctions():
        value, found = along(lambda w: F.embedding(ids, w, padding), [weight], [direction])
    assert torch.equal(value, weight[ids])
    # Where the index is padding no gradient arrives in reverse mode.
    leaf = weight.clone().requires_grad_()
    expected = []
    for v in direction:
        y = F.embedding(ids, leaf, padding)
        onto = noise(*y.shape, seed=2)
        (grad,) = torch.autograd.grad(y, leaf, onto)
        expected.append(((grad * v).sum(), onto))
    for (inner, onto), moved in zip(expected, found, strict=True):
        torch.testing.assert_close((onto * moved).sum(), inner, rtol=1e-12, atol=1e-12)


@quick
@given(st.integers(0, 6), st.integers(1, 9), blocks, seeds)
def test_cross_entropy(n, vocab, block, seed):
    labels = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))
    agrees(
        lambda z: F.cross_entropy(z, labels, reduction="none"),
        [3 * noise(n, vocab, seed=seed)],
        [True],
        block=block,
        seed=seed,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "sum"},
        {"reduction": "none", "label_smoothing": 0.1},
        {"reduction": "none", "ignore_index": 3},
        {},
    ],
    ids=str,
)
def test_cross_entropy_as_others_call_it(options):
    """Labels that are ignored, sums, smoothing, and logits of an image."""
    labels = torch.tensor([0, -100, 3, 3])
    if options.get("ignore_index") == 3:
        labels = labels.abs().clamp(max=3)
    agrees(lambda z: F.cross_entropy(z, labels, **options), [noise(4, 5)], [True])
    agrees(lambda z: F.cross_entropy(z, labels.expand(2, 4), **options), [noise(2, 5, 4)], [True])


def test_cross_entropy_of_labels_that_are_certain():
    """Exponentials underflow and overflow at these logits."""
    logits = torch.tensor([[0.0, 800.0, -800.0], [0.0, -1e4, 1e4], [5.0, 5.0, 5.0]]).double()
    for labels in ([1, 2, 0], [0, 0, 2]):
        labels = torch.tensor(labels)
        agrees(lambda z, y=labels: F.cross_entropy(z, y, reduction="none"), [logits], [True])


@quick
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    st.tuples(sizes, sizes, sizes, sizes),
    st.sampled_from(["none", "causal", "bool", "float", "of a head", "of a row", "one for all"]),
    st.none() | st.floats(0.1, 2),
    some_of(3),
    blocks,
    seeds,
)
def test_attention(counts, lengths, masked, scale, which, block, seed):
    (batch, kv_heads, share), (n, n_keys, d, d_value) = counts, lengths
    heads = kv_heads * share
    query = noise(batch, heads, n, d, seed=seed)
    key = noise(batch, kv_heads, n_keys, d, seed=seed + 1)
    value = noise(batch, kv_heads, n_keys, d_value, seed=seed + 2)
    seen = noise(n, n_keys, seed=seed + 3) > 0
    seen[:, 0] = True  # every token attends to something
    mask = {
        "bool": seen,
        "float": noise(batch, 1, n, n_keys, seed=seed + 4),
        "of a head": noise(heads, n, n_keys, seed=seed + 5),
        "of a row": torch.where(seen, 0.0, -torch.inf).double()[:1],
        "one for all": noise(1, 1, 1, 1),
    }.get(masked)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=masked == "causal",
            scale=scale,
            enable_gqa=share > 1,
        )

    agrees(attention, [query, key, value], which, block=block, seed=seed)


@pytest.mark.parametrize("shape", [(), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("n", [33, 70, 300])
def test_causal_attention_of_many_tokens(shape, n):
    """Blocks of queries, the last of them short, each see a part of the keys."""
    qkv = [noise(*shape, n, 2, seed=i) for i in range(3)]
    agrees(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv, [True] * 3)


def test_attention_whose_heads_are_given_once():
    query, key, value = noise(2, 3, 5, 4), noise(3, 6, 4, seed=1), noise(2, 1, 6, 3, seed=2)
    agrees(F.scaled_dot_product_attention, [query, key, value], [True] * 3)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_of_a_token_that_sees_nothing(kind):
    """Padding on the left makes tokens that see nothing: their values are zero, and stay zero."""
    mask = torch.ones(3, 3, dtype=torch.bool).tril(-1)
    if kind == "float":
        mask = torch.zeros(3, 3).double().masked_fill(~mask, -torch.inf)
    qkv = [noise(1, 3, 4, seed=i) for i in range(3)]
    agrees(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), qkv, [True] * 3)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (1, 2, 1, 3), (3,)], ids=str)
@pytest.mark.parametrize("block", [1, 2**22])
def test_attention_whose_mask_is_learned(shape, block):
    """The mask is a bias by distance, for example, that moves with the parameters."""
    qkv = [noise(2, 2, n, 4, seed=i) for i, n in enumerate([5, 3, 3])]
    for which in ([True] * 4, [False] * 3 + [True]):
        agrees(F.scaled_dot_product_attention, [*qkv, noise(*shape, seed=4)], which, block=block)


def rms_norm(x, weight, offset, eps):
    return (offset + weight) * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


@quick
@given(
    st.lists(sizes, max_size=3),
    sizes,
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([1e-6, 0.3]),
    some_of(2),
    seeds,
)
def test_rms_norm(rows, d, offset, eps, which, seed):
    def norm(x, w):
        return rms_norm(x, w, offset, eps)

    rule = layers.RMSNorm(norm, offset, eps)
    primals = [noise(*rows, d, seed=seed), noise(d, seed=1)]
    same(rule, norm, primals, which, seed)


@quick
@given(
    st.lists(sizes, max_size=3),
    st.sampled_from([F.silu, F.gelu, torch.tanh]),
    some_of(2),
    seeds,
)
def test_gated(shape, activation, which, seed):
    primals = [noise(*shape, seed=seed), noise(*shape, seed=seed + 1)]
    same(layers.Gated(activation), lambda g, u: activation(g) * u, primals, which, seed)


def same(rule, function, primals, which, seed=0):
    """Call a module by its rule."""
    tangents = [
        noise(3, *x.shape, seed=seed + 7 + i) if moves else None
        for i, (x, moves) in enumerate(zip(primals, which, strict=True))
    ]
    value, expected = along(function, primals, tangents)
    own, found = along(rule, primals, tangents)
    torch.testing.assert_close(own, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


# ---- against differences of values, through the framework's other door to forward mode ----

PRIMALS = {
    "linear": (layers.Linear(), (noise(2, 3, 4), noise(5, 4), noise(5))),
    "embedding": (layers.Embedding(-1), (torch.tensor([[1, 0, 3]]), noise(4, 2))),
    "cross entropy": (layers.LabelNLL(3), (noise(3, 4), torch.tensor([1, 0, 3]))),
    "causal attention": (
        attention.Attention(True, None, True),
        (noise(1, 4, 3, 2), noise(1, 2, 3, 2), noise(1, 2, 3, 5), None),
    ),
    "rms norm": (
        layers.RMSNorm(lambda x, w: rms_norm(x, w, 1.0, 0.1), 1.0, 0.1),
        (noise(2, 3), noise(3)),
    ),
    "attention": (
        attention.Attention(False, 0.3, False),
        (noise(1, 3, 2), noise(1, 3, 2, seed=1), noise(1, 3, 4), noise(3, 3)),
    ),
}


@pytest.mark.parametrize("name", PRIMALS)
def test_differences(name):
    rule, primals = PRIMALS[name]
    leaves = [
        x.clone().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in primals
    ]
    assert gradcheck(rule, leaves, check_forward_ad=True, check_backward_ad=False)


# ---- the scope of the rules ----


@pytest.mark.parametrize(
    ("rule", "call"),
    [
        (layers.Linear, lambda: F.linear(noise(2, 3), noise(4, 3))),
        (layers.Embedding, lambda: F.embedding(torch.tensor([1]), noise(2, 3), 0)),
        (
            layers.LabelNLL,
            lambda: F.cross_entropy(noise(1, 3), torch.tensor([1]), reduction="none"),
        ),
        (attention.Attention, lambda: F.scaled_dot_product_attention(*[noise(1, 2, 3)] * 3)),
        (None, lambda: F.cross_entropy(noise(2, 3), torch.tensor([1, 0]))),
        (layers.Embedding, lambda: F.embedding(torch.tensor([1]), noise(2, 3))),
        (layers.LayerNorm, lambda: F.layer_norm(noise(2, 3), (3,))),
        (layers.Linear, lambda: torch.addmm(noise(3), noise(2, 4), noise(4, 3))),
        (None, lambda: F.layer_norm(noise(2, 3), (2, 3))),
        (None, lambda: torch.addmm(noise(2, 3), noise(2, 4), noise(4, 3))),
        (None, lambda: F.embedding(torch.tensor([1]), noise(2, 3), max_norm=1.0)),
    ],
)  # fmt: skip
def test_functions_are_served_by_their_rules(rule, call, monkeypatch):
    served = []
    apply = dual_rule.Rule.__call__

    def watch(self, *primals):
        served.append(type(self))
        return apply(self, *primals)

    monkeypatch.setattr(dual_rule.Rule, "__call__", watch)
    with DualFunctions():
        call()
    assert served == ([] if rule is None else [rule])


def test_nothing_is_changed_outside():
    x, w = noise(2, 3), noise(4, 3)
    with DualFunctions():
        inside = F.linear(x, w)
    assert torch.equal(inside, F.linear(x, w))
    assert F.linear(x, w.requires_grad_()).grad_fn.name() != "_DualBackward"


def test_a_model_that_maps_a_function_over_an_axis_itself():
    """Experts side by side: the model's own map is inside the map over directions."""
    x, weight, bias = noise(3, 2, 4), noise(3, 5, 4), noise(3, 5)
    agrees(vmap(F.linear), [x, weight, bias], [True] * 3)
    agrees(lambda x, w: vmap(F.linear, (1, None))(x, w), [x, noise(5, 4)], [True, True])
    agrees(
        lambda z: vmap(lambda one: F.cross_entropy(one, torch.tensor([1, 0]), reduction="none"))(z),
        [x],
        [True],
    )


@pytest.mark.parametrize("block", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_what_is_computed_without_gradients_is_constant(block):
    """Results under no_grad are constant as in reverse mode; what follows them moves."""

    def function(x):
        with block():
            weight = x.sin()
            with torch.enable_grad():
                own = x.cos()
        return weight * x + own

    x, v = noise(4), noise(4, seed=1)
    with DualFunctions():
        found = jvp(function, (x,), (v,))[1]
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(found, slope * v, rtol=1e-12, atol=0)


def test_an_error_without_gradients_leaves_forward_mode_on():
    def function(x):
        try:
            with torch.no_grad():
                raise KeyError
        except KeyError:
            return x.sin()

    x, v = noise(4), noise(4, seed=1)
    with DualFunctions():
        found = jvp(function, (x,), (v,))[1]
    torch.testing.assert_close(found, x.cos() * v)
    assert torch._C._is_fwd_grad_enabled()
