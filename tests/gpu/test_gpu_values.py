"""Every op on the GPU against its formula in fp64: the table of all op tests, and larger shapes."""

from __future__ import annotations

import pytest
import torch
from gpu_samples import LARGE, expected_and_scale, large_sample
from on_gpu import (
    DEVICE,
    GPU_DTYPES,
    IS_GPU,
    LOW_PRECISION,
    gpu_only,
    name_of,
    on_device,
    poison_free_memory,
)
from op_samples import DTYPES, Sample, sample_inputs
from test_op_values import (
    assert_close_to_formula,
    in_precision,
    low_precision_samples,
    matmul_depth,
    result_dtype,
)

TABLE = [
    pytest.param(dtype, index, id=f"{sample.op}-{sample.name}-{name_of(dtype)}")
    for dtype in DTYPES
    for index, sample in enumerate(sample_inputs(dtype))
]


FORMS = [
    (name, form)
    for name, (op, _) in LARGE.items()
    for form in {
        "segment_bilinear": ("fused", "sm90", "cublas", "gradient"),
        "ghost_norm": ("gram", "gradient", "clusters"),
    }.get(op, ())
]


@pytest.mark.parametrize(("dtype", "index"), TABLE)
def test_table_equals_formula_and_itself(dtype: torch.dtype, index: int) -> None:
    """The reference serves float64."""
    sample = sample_inputs(dtype)[index]
    there = on_device(sample)
    poison_free_memory()
    found = there.run()
    if not (sample.op == "multi_tensor_gram" and not sample.args[0][0]):
        assert found.dtype == result_dtype(dtype)
        assert found.device.type == DEVICE.type
    assert found.is_contiguous()
    tensor_cores = IS_GPU and dtype in LOW_PRECISION
    assert_close_to_formula(sample, found.cpu(), tensor_cores=tensor_cores)
    poison_free_memory()
    assert torch.equal(there.run(), found)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
@pytest.mark.parametrize("index", range(len(low_precision_samples(torch.bfloat16))))
def test_low_precision_rule(dtype: torch.dtype, index: int) -> None:
    """At most twice the error of plain torch in the same precision, plus the result's rounding."""
    sample = low_precision_samples(dtype)[index]
    expected = sample.expected()
    plain = in_precision(on_device(sample)).double().cpu()
    error = (on_device(sample).run().double().cpu() - expected).abs().max()
    rounding = (expected.to(torch.float32).double() - expected).abs().max()
    assert error <= 2 * (plain - expected).abs().max() + rounding


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
@pytest.mark.parametrize("name", LARGE)
def test_large_equals_formula_and_itself(name: str, dtype: torch.dtype) -> None:
    assert_large_is_right(large_sample(name, dtype))


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_equals_formula(
    name: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form is forced, whichever form the sizes and the device would choose."""
    sample = large_sample(name, dtype)
    bilinear = sample.op == "segment_bilinear"
    monkeypatch.setenv(f"GEFFECT_FAST_{'BILINEAR' if bilinear else 'GHOST'}_FORM", form)
    assert_large_is_right(sample)


def assert_large_is_right(sample: Sample) -> None:
    poison_free_memory()
    found = sample.run()
    poison_free_memory()
    assert torch.equal(sample.run(), found)
    expected, scale = expected_and_scale(sample)
    assert found.shape == expected.shape
    error = (found.double() - expected).abs()
    # Tensor cores drop low bits when they add 16 products to a sum, as in any GEMM.
    allowed = torch.finfo(torch.float32).eps * (300 + matmul_depth(sample) / 16) * scale
    worst = (error - allowed).argmax()
    assert bool((error <= allowed).all()), (
        f"error {error.flatten()[worst]} of {expected.flatten()[worst]}"
    )


@pytest.mark.parametrize("index", range(len(sample_inputs(torch.float64))))
def test_formulas_of_large_samples_are_those_of_the_table(index: int) -> None:
    sample = sample_inputs(torch.float64)[index]
    found, _ = expected_and_scale(on_device(sample))
    torch.testing.assert_close(found.cpu(), sample.expected(), rtol=1e-9, atol=1e-9)


@gpu_only
def test_free_memory_is_poisoned() -> None:
    kept = torch.zeros(1000, device=DEVICE)
    for n in (1, 1000, 10**5, 10**7):
        poison_free_memory()
        assert bool(torch.empty(n, device=DEVICE).isnan().all())
    assert IS_GPU and not kept.any()
