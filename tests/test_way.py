"""The number of files that a model passes from a public call to the first kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import way


@pytest.mark.parametrize(
    "name, on_stack, entered", [("profile", 7, 10), ("per_sample_grad_norms", 5, 7)]
)
def test_a_model_takes_a_short_way_down(name, on_stack, entered):
    model = way.tiny_model()
    found = way.way_of(model, lambda: way.CALLS[name](model))
    assert found.stack[-1] == "ops/backend.py", "no kernel was called"
    assert len(set(found.stack)) <= on_stack and way.climbs(found.stack) == 0, found.stack
    assert len(found.entered) <= entered and way.climbs(found.entered) <= 3, found.entered
