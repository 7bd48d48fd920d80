"""Where memory runs out, batches are redone in smaller ones, and the numbers stay the same."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
from models import build, fp64_throughout, samples
from transformers.models.llama.modeling_llama import LlamaMLP

import geffect_fast as gf
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.data.packing import LAYOUTS, split_batch
from geffect_fast.errors import GEffectWarning, OutOfMemoryError
from geffect_fast.measure.profiler import Profiler

FORGET, RETAIN = samples([9, 12, 4, 7, 3], 1, 2), samples([7, 11, 5], 2, 2)
FOR_PAIRS = [
    row | {"alternative": other}
    for row, other in zip(FORGET, samples([5, 4, 9, 3, 8], 3, 2), strict=True)
]
OBJECTIVES = ["ga", "npo(beta=0.2) + 0.5*kl", "wga(alpha=1)", "dpo(beta=0.3)", "rr(layer=1)"]


def fail():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class FailsBackward(torch.autograd.Function):
    """The identity, whose backward finds memory for gradients of only so many tokens."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (grad, None) if next(ctx.limit) else fail()


@pytest.fixture
def scarce(monkeypatch):
    """Have memory run out in the layers of Llamas, forward or backward, beyond `limit` tokens.

    Backwards fail only at every `every`-th layer, so that some of an objective, or some of the
    objectives, is done by then.
    """
    forward = LlamaMLP.forward

    @contextlib.contextmanager
    def within(where, limit, every=1):
        layers = [0]

        def outcome(n_tokens):
            while True:
                layers[0] += n_tokens > limit
                yield n_tokens <= limit or layers[0] % every != 0

        def limited(self, x):
            n_tokens = x.shape[:-1].numel()
            if where == "forward":
                return forward(self, x) if n_tokens <= limit else fail()
            y = forward(self, x)
            return FailsBackward.apply(y, outcome(n_tokens)) if y.requires_grad else y

        with monkeypatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", limited)
            yield

    return within


def numbers(model, other, **settings):
    given = {"forget": FOR_PAIRS, "retain": RETAIN, "objectives": OBJECTIVES}
    profiler = Profiler.of(model, None, reference_model=other, **(given | settings))
    conflicts = "position" in settings.get("resolve", ())
    return profiler.measure(
        weights=settings.get("engine") != "forward", conflicts=conflicts
    ).dataset


def same(found, expected):
    assert found.attrs["layout"] == expected.attrs["layout"]
    assert set(found.variables) == set(expected.variables)
    for name in expected.data_vars:
        if expected[name].dtype.kind == "f":
            x, y = (torch.from_numpy(d[name].values) for d in (found, expected))
            torch.testing.assert_close(
                x, y, rtol=1e-9, atol=1e-11 * float(y.abs().nan_to_num().max()), equal_nan=True
            )


SETTINGS = {
    "parameters": {"resolve": ("parameter", "sample"), "engine": "reverse"},
    "no norms": {"resolve": ("parameter", "sample"), "engine": "reverse", "norms": False},
    "positions": {"resolve": ("group", "sample", "position"), "engine": "reverse"},
    "sums": {"resolve": ("parameter",), "engine": "reverse"},
    "tokens": {"resolve": ("sample", "token"), "engine": "forward", "norms": False},
    "groups by forward mode": {"resolve": ("group", "sample"), "engine": "forward", "norms": False},
}


# The only backwards of the forward engine are those of the risks.
FAILURES = {
    "parameters": (("forward", 1), ("backward", 7), ("backward", 11)),
    "no norms": (("forward", 1), ("backward", 11)),
    "positions": (("backward", 1), ("backward", 11)),
    "sums": (("backward", 7), ("backward", 11)),
    "tokens": (("forward", 1), ("backward", 1)),
    "groups by forward mode": (("forward", 1),),
}
CASES = [(name, *failure) for name, failures in FAILURES.items() for failure in failures]


def two_models():
    return build("llama", torch.float64), build("llama", torch.float64, seed=1)


@functools.cache
def with_memory_enough(name):
    return numbers(*two_models(), **SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "every"), CASES)
def test_a_profile_is_that_of_memory_enough(name, where, every, scarce):
    with fp64_throughout():
        expected = with_memory_enough(name)
        with scarce(where, 20, every), pytest.warns(GEffectWarning, match="out of memory") as told:
            found = numbers(*two_models(), **SETTINGS[name])
    same(found, expected)
    assert 1 <= found.attrs["token_budget"] < sum(len(r["input_ids"]) for r in FORGET)
    assert found.attrs["token_budget"] < expected.attrs["token_budget"]
    assert all("\n" not in str(w.message) for w in told)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_in_batches_side_by_side(where, scarce):
    forget = samples([6, 6, 4, 6, 4], 1, 2)
    given = {"forget": forget, "objectives": ["ga", "npo"], "token_budget": 100}
    model, other = two_models()
    for each in (model, other):
        each.lm_head.register_forward_hook(lambda *_: None)  # so that the layout is tried
    with fp64_throughout(), pytest.MonkeyPatch().context() as patch:
        patch.setattr("geffect_fast.measure.prepare.choose_layout", lambda *_: "equal_length")
        expected = numbers(model, other, **given)
        with scarce(where, 12), pytest.warns(GEffectWarning):
            found = numbers(model, other, **given)
    assert found.attrs["layout"] == "equal_length"
    same(found, expected)


def test_the_notice_says_what_is_done(scarce):
    model = build("llama")
    given = {"forget": FORGET, "retain": RETAIN, "objectives": ["ga"], "token_budget": 1000}
    with scarce("forward", 20), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = gf.profile(model, None, **given)
        again = gf.profile(model, None, **(given | {"token_budget": 17}))
    assert [str(w.message) for w in told] == [
        "out of memory with a batch of 35 tokens; going on with a token budget of 17"
    ]
    assert result.attrs["token_budget"] == 17
    assert result.g_effect.equals(again.g_effect)


def test_later_measurements_begin_with_what_fits(scarce):
    profiler = Profiler.of(build("llama"), None, forget=FORGET, retain=RETAIN, objectives=["npo"])
    with scarce("forward", 20):
        with pytest.warns(GEffectWarning):
            first = profiler.measure().dataset
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = profiler.measure().dataset
    assert first.drop_attrs(deep=False).identical(second.drop_attrs(deep=False))


def halved(where):
    """Expect a warning that the budget was halved; samples of which no two fit are not packed."""
    return contextlib.nullcontext() if where == "forward" else pytest.warns(GEffectWarning)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_sample_that_does_not_fit_is_an_error(where, scarce):
    given = {"forget": FORGET, "retain": RETAIN, "objectives": ["ga"], "token_budget": 1000}
    with (
        scarce(where, 11),
        halved(where),
        pytest.raises(OutOfMemoryError, match="which is one sample a batch; shorten"),
    ):
        gf.profile(build("llama"), None, **given)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_check_is_that_of_memory_enough(where, scarce):
    with fp64_throughout():
        model = build("llama", torch.float64)
        with scarce(where, 13), halved(where):
            found = gf.check(model, None, data=FORGET, objectives=["npo(beta=0.2)"], samples=3,
                             reference_model=build("llama", torch.float64, seed=1))  # fmt: skip
    assert found.exact


def trained():
    model, other = two_models()
    with fp64_throughout():
        result = gf.unlearn(
            model, None, forget=FORGET, retain=RETAIN, objective="npo(beta=0.2) + gd",
            reference_model=other, steps=3, probe_every=3, batch_size=4, token_budget=1000,
            probe_rows=2,
        )  # fmt: skip
    return [p.detach() for p in model.parameters()], result


trained_with_memory_enough = functools.cache(trained)


@pytest.mark.parametrize(("where", "every"), [("forward", 1), ("backward", 1), ("backward", 4)])
def test_training_goes_the_same_way(where, every, scarce):
    expected, before = trained_with_memory_enough()
    with scarce(where, 24, every), pytest.warns(GEffectWarning):
        found, after = trained()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        torch.from_numpy(after.g_effect.values), torch.from_numpy(before.g_effect.values),
        rtol=1e-6, atol=1e-9 * float(abs(before.g_effect).max()),
    )  # fmt: skip


@pytest.mark.parametrize("roles", [("answer",), ("alternative",), ("answer", "alternative")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_of_a_batch_are_batches_of_its_samples(layout, roles):
    rows = [dict(row) for row in FOR_PAIRS]
    rows[1]["weights"] = [1.0] * sum(y != -100 for y in rows[1]["labels"])
    data = tokenize_rows(rows, None, name="forget")
    if layout == "equal_length":
        data = data.part([1, 1, 2, 2, 2])
    for batch in make_batches(data, roles, token_budget=10**6, layout=layout):
        for budget in (1, 12, 30):
            pieces = split_batch(batch, budget)
            alone = [
                piece
                for piece in make_batches(data, roles, token_budget=budget, layout=layout)
                if set(piece.rows) <= set(batch.rows)
            ]
            assert [p.rows for p in pieces] == [p.rows for p in alone]
            for piece, expected in zip(pieces, alone, strict=True):
                assert piece.total_tokens <= budget or piece.n_samples == 1
                for name, value in vars(expected).items():
                    own = getattr(piece, name)
                    if name == "weights" and value is None:
                        assert own is None or not own.any()
                    elif isinstance(value, torch.Tensor):
                        assert torch.equal(own, value), name
                    else:
                        assert own == value, name
