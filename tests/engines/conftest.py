"""Fixtures that tests of the forward engine share."""

from __future__ import annotations

import pytest
import torch
from engines.forward_cases import FORGET, RETAIN, run
from models import build, fp64_throughout
from reference import risk_gradients


@pytest.fixture(scope="session")
def exact():
    """A model, another as its reference, their directions, and the forward engine's effects."""
    with fp64_throughout():
        model, other = build("llama_tied", torch.float64), build("llama_tied", torch.float64, 1)
        risks = risk_gradients(model, FORGET, RETAIN)
        return model, other, risks, run(model, other, token_budget=15)
