from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from geffect_fast import ops
from geffect_fast.ops import backend

sys.path.insert(0, str(Path(__file__).parent))

# The reference is always there; a native provider is tested where it was built.
PROVIDERS = ["reference"] + (["cpu"] if backend.NATIVE_MISSING is None else [])


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for each provider of this installation."""
    forced = request.param == "reference"
    with ops.force_reference() if forced else contextlib.nullcontext():
        yield request.param
