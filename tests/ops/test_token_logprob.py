"""token_logprob and its parts against log_softmax in fp64: values, derivatives, memory."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cuda_shim
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_providers import CUDA_SHIM, every_provider, serves, serving
from op_samples import DTYPES, Maker
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geffect_fast import ops
from geffect_fast.errors import InputError
from geffect_fast.ops import backend, schema
from geffect_fast.ops.reference import accumulation_dtype

# Not by `ops.token_logprob`, which is the function.
MODULE = importlib.import_module("geffect_fast.ops.token_logprob")
TilingOf = MODULE.Tiling
ROWS, BACKWARD = schema.PART_SCHEMAS


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What a user would write, in the inputs' precision, with autograd's derivatives."""
    logits = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    chosen = F.log_softmax(logits, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels == -100, 0, chosen)


class Case(NamedTuple):
    """One call: tensors in fp64 that are exact in every dtype, and the head's options."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, float | None]:
        return {"scale": self.scale, "softcap": self.softcap}

    @property
    def floats(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def like(self, tensors: list[Tensor]) -> Case:
        hidden, weight, *bias = tensors
        return self._replace(hidden=hidden, weight=weight, bias=bias[0] if bias else None)

    def run(self, function: Callable[..., Tensor] = ops.token_logprob) -> Tensor:
        return function(self.hidden, self.weight, self.labels, bias=self.bias, **self.options)

    def to(self, dtype: torch.dtype) -> Case:
        return self.like([t.to(dtype) for t in self.floats])

    def expected(self) -> Tensor:
        return self.to(torch.float64).run(plain)

    def rounding(self) -> float:
        """The size of the logits' terms, which fp32 errors are proportional to."""
        hidden, weight, *bias = [t.double().abs() for t in self.floats]
        terms = F.linear(hidden, weight, *bias)
        return abs(self.scale) * float(terms.max()) + 10 if terms.numel() else 1.0

    def with_gradients(
        self, weights: Tensor, function: Callable[..., Tensor] = ops.token_logprob
    ) -> list[Tensor]:
        """The result, and the derivatives of its sum weighted by `weights`."""
        case = self.like([t.detach().requires_grad_() for t in self.floats])
        out = case.run(function)
        return [out.detach(), *torch.autograd.grad(out, case.floats, weights.to(out.dtype))]


def case(n: int, d: int, vocabulary: int, *, bias: bool = False, seed: int = 0, **kw: Any) -> Case:
    make = Maker(torch.float16, seed)  # then exact in fp32 too; rounded to bf16 by `to`
    labels = torch.randint(vocabulary, (n,), generator=make.generator)
    labels[2::5] = -100
    tensors = [make(n, d).bfloat16().double(), make(vocabulary, d).bfloat16().double()]
    return Case(*tensors, labels, make(vocabulary).bfloat16().double() if bias else None, **kw)


CASES = {
    "plain": case(23, 9, 61),
    "bias": case(23, 9, 61, bias=True),
    "scale": case(23, 9, 61, scale=0.3),
    "softcap": case(23, 9, 61, softcap=3.0),
    "everything": case(23, 9, 61, bias=True, scale=0.7, softcap=5.0),
    "wide": case(5, 70, 203),
    "vectors": case(5, 8, 1100, scale=2.0),
    "long": case(90, 3, 20),
    "one token": case(1, 4, 9),
    "one word": case(4, 4, 1),
    "no token": case(0, 4, 9),
    "no feature": case(6, 0, 9, bias=True),
    "all ignored": case(6, 3, 9)._replace(labels=torch.full((6,), -100)),
}
# Several tiles of both axes, with ragged ends; the default is one tile for most cases.
TILINGS = {"default": None, "small": TilingOf(4 * 6 * 20, 6), "narrow": TilingOf(4 * 64, 64)}


@pytest.fixture(params=TILINGS)
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if (chosen := TILINGS[request.param]) is not None:
        monkeypatch.setitem(MODULE.TILING, "cpu", chosen)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE.TILING, "cpu", TILINGS["small"])


@pytest.fixture
def as_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply low precision as on CUDA: operands are not converted, products are not rounded."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == y.dtype
        wide = accumulation_dtype(x.dtype)
        return x.to(wide) @ y.to(wide)

    monkeypatch.setattr(MODULE, "_multiplied_in", lambda tensor: tensor.dtype)
    monkeypatch.setattr(MODULE, "_product", product)


def skip_unless_served(provider: str, dtype: torch.dtype) -> None:
    if not serves(provider, ROWS, dtype):
        pytest.skip(f"no kernel of {provider} in {dtype}")


# ---- values ----


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


# ---- derivatives: modes, orders, transforms ----


def test_function_transforms() -> None:
    given_case = CASES["everything"]
    primals = tuple(given_case.floats)
    tangents = tuple(torch.ones_like(t) for t in primals)

    def ours(*tensors: Tensor) -> Tensor:
        return given_case.like(list(tensors)).run()

    def theirs(*tensors: Tensor) -> Tensor:
        return given_case.like(list(tensors)).run(plain)

    torch.testing.assert_close(
        torch.func.jvp(ours, primals, tangents), torch.func.jvp(theirs, primals, tangents)
    )
    argnums = (0, 1, 2)
    for one, other in zip(
        torch.func.grad(lambda *t: ours(*t).sum(), argnums)(*primals),
        torch.func.grad(lambda *t: theirs(*t).sum(), argnums)(*primals),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_forward_mode_along_parameters_that_require_grad() -> None:
    hidden, weight, labels, *_ = CASES["plain"]
    weight = weight.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        found, expected = (
            forward_ad.unpack_dual(function(hidden, dual, labels)).tangent
            for function in (ops.token_logprob, plain)
        )
    torch.testing.assert_close(found, expected)


def _second_backward(x: Tensor, f: Callable) -> None:
    (first,) = torch.autograd.grad(f(x.requires_grad_()).sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


def _backward_of_tangent(x: Tensor, f: Callable) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        torch.autograd.grad(forward_ad.unpack_dual(f(dual)).tangent.sum(), x)


@pytest.mark.parametrize(
    "second",
    [
        _second_backward,
        _backward_of_tangent,
        lambda x, f: torch.func.grad(lambda y: torch.func.grad(lambda z: f(z).sum())(y).sum())(x),
        lambda x, f: torch.func.jvp(torch.func.grad(lambda y: f(y).sum()), (x,), (x,)),
        lambda x, f: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (x,))[1], (x,), (x,)),
    ],
)
def test_second_derivatives_are_refused(second: Callable) -> None:
    hidden, weight, labels, *_ = CASES["plain"]
    with pytest.raises(InputError, match=r"^token_logprob: .*first derivatives only"):
        second(hidden.clone(), lambda x: ops.token_logprob(x, weight, labels))


def test_compiled_call_equals_eager() -> None:
    given_case = CASES["everything"]
    weights = torch.linspace(0, 1, len(given_case.labels), dtype=torch.float64)
    compiled = torch.compile(ops.token_logprob, backend="aot_eager")
    for one, other in zip(
        given_case.with_gradients(weights, compiled),
        given_case.with_gradients(weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# ---- memory ----


class Largest(TorchDispatchMode):
    """Remembers the largest memory that any operation allocates for a result."""

    def __init__(self, ignored: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.ignored, self.n_bytes, self.known = ignored, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_dense(t)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in filter(is_dense, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs and not self.ignored(tensor):
                self.n_bytes = max(self.n_bytes, storage.nbytes())
        return out


def is_dense(value: object) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_larger_than_a_tile_is_made(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all logits, nor a row of them, nor the whole weight in fp32."""
    budget = 64 * 1024
    monkeypatch.setitem(MODULE.TILING, "cpu", TilingOf(budget, 32))
    given_case = case(300, 64, 20000).to(dtype)
    hidden, weight = given_case.hidden.requires_grad_(), given_case.weight.requires_grad_()

    def is_result(tensor: Tensor) -> bool:
        return tensor.shape == hidden.shape or (
            tensor.shape == weight.shape and tensor.dtype == weight.dtype
        )

    with ops.force_reference(), Largest(is_result) as forward:
        out = given_case.run()
    assert budget / 4 <= forward.n_bytes <= budget
    with ops.force_reference(), Largest(is_result) as backward:
        out.backward(torch.ones_like(out))
    # The derivative of a block of the weight is summed in fp32, too.
    assert backward.n_bytes <= (4 if dtype == torch.float32 else 8) * budget
    with ops.force_reference(), Largest(is_result) as tangent:
        torch.func.jvp(
            lambda h: ops.token_logprob(h, weight.detach(), given_case.labels),
            (hidden.detach(),),
            (hidden.detach(),),
        )
    assert tangent.n_bytes <= budget


# ---- the parts ----


class Part(NamedTuple):
    """Arguments of both parts for one tile, and what they should give."""

    product: Tensor
    labels: Tensor
    first: int
    scale: float
    softcap: float
    normaliser: Tensor
    grad: Tensor

    @property
    def tile(self) -> tuple[Any, ...]:
        return tuple(self[:5])

    def logits(self) -> Tensor:
        x = self.product.double() * self.scale
        return self.softcap * torch.tanh(x / self.softcap) if self.softcap else x

    def expected_rows(self) -> Tensor:
        rows = []
        for x, label in zip(self.logits(), self.labels.tolist(), strict=True):
            column = label - self.first
            inside = 0 <= column < len(x)
            rows.append([x.max(), (x - x.max()).exp().sum(), x[column] if inside else 0])
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T

    def expected_backward(self) -> Tensor:
        x = self.logits()
        out = -(x - self.normaliser.double().sum(0)[:, None]).exp()
        for row, label in zip(out, self.labels.tolist(), strict=True):
            if 0 <= label - self.first < len(row):
                row[label - self.first] += 1
        slope = 1 - (x / self.softcap).square() if self.softcap else 1
        return out * slope * self.scale * self.grad.double()[:, None]


def part(product: Tensor, *, first: int = 0, scale: float = 1.0, softcap: float = 0.0) -> Part:
    make = Maker(product.dtype, seed=3)
    n_tokens, n_columns = product.shape
    labels = torch.randint(
        first - 3, first + n_columns + 3, (2 * n_tokens,), generator=make.generator
    )[::2]
    labels[1::4] = -100
    return Part(
        product, labels, first, scale, softcap,
        torch.stack([product.amax(1), make(n_tokens).abs() + 3], 1).T, make(2 * n_tokens)[1::2],
    )  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, Part]:
    make = Maker(torch.float32)
    return {
        "vectors": part(make(6, 4096) * 3),
        "several rounds": part(make(3, 9000), first=123),
        "off 16 bytes": part(make(5, 4103)[:, 3:], softcap=2.0),
        "ragged": part(make(9, 33), first=1000, scale=-0.5),
        "ragged rounds": part(make(2, 2051), softcap=1.0, scale=0.3),
        "softcap": part(make(6, 1024) * 5, softcap=4.0, scale=0.5),
        "transposed": part(make(70, 40).T, first=7),
        "expanded": part(make(1, 64).expand(5, 64)),
        "sliced": part(make(8, 300)[::2, ::3]),
        "many tokens": part(make(70, 1028)),
        "aligned, ragged": part(make(4, 1032)[:, :1029]),
        "no tokens": part(make(0, 8)),
        "one number": part(make(1, 1)),
    }


PART_NAMES = [
    "vectors", "several rounds", "off 16 bytes", "ragged", "ragged rounds", "softcap", "transposed",
    "expanded", "sliced", "many tokens", "aligned, ragged", "no tokens", "one number",
]  # fmt: skip


def call_part(op: str, given_part: Part, *more: Any) -> Tensor:
    return backend.call(op, given_part.product.device, *given_part.tile, *more)


@every_provider
@pytest.mark.parametrize("name", PART_NAMES)
def test_rows(name: str, parts: dict[str, Part], provider: str) -> None:
    found, expected = call_part(ROWS, parts[name]), parts[name].expected_rows()
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=5e-6)
    assert torch.equal(found, call_part(ROWS, parts[name]))


@every_provider
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PART_NAMES)
def test_rows_backward(
    name: str, dtype: torch.dtype, parts: dict[str, Part], provider: str
) -> None:
    arguments = (parts[name].normaliser, parts[name].grad, dtype)
    found, expected = call_part(BACKWARD, parts[name], *arguments), parts[name].expected_backward()
    assert found.dtype == dtype
    assert found.is_contiguous()
    rtol = 2 * torch.finfo(dtype).eps + 5e-6
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-7)
    assert torch.equal(found, call_part(BACKWARD, parts[name], *arguments))


@pytest.mark.parametrize("name", PART_NAMES)
def test_order_of_threads_does_not_matter(name: str, parts: dict[str, Part]) -> None:
    if (reason := cuda_shim.why_missing()) is not None:
        pytest.skip(reason)
    arguments = (parts[name].normaliser, parts[name].grad, torch.float32)
    with serving(CUDA_SHIM):
        rows, backward = (
            call_part(ROWS, parts[name]),
            call_part(BACKWARD, parts[name], *arguments),
        )
        for order in (cuda_shim.REVERSE, cuda_shim.SHUFFLED):
            with cuda_shim.thread_order(order), cuda_shim.device(multiprocessors=1):
                assert torch.equal(call_part(ROWS, parts[name]), rows)
                assert torch.equal(call_part(BACKWARD, parts[name], *arguments), backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, parts: dict[str, Part]) -> None:
    given_part = parts["ragged"]._replace(product=parts["ragged"].product.to(dtype))
    wide = accumulation_dtype(dtype)
    more = (given_part.normaliser.to(wide), given_part.grad.to(wide), dtype)
    namespace = torch.ops.geffect_fast
    torch.library.opcheck(getattr(namespace, ROWS).default, given_part.tile)
    torch.library.opcheck(getattr(namespace, BACKWARD).default, (*given_part.tile, *more))


@pytest.mark.parametrize("op", [ROWS, BACKWARD])
def test_parts_refuse_autograd_and_their_references_have_derivatives(
    op: str, parts: dict[str, Part]
) -> None:
    tile = parts["softcap"]._replace(
        product=parts["softcap"].product[:3, :9].double(), labels=parts["softcap"].labels[:3]
    )
    more = ()
    if op == BACKWARD:
        more = (tile.normaliser[:, :3].double(), tile.grad[:3].double(), torch.float64)

    def run(function: Callable[..., Tensor], product: Tensor) -> Tensor:
        return function(product, *tile.tile[1:], *more)

    product = tile.product.clone().requires_grad_()
    registered = getattr(torch.ops.geffect_fast, op)
    with pytest.raises(InputError, match=f"^{op}: .*requires grad.*no_grad"):
        run(registered, product)
    with pytest.raises(InputError, match=f"^{op}: .*forward-mode"):
        torch.func.jvp(lambda x: run(registered, x), (tile.product,), (tile.product,))
    torch.autograd.gradcheck(
        lambda x: run(schema.REFERENCES[op], x), (product,), check_forward_ad=True
    )


def test_providers_name_the_function() -> None:
    assert [row for row in ops.providers() if row.op == "token_logprob"]
    assert not {row.op for row in ops.providers()} & set(schema.PART_SCHEMAS)


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


@pytest.mark.parametrize(
    ("op", "position", "wrong"),
    [
        (ROWS, "product", torch.zeros(5)),
        (ROWS, "product", torch.zeros(4, 7, dtype=torch.float64)),
        (ROWS, "labels", LABELS[:3]),
        (ROWS, "labels", LABELS.int()),
        (BACKWARD, "normaliser", torch.zeros(3, 4)),
        (BACKWARD, "normaliser", torch.zeros(2, 4).half()),
        (BACKWARD, "grad", torch.zeros(3)),
        (BACKWARD, "grad", torch.zeros(4).double()),
    ],
)
def test_cuda_kernels_check_unchecked_calls(op: str, position: str, wrong: Tensor) -> None:
    if (reason := cuda_shim.why_missing()) is not None:
        pytest.skip(reason)
    cuda_shim.load_kernels()
    arguments = {"product": torch.zeros(4, 7), "labels": LABELS, "first": 0, "scale": 1.0,
                 "softcap": 0.0}  # fmt: skip
    if op == BACKWARD:
        arguments |= {"normaliser": torch.zeros(2, 4), "grad": torch.zeros(4)}
        arguments["dtype"] = torch.float32
    cuda_shim.call(f"{cuda_shim.NAMESPACE}::{op}", *arguments.values())
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=f"token_logprob: `{position}`"):
        cuda_shim.call(f"{cuda_shim.NAMESPACE}::{op}", *arguments.values())
