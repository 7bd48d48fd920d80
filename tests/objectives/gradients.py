"""Gradients of token terms, for tests of gradients."""

from __future__ import annotations

import torch

from geffect_fast.objectives import Outputs


def gradient(o, case, reference=None, by="logits"):
    """Gradient of the token terms with respect to the logits or hidden states.

    The logits are `(total_tokens, vocab)`, `hidden` states `(layers, total_tokens, d)`.
    """
    frozen = case.reference if reference is None else reference
    total = o.token_terms(case.outputs, case.batch, frozen).sum()
    return torch.autograd.grad(total, getattr(case, by), retain_graph=True)[0]


def assert_same(a, b):
    assert b.abs().max() > 1e-6
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def detached(outputs):
    hidden = tuple(h.detach() for h in outputs.hidden_states)
    return Outputs(outputs.token_logprob.detach(), outputs.logits.detach(), hidden)
