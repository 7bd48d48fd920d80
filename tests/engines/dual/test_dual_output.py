"""Tangents of a model's outputs, logits and log-probabilities, against reverse mode."""

from __future__ import annotations

import pytest
import torch
from engines.forward_cases import FORGET
from measure.wrapped_cases import ADAPTERS, lora
from models import build, fp64_throughout
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.dual import rule as dual_rule
from geffect_fast.engines.dual.layers import LabelNLL
from geffect_fast.engines.dual.model import DualModel
from geffect_fast.engines.known_models import choose_layout
from geffect_fast.engines.model_outputs import model_outputs

DATA = tokenize_rows(FORGET, None, name="forget")
N_DIRECTIONS = 3


class Last(nn.Module):
    """An output layer inside a module that changes its logits."""

    def __init__(self, head, last):
        super().__init__()
        self.head, self.last = head, last

    def forward(self, x):
        return self.last(self.head, x)


def ending(last):
    """A function that builds a model whose logits are `last(head, x)`."""

    def make(dtype):
        model = build("llama", dtype)
        model.lm_head = Last(model.lm_head, last)
        return model

    return make


def in_place(head, x):
    logits = head(x)
    logits *= 2
    return logits


def constant(head, x):
    """Logits that hold the layer's own result constant, but not the input below."""
    with torch.no_grad():
        weight = head(x)
    return weight * x.sum(-1, keepdim=True)


def hooked(register, hook):
    """A function that builds a model with a hook that changes its output layer's data."""

    def make(dtype):
        model = build("llama_tied", dtype)
        getattr(model.lm_head, register)(hook)
        return model

    return make


def plain(name):
    return lambda dtype: build(name, dtype)


CASES = {
    "tied": plain("llama_tied"),
    "soft-capped": plain("gemma2"),
    "scaled": plain("cohere"),
    "divided": plain("granite"),
    "with a bias": plain("phi"),
    "not packed": plain("mamba"),
    "in place": ending(in_place),
    "sum over tokens": ending(lambda head, x: head(x) - 0.1 * head(x).mean(1, keepdim=True)),
    "called twice": ending(lambda head, x: head(x) + head(x.flip(-1)).tanh()),
    "constant": ending(constant),
    "hook on logits": hooked("register_forward_hook", lambda _m, _x, z: 30 * (z / 30).tanh()),
    "hook on its input": hooked("register_forward_pre_hook", lambda _m, x: (x[0].tanh(),)),
    "lora on it": lora(targets=["lm_head", "q_proj"]),
    "saved with an adapter": ADAPTERS["lora_saved_modules"].build,
    "soft prompt": ADAPTERS["prompt_tuning"].build,
}


@pytest.mark.parametrize("name", CASES)
def test_tangents_are_those_of_reverse_mode(name, monkeypatch):
    """The outputs are every label's log-probability and, if asked for, every token's logits."""
    monkeypatch.setattr(dual_rule, "BLOCK", 500)  # several blocks of tokens
    served = []
    tangent = LabelNLL.tangent
    monkeypatch.setattr(LabelNLL, "tangent", lambda *a: (served.append(1), tangent(*a))[1])
    with fp64_throughout():
        plan = Plan.of(CASES[name](torch.float64))
        layout = choose_layout(plan, DATA)
        batch = make_batches(DATA, ("answer",), token_budget=60, layout=layout)[0]
        generator = torch.Generator().manual_seed(0)
        directions = {
            key: torch.randn(N_DIRECTIONS, *p.shape, generator=generator, dtype=p.dtype)
            for key, p in plan.parameters.items()
        }
        found = {}
        for needs in (frozenset(), frozenset({"logits"})):
            _, found[needs] = DualModel(plan).outputs(directions, batch, needs)
        with torch.enable_grad():
            outputs = model_outputs(plan.model, batch, {"logits"})
        onto = torch.randn(outputs.logits.shape, generator=generator, dtype=torch.float64)
        changes = [
            along(plan, directions, terms)
            for terms in (outputs.token_logprob[batch.target_index], (onto * outputs.logits).sum(1))
        ]
    assert len(served) == 2  # once for all directions
    for needs, tangents in found.items():
        nll = torch.stack([one.token_logprob[batch.target_index] for one in tangents])
        close(nll, changes[0])
        if needs:
            close(torch.stack([(onto * one.logits).sum(1) for one in tangents]), changes[1])
        else:
            assert all(one.logits is None for one in tangents)


def along(plan, directions, terms):
    """The derivative of each term along each direction, `(M, n)`, by one backward a term."""
    parameters = list(plan.parameters.values())
    moved = []
    for term in terms:
        grads = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        moved.append(
            sum(
                directions[key].flatten(1) @ grad.flatten()
                for key, grad in zip(plan.parameters, grads, strict=True)
            )
        )
    return torch.stack(moved, dim=1)


def close(found, expected):
    assert expected.any()
    limit = 1e-11 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)
