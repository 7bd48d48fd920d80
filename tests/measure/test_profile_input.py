"""Odd models that are served all the same; models that are refused are in `bad_input`."""

from __future__ import annotations

import pytest
import torch
from models import build, samples

import geffect_fast as gf

GOOD = {
    "forget": samples([5, 9], 1),
    "retain": samples([7], 2),
    "objectives": ["ga"],
}


def test_train_mode_without_dropout_is_fine():
    model = build("llama").train()
    assert gf.profile(model, None, **GOOD).sizes["sample"] == 2
    assert model.training


class LeakyLlama(torch.nn.Module):
    """A Llama that uses its embedding's weight once more, outside the embedding's own forward."""

    def __init__(self):
        super().__init__()
        self.inner = build("llama")
        self.config = self.inner.config

    def forward(self, input_ids, position_ids=None, use_cache=None):
        answer = self.inner(input_ids=input_ids, position_ids=position_ids)
        table = self.inner.model.embed_tokens.weight
        answer.logits = answer.logits + table[input_ids] @ table.T
        return answer


@pytest.mark.parametrize("resolve", [("parameter", "sample"), ("parameter",)])
def test_a_use_outside_of_its_module_is_counted(resolve):
    result = gf.profile(LeakyLlama(), None, **GOOD, resolve=resolve)
    e = result.g_effect.sel(risk="unlearn", objective="ga")
    e = e.sum("sample") if "sample" in e.dims else e
    squares = result.parameter_risk_grad_norm.sel(risk="unlearn") ** 2
    assert float(abs(e + squares).max()) < 1e-5 * float(squares.max())
