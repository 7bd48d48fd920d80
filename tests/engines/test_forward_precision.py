"""The forward engine in bf16 and fp16 is no worse than backwards, and nothing underflows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines.forward_cases import close, run
from measure.wrapped_cases import InFp32, lora
from models import build, fp64_throughout

from geffect_fast.measure import profiler as profiling

LOW = ["ga", "wga(alpha=1.5)", "npo(beta=0.5) + 2*kl", "ceu(skip=0)", "rmu(layer=1, c=3)"]


def in_fp64(name, model):
    exact = build(name, torch.float64)
    exact.load_state_dict(model.state_dict())
    return exact


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("gemma2", dtype) for dtype in (torch.bfloat16, torch.float16)),
        ("llama", torch.float16),
        ("gpt2", torch.bfloat16),
        ("mixtral", torch.bfloat16),
    ],
    ids=str,
)
def test_low_precision_within_twice_the_error_of_backwards(name, dtype):
    """The backwards are plain autograd's, whose sums are not rounded to 16 bits."""
    model, other = build(name, dtype), build(name, dtype, seed=1)
    settings = {"objectives": LOW, "resolve": ["sample"], "norms": False}
    ours = run(model, other, **settings).g_effect
    plain = run(model, other, engine="reverse", **settings).g_effect
    with fp64_throughout():
        model, other = in_fp64(name, model), in_fp64(name, other)
        exact = run(model, other, engine="reverse", **settings).g_effect

    def error(found):
        over = ["risk", "sample"]
        return np.abs(found - exact).max(over) / np.abs(exact).max(over)

    limit = 2 * error(plain) + torch.finfo(dtype).eps
    assert (error(ours) <= limit).all(), (error(ours), error(plain))


@pytest.mark.parametrize("part", ["all", "norms in fp32", "a head in fp32", "adapted in fp32"])
def test_tiny_gradients_do_not_underflow_in_fp16(part, monkeypatch):
    """Directions are 1e-10 of their usual size, mostly below the range of fp16."""
    model = build("gemma2" if part == "norms in fp32" else "llama", torch.float16)
    if part == "norms in fp32":
        for name, module in model.named_modules():
            if "norm" in name:
                module.float()
    elif part == "a head in fp32":
        model.lm_head = InFp32(model.lm_head)
    elif part == "adapted in fp32":
        model = lora()(torch.float32)
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.half()
    settings = {"objectives": ["ga", "npo"], "resolve": ["sample"]}
    usual = run(model, **settings).g_effect
    find = profiling.accumulate_gradients

    def tiny(*args, **kwargs):
        values, directions = find(*args, **kwargs)
        return values, {name: 1e-10 * v for name, v in directions.items()}

    monkeypatch.setattr(profiling, "accumulate_gradients", tiny)
    close(run(model, **settings).g_effect / 1e-10, usual, 5e-3)


class Still(torch.nn.Module):
    """A head with a parameter whose gradient is zero."""

    def __init__(self, head):
        super().__init__()
        self.head, self.still = head, torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

    def forward(self, x):
        return self.head(x) + 0 * self.still


def test_a_group_without_gradient_has_no_effect_in_fp16():
    """A gradient of zero, as of an expert that gets no token, is not scaled to a length."""
    settings = {"objectives": ["ga"], "resolve": ["group", "sample"]}
    model = build("gpt2", torch.float16)
    expected = run(model, **settings).g_effect
    model.lm_head = Still(model.lm_head)
    found = run(model, **settings).g_effect
    assert list(found.group.values) == [*expected.group.values, "lm_head"]
    np.testing.assert_array_equal(found[:, :, :-1], expected)
    assert not found[:, :, -1].values.any()
