"""The row ops that token_logprob is made of: values, order of threads, contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cuda_shim
import pytest
import torch
from logprob_cases import (
    BACKWARD,
    ROWS,
)
from op_providers import CUDA_SHIM, every_provider, serving
from op_samples import Maker
from torch import Tensor

from geffect_fast import ops
from geffect_fast.errors import InputError
from geffect_fast.ops import backend, schema
from geffect_fast.ops.reference import accumulation_dtype

LABELS = torch.tensor([0, 6, -100, 2])


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
