from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_shim"))
# Last: what it holds must not come before modules of the same names.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from logprob_cases import MODULE, TILINGS
from op_providers import INSTALLED, serving, why_missing

from geffect_fast.ops.reference import accumulation_dtype


@pytest.fixture(params=INSTALLED)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for each provider of this installation."""
    if (reason := why_missing(request.param)) is not None:
        pytest.skip(reason)
    with serving(request.param):
        yield request.param


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
