"""The ops for norms that only capture calls, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from op_providers import INSTALLED
from op_samples import DTYPES, gradients, offsets, spans

from geffect_fast.ops import backend

native = pytest.mark.skipif("cpu" not in INSTALLED, reason="the native library is not built")
LENGTHS = {
    "ragged": [3, 0, 1, 37, 5],
    "longest": [128, 4],
    "long": [300, 70],
    "empty": [0, 0],
    "none": [],
}


@pytest.fixture(params=INSTALLED)
def provider(request):
    if request.param == "reference":
        with backend.force_reference():
            yield request.param
    else:
        yield request.param


def make(lengths, width, dtype, strided=False):
    generator = torch.Generator().manual_seed(width)
    shape = (width, sum(lengths)) if strided else (sum(lengths), width)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.T if strided else x


def call(op, *args):
    with torch.no_grad():
        return backend.call(op, torch.device("cpu"), *args)


def assert_near(found, expected, size, dtype):
    """Check sums in fp32 (fp64) or better: the error is a few roundings of the absolute sum."""
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == expected.shape and found.is_contiguous()
    eps = torch.finfo(found.dtype).eps
    assert bool(((found.double() - expected).abs() <= 64 * eps * size + 1e-30).all())


cases = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@cases
@dtypes
@pytest.mark.parametrize("strided", [False, True])
def test_segment_product(lengths, dtype, strided, provider):
    x, y = make(lengths, 1100, dtype, strided), make(lengths, 1100, dtype)
    cu = offsets(lengths)
    found = call("segment_product", x, -y, cu)
    terms = x.double() * -y.double()
    expected = torch.stack([terms[s].sum(0) for s in spans(cu)] or [terms.new_zeros(0, 1100)])
    size = torch.stack([terms[s].abs().sum(0) for s in spans(cu)] or [terms.new_zeros(0, 1100)])
    shape = (len(lengths), 1100)
    assert_near(found, expected.reshape(shape), size.reshape(shape), dtype)


@pytest.mark.parametrize("lengths", [v for k, v in LENGTHS.items() if k != "long"])
@dtypes
@pytest.mark.parametrize("strided", [False, True])
def test_norms_by_the_grams_of_inputs(lengths, dtype, strided, provider):
    a, cu = make(lengths, 600, dtype, strided), offsets(lengths, torch.int64)
    g = [make(lengths, width, dtype, strided) for width in (1, 33, 700)]
    grams = call("token_grams", a, cu)
    pieces = [a[s].double() for s in spans(cu)]
    flat = [torch.zeros(0, dtype=torch.float64)]
    expected = torch.cat(flat + [(x @ x.T).flatten() for x in pieces])
    size = torch.cat(flat + [(x.abs() @ x.abs().T).flatten() for x in pieces])
    assert_near(grams, expected, size, dtype)
    norms = call("ghost_norm_of_grams", grams, g, cu)
    by_layer = [gradients(a, one, cu) for one in g]
    expected = torch.zeros(len(lengths), dtype=torch.float64)
    for i in range(len(lengths)):
        expected[i] = sum(layer[i].square().sum() for layer in by_layer)
    torch.testing.assert_close(norms.double(), expected, rtol=2e-5, atol=0)
    if provider == "cpu" and lengths:
        one_input = call("ghost_norm_of_one_input", a, g, cu)
        torch.testing.assert_close(norms, one_input, rtol=1e-6, atol=0)


@native
def test_the_native_op_takes_samples_of_128_tokens_at_most():
    with pytest.raises(RuntimeError, match="a segment has more than 128 tokens"):
        call("token_grams", torch.randn(130, 4), offsets([1, 129]))
    with pytest.raises(RuntimeError, match="wrong shape"):
        call("ghost_norm_of_grams", torch.randn(5), [torch.randn(2, 3)], offsets([2]))
    with pytest.raises(RuntimeError, match="must have dtype"):
        call("ghost_norm_of_grams", torch.randn(4).double(), [torch.randn(2, 3)], offsets([2]))


@native
def test_one_thread_gives_the_same_bits():
    lengths, threads = LENGTHS["ragged"], torch.get_num_threads()
    a, g, cu = make(lengths, 600, torch.float32), make(lengths, 90, torch.float32), offsets(lengths)

    def run():
        grams = call("token_grams", a, cu)
        return grams, call("ghost_norm_of_grams", grams, [g], cu), call("segment_product", a, a, cu)

    several = run()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(x, y) for x, y in zip(run(), several, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", ["segment_product", "token_grams", "ghost_norm_of_grams"])
def test_opcheck(op):
    a, g, cu = torch.randn(5, 6), torch.randn(5, 6), offsets([2, 3])
    args = {
        "segment_product": (a, g, cu),
        "token_grams": (a, cu),
        "ghost_norm_of_grams": (torch.randn(13), [g, a], cu),
    }[op]
    overload = getattr(torch.ops.geffect_fast, op).default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload, args, test_utils=tests)
