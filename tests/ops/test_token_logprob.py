"""token_logprob against log_softmax in fp64: values, gradients, wrong calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logprob_cases import (
    CASES,
    MODULE,
    Case,
    TilingOf,
    case,
    plain,
    skip_unless_served,
)
from op_providers import every_provider
from op_samples import DTYPES, Maker
from torch import Tensor

from geffect_fast import ops
from geffect_fast.errors import InputError
from geffect_fast.ops import backend
from geffect_fast.ops.reference import accumulation_dtype


@every_provider
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_log_softmax(name: str, dtype: torch.dtype, tiling: None, provider: str) -> None:
    skip_unless_served(provider, dtype)
    given_case = CASES[name].to(dtype)
    found, expected = given_case.run(), given_case.expected()
    assert found.dtype == accumulation_dtype(dtype)
    assert found.shape == expected.shape
    allowed = 64 * torch.finfo(found.dtype).eps * given_case.rounding()
    assert bool(((found.double() - expected).abs() <= allowed).all())
    assert torch.equal(found, given_case.run())
    assert torch.equal(found == 0, (given_case.labels == -100) | (len(given_case.weight) == 1))


@every_provider
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd(name: str, tiling: None, provider: str) -> None:
    given_case = CASES[name]
    weights = torch.linspace(-1, 2, len(given_case.labels), dtype=torch.float64)
    expected = given_case.with_gradients(weights, plain)
    found = given_case.to(torch.float32).with_gradients(weights)
    again = given_case.to(torch.float32).with_gradients(weights)
    for one, other, exact in zip(found, again, expected, strict=True):
        assert one.shape == exact.shape
        torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5)
        assert torch.equal(one, other)
    ignored = given_case.labels == -100
    assert not found[1][ignored].any()


@every_provider
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("multiplied", ["converted", "as_cublas"])
def test_low_precision_rule(
    dtype: torch.dtype, multiplied: str, request: pytest.FixtureRequest, provider: str
) -> None:
    """At most twice the error of plain torch in the same precision, plus the result's rounding."""
    if multiplied == "as_cublas":
        request.getfixturevalue("as_cublas")
    request.getfixturevalue("small_tiles")
    base = case(40, 32, 300, bias=True)
    given_case = base.like([t / 4 for t in base.floats]).to(dtype)
    weights = torch.rand(40, dtype=torch.float64, generator=Maker(dtype).generator)
    expected = given_case.to(torch.float64).with_gradients(weights, plain)
    naive = given_case.with_gradients(weights, plain)
    for found, other, exact in zip(
        given_case.with_gradients(weights), naive, expected, strict=True
    ):
        rounding = (exact.to(found.dtype).double() - exact).abs().max()
        error = (found.double() - exact).abs().max()
        assert error <= 2 * (other.double() - exact).abs().max() + rounding


@every_provider
def test_small_weights_survive_float16(as_cublas: None, provider: str) -> None:
    """A mean over many tokens times a small probability is below the smallest float16."""
    given_case = case(8, 4, 3000).to(torch.float16)
    given_case = given_case.like([t / 8 for t in given_case.floats])
    weights = torch.full((8,), 1e-4, dtype=torch.float64)
    expected = given_case.to(torch.float64).with_gradients(weights, plain)[1]
    found = given_case.with_gradients(weights)[1].double()
    # What float16 itself does to results of this size.
    rounding = (expected.half().double() - expected).abs().max()
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max() + rounding


@pytest.mark.parametrize(
    "given_case",
    [case(7, 2, 13), case(7, 2, 13, bias=True, scale=0.7, softcap=3.0), case(4, 2, 1)],
    ids=["plain", "everything", "one word"],
)
def test_gradcheck(given_case: Case, small_tiles: None) -> None:
    inputs = tuple(t.requires_grad_() for t in given_case.floats)
    torch.autograd.gradcheck(
        lambda *t: given_case.like(list(t)).run(), inputs, check_forward_ad=True
    )


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_derivatives_asked_for(wanted: tuple[int, ...], small_tiles: None) -> None:
    given_case = CASES["everything"]
    tensors = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(given_case.floats)]
    chosen = [tensors[i] for i in wanted]
    found = torch.autograd.grad(given_case.like(tensors).run().sum(), chosen)
    expected = torch.autograd.grad(given_case.like(tensors).run(plain).sum(), chosen)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_several_backwards_over_one_forward(small_tiles: None) -> None:
    """Each with weights of its own, as one objective after the other has."""
    hidden, weight, labels, *_ = CASES["plain"]
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = ops.token_logprob(hidden, weight, labels)
    reference = plain(hidden, weight, labels)
    for seed in range(3):
        weights = torch.randn(len(labels), dtype=torch.float64, generator=Maker(0, seed).generator)
        found = torch.autograd.grad(out, (hidden, weight), weights, retain_graph=True)
        expected = torch.autograd.grad(reference, (hidden, weight), weights, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_backward_is_served_as_its_forward_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a thread of its own, as autograd has for a GPU."""
    hidden, weight, labels, *_ = CASES["plain"]
    hidden = hidden.clone().requires_grad_()
    forced = []
    call = backend.call

    def spy(*args: Any) -> Tensor:
        forced.append(backend.reference_is_forced())
        return call(*args)

    monkeypatch.setattr(backend, "call", spy)
    with ops.force_reference():
        out = ops.token_logprob(hidden, weight, labels).sum()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join()
    assert len(forced) >= 2
    assert all(forced)
    assert hidden.grad is not None


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values with other strides."""
    yield tensor
    yield tensor.T.contiguous().T
    wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1] + 1), torch.nan)
    wide[:, 1::2] = tensor
    yield wide[:, 1::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype, tiling: None) -> None:
    given_case = CASES["bias"].to(dtype)
    labels = torch.stack([given_case.labels] * 2, 1)[:, 0]
    allowed = 64 * torch.finfo(torch.float32).eps * given_case.rounding()
    bias = torch.stack([given_case.bias] * 2, 1)[:, 1]
    for hidden in layouts(given_case.hidden):
        for weight in layouts(given_case.weight):
            found = ops.token_logprob(hidden, weight, labels, bias=bias)
            assert (found.double() - given_case.expected()).abs().max() <= allowed
    expanded = given_case._replace(hidden=given_case.hidden[:1].expand(23, 9))
    assert (expanded.run().double() - expanded.expected()).abs().max() <= allowed
    weights = torch.ones(()).expand(23)
    for one, other in zip(
        expanded.with_gradients(weights), expanded.with_gradients(weights.clone()), strict=True
    ):
        assert torch.equal(one, other)


@every_provider
def test_infinite_logits(small_tiles: None, provider: str) -> None:
    """Words that a bias of -inf forbids, a whole tile of them; an infinite logit is NaN."""
    given_case = CASES["bias"].to(torch.float32)
    bias = given_case.bias.clone()
    bias[15:50] = -torch.inf
    labels = torch.where(given_case.labels.clamp(min=0) >= 15, 3, given_case.labels)
    labels[0] = 20
    given_case = given_case._replace(bias=bias, labels=labels)
    found, *gradients = given_case.with_gradients(torch.ones(23))
    assert found[0] == -torch.inf
    torch.testing.assert_close(found.double(), given_case.expected())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    for value in (torch.inf, torch.nan):
        bias[15] = value
        assert bool(given_case.run()[labels != -100].isnan().all())


@every_provider
def test_labels_outside_give_nan_where_they_are_not_read(small_tiles: None, provider: str) -> None:
    """As on CUDA, where checking them would wait for the device."""
    hidden, weight, labels, *_ = CASES["plain"].to(torch.float32)
    labels = labels.clone()
    labels[0], labels[4], labels[5], labels[7] = 61, -1, 2**62, -(2**62)
    wrong = (labels != -100) & ((labels < 0) | (labels > 60))
    hidden = hidden.clone().requires_grad_()
    out = MODULE.TokenLogprob.apply(hidden, weight, None, labels, 1.0, 0.0)[0]
    out.sum().backward()
    assert torch.equal(out.isnan(), wrong)
    assert torch.equal(hidden.grad.isnan().any(1), wrong)


def test_autocast_does_not_lower_the_precision() -> None:
    hidden, weight, labels, *_ = CASES["plain"].to(torch.float32)
    expected = ops.token_logprob(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.token_logprob(hidden, weight, labels), expected)


SIZE = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 30), d=SIZE, vocabulary=st.integers(1, 200), dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 4.0]), scale=st.sampled_from([1.0, -0.5]), bias=st.booleans(),
    n_bytes=st.integers(1, 5000), n_tokens=SIZE, seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_tiling(
    n, d, vocabulary, dtype, softcap, scale, bias, n_bytes, n_tokens, seed
) -> None:
    given_case = case(n, d, vocabulary, bias=bias, seed=seed, softcap=softcap, scale=scale)
    given_case = given_case.to(dtype)
    expected = given_case.expected()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODULE.TILING, "cpu", TilingOf(n_bytes, n_tokens))
        found = given_case.run()
    allowed = 64 * torch.finfo(found.dtype).eps * given_case.rounding()
    assert bool(((found.double() - expected).abs() <= allowed).all())


# ---- wrong calls ----

HIDDEN, WEIGHT, LABELS = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, -100, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": [1.0]}, "`hidden` must be a tensor, got list"),
        ({"hidden": HIDDEN[None]}, "`hidden` must have 2 dimensions"),
        ({"hidden": HIDDEN.int()}, "`hidden` has dtype torch.int32"),
        ({"hidden": HIDDEN.to_sparse()}, "`hidden` must be dense"),
        ({"hidden": HIDDEN.bfloat16()}, "`weight` has dtype torch.float32 but `hidden`"),
        ({"weight": WEIGHT[0]}, "`weight` must have 2 dimensions"),
        (
            {"weight": WEIGHT[:, :2]},
            r"`weight` has 2 along dimension 1 but `hidden` \(d_in\) has 3",
        ),
        ({"weight": WEIGHT.double()}, "`weight` has dtype torch.float64"),
        ({"weight": WEIGHT.to("meta")}, "`weight` is on meta but `hidden` is on cpu"),
        ({"weight": WEIGHT[:0]}, "`weight` has no rows"),
        ({"bias": torch.zeros(6)}, r"`bias` has 6 .* `weight` \(vocabulary\) has 7"),
        ({"bias": torch.zeros(1, 7)}, "`bias` must have 1 dimensions"),
        ({"bias": torch.zeros(7).half()}, "`bias` has dtype torch.float16"),
        ({"labels": [0, 1, 2, 3]}, "`labels` must be an int64 tensor, got list"),
        ({"labels": LABELS.int()}, "`labels` must be an int64 tensor, got torch.int32"),
        (
            {"labels": LABELS[:3]},
            r"`labels` must have shape \(total_tokens,\) = \(4,\), got \(3,\)",
        ),
        ({"labels": LABELS[None]}, "`labels` must have shape"),
        ({"labels": LABELS.to("meta")}, "`labels` is on meta but `hidden` is on cpu"),
        ({"labels": LABELS + 1}, r"`labels` must lie in 0..6 or be -100 \(ignored\), got 7"),
        ({"labels": LABELS - 1}, "`labels` must lie in 0..6 .* got -1"),
        ({"scale": float("nan")}, "`scale` must be finite, got nan"),
        ({"softcap": 0.0}, "`softcap` must be positive and finite, got 0.0"),
        ({"softcap": -3.0}, "`softcap` must be positive"),
        ({"softcap": float("inf")}, "`softcap` must be positive and finite, got inf"),
    ],
)
def test_wrong_call_names_the_argument(arguments: dict[str, Any], message: str) -> None:
    call = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | arguments
    with pytest.raises(InputError, match=f"^token_logprob: {message}") as caught:
        ops.token_logprob(**call)
    assert "\n" not in str(caught.value)
