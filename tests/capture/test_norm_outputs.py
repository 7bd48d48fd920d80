"""Norms are read off their outputs, and equal modules are tried once, only where this is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import geffect_fast as gf


class Scale(nn.Module):
    """An RMS norm without `eps`; `squared`, a module that only the generic rule fits."""

    def __init__(self, d: int, squared: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d).sign() * torch.rand(d).add(0.5))
        self.squared = squared

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight**2 if self.squared else self.weight
        return w * (x * x.square().mean(-1, keepdim=True).rsqrt())


class Chain(nn.Module):
    """A table, then norms of one class, with optional changes of an output in between."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.norms = nn.ModuleList([Scale(6), Scale(6, squared=True), Scale(6)])
        self.mix = nn.Linear(6, 6, bias=False)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm in self.norms:
            y = norm(x)
            if self.change:
                y.add_(0.5)
            x = x + self.mix(y)
        return x.square()


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).sum((1, 2))


@pytest.mark.parametrize("change", [False, True], ids=["kept", "changed in place"])
@pytest.mark.parametrize("smallest", [None, 0.0, 1e-30], ids=["any", "zero", "tiny"])
def test_norm_weights_exact(change: bool, smallest: float | None) -> None:
    torch.manual_seed(0)
    model = Chain(change).double().eval()
    if smallest is not None:
        with torch.no_grad():
            model.norms[0].weight[2] = smallest
    ids = torch.randint(0, 11, (4, 5))
    found = gf.functional.per_sample_grad_norms(model, _loss, ids, per_parameter=True)
    parameters = dict(model.named_parameters())
    for i in range(len(ids)):
        grads = torch.autograd.grad(_loss(model, ids[i : i + 1])[0], list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(found[name][i], grad.norm(), rtol=1e-10, atol=1e-10)
