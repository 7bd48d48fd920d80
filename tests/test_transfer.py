"""Values of tensors are read without a wait for each tensor."""

from __future__ import annotations

import pytest
import torch

from geffect_fast.transfer import are_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 37, 63])
def test_what_is_not_finite_is_found_wherever_it_is(dtype, bad, place):
    good = torch.randn(4, 16).to(dtype)
    broken = good.clone()
    broken.view(-1)[place] = bad
    tensors = [good, broken, good.T, broken.T, broken[:0], torch.tensor(bad, dtype=dtype)]
    assert are_finite(tensors) == [True, False, True, False, True, False]
    assert are_finite([]) == []
