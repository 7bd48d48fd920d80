from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_shim"))
# Last, so that modules of benchmarks/ do not hide modules of the same names.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from op_providers import INSTALLED, serving, why_missing


@pytest.fixture(params=INSTALLED)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for each provider of this installation."""
    if (reason := why_missing(request.param)) is not None:
        pytest.skip(reason)
    with serving(request.param):
        yield request.param
