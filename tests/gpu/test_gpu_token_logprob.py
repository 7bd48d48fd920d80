"""token_logprob on the GPU against log_softmax in fp64: values and gradients, small and large."""

from __future__ import annotations

import pytest
import torch
from gpu_samples import DeviceMaker
from logprob_cases import CASES, Case, case, plain
from on_gpu import (
    DEVICE,
    GPU_DTYPES,
    IS_GPU,
    LOW_PRECISION,
    gpu_only,
    moved,
    name_of,
    poison_free_memory,
)
from op_samples import DTYPES

from geffect_fast import ops


def on_device(given_case: Case) -> Case:
    there = given_case.like([moved(tensor) for tensor in given_case.floats])
    return there._replace(labels=moved(given_case.labels))


def weights_of(given_case: Case) -> torch.Tensor:
    n_tokens = len(given_case.labels)
    return torch.linspace(-1, 2, n_tokens, dtype=torch.float64, device=given_case.hidden.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_equals_log_softmax(name: str, dtype: torch.dtype) -> None:
    host = CASES[name].to(dtype)
    there = on_device(host)
    poison_free_memory()
    found = there.run()
    allowed = 64 * torch.finfo(found.dtype).eps * host.rounding()
    assert bool(((found.double().cpu() - host.expected()).abs() <= allowed).all())
    poison_free_memory()
    assert torch.equal(there.run(), found)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd(name: str) -> None:
    host = CASES[name]
    expected = host.with_gradients(weights_of(host), plain)
    there = on_device(host.to(torch.float32))
    poison_free_memory()
    found = there.with_gradients(weights_of(there))
    poison_free_memory()
    again = there.with_gradients(weights_of(there))
    for one, other, exact in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one.double().cpu(), exact, rtol=1e-4, atol=1e-5)
        assert torch.equal(one, other)


def large_case(dtype: torch.dtype, n_tokens: int, d: int, vocabulary: int) -> Case:
    make = DeviceMaker(dtype)
    hidden, weight = make(n_tokens, d), make(vocabulary, d) / d**0.5
    labels = torch.arange(len(hidden), device=DEVICE) * 7919 % len(weight)
    labels[::7] = -100
    return Case(hidden, weight, labels)


LARGE = [(2048, 2048, 32000), (1000, 4096, 32001), (1024, 2048, 128256)]


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_equals_log_softmax(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    given_case = large_case(dtype, *sizes)
    poison_free_memory()
    found = given_case.run()
    expected = torch.cat(
        [
            given_case._replace(hidden=hidden, labels=labels).expected()
            for hidden, labels in zip(
                given_case.hidden.split(256), given_case.labels.split(256), strict=True
            )
        ]
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(given_case.run(), found)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_low_precision_rule(dtype: torch.dtype) -> None:
    """At most twice the error of plain torch in the same precision, plus the result's rounding."""
    base = case(40, 32, 300, bias=True)
    host = base.like([tensor / 4 for tensor in base.floats]).to(dtype)
    there = on_device(host)
    expected = host.to(torch.float64).with_gradients(weights_of(host), plain)
    naive = there.with_gradients(weights_of(there), plain)
    found = there.with_gradients(weights_of(there))
    for one, other, exact in zip(found, naive, expected, strict=True):
        rounding = (exact.to(one.dtype).double() - exact).abs().max()
        error = (one.double().cpu() - exact).abs().max()
        assert error <= 2 * (other.double().cpu() - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_gradients_of_a_large_head(dtype: torch.dtype) -> None:
    """Against fp32 gradients of plain torch: no further off than low precision must be."""
    given_case = large_case(dtype, 1500, 1024, 32000)
    weights = weights_of(given_case)
    expected = given_case.to(torch.float32).with_gradients(weights, plain)
    naive = given_case.with_gradients(weights, plain)
    found = given_case.with_gradients(weights)
    for one, other, exact in zip(found, naive, expected, strict=True):
        rounding = (exact.to(one.dtype).float() - exact).norm()
        assert (one.float() - exact).norm() <= 2 * (other.float() - exact).norm() + rounding


@gpu_only
def test_logits_are_never_held_whole() -> None:
    given_case = large_case(torch.bfloat16, 8192, 1024, 32000)
    given_case.run()  # workspaces of cuBLAS
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.token_logprob(given_case.hidden, given_case.weight, given_case.labels)
    extra = torch.cuda.max_memory_allocated() - before
    assert IS_GPU and extra < given_case.hidden.shape[0] * len(given_case.weight)
