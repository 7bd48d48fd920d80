"""Small models to capture, and their gradient norms by plain autograd."""

from __future__ import annotations

import torch
from layer_cases import CASES

from geffect_fast.capture.products import squared_norms


def model_of(name="linear"):
    torch.manual_seed(0)
    return CASES[name].build().double().eval()


def batch(n=3, length=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, length, 4, generator=generator, dtype=torch.float64)


def hooks(model):
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]


def per_sample(records, name, shape):
    return squared_norms(records[name], shape)


def brute(model, x):
    """Squared gradient norms `(n,)` of every parameter, one sample at a time."""
    rows = []
    for own in x.split(1):
        grads = torch.autograd.grad(model(own).sin().sum(), list(model.parameters()))
        rows.append(torch.stack([g.square().sum() for g in grads]))
    return dict(zip(dict(model.named_parameters()), torch.stack(rows).T, strict=True))


def assert_records(records, model, x):
    wanted = brute(model, x)
    assert records.keys() == wanted.keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(per_sample(records, name, p.shape), wanted[name])
