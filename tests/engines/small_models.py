"""Models that cannot be packed, or whose tokens cannot be told apart by sample, and their parts."""

from __future__ import annotations

import torch
from architectures import ARCHITECTURES, VOCAB
from torch import nn


class WithoutPositions(nn.Module):
    """GPT-2 that counts positions itself, once for all rows."""

    def __init__(self):
        super().__init__()
        self.inner = ARCHITECTURES["gpt2"]()

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits


class IgnoresPositions(nn.Module):
    """A model that accepts `position_ids` and ignores them: packing would run, and be wrong."""

    def __init__(self):
        super().__init__()
        self.inner = ARCHITECTURES["gpt2"]()

    def forward(self, input_ids, position_ids=None):
        return self.inner(input_ids=input_ids).logits


class Experts(nn.Module):
    """Several linear experts, one of which serves each token by its id."""

    def __init__(self, d, n_experts=3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(n_experts))

    def forward(self, hidden, route):
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            picked = route == e
            if picked.any():
                out[picked] = torch.tanh(expert(hidden[picked]))
        return out


class Routed(nn.Module):
    """A model of an embedding, a causal mean, routed experts and a head."""

    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, d)
        self.mix = nn.Linear(d, d)
        self.experts = Experts(d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, VOCAB)

    def forward(self, input_ids, position_ids=None):
        h = self.embed(input_ids)
        steps = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
        h = h + self.mix(h.cumsum(1) / steps)
        h = h + self.experts(h, input_ids % 3)
        return Answer(self.head(self.norm(h)))


class Capped(nn.Module):
    """Three experts that serve the first two tokens sent to them: samples displace each other."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, d, d))

    def forward(self, hidden, route):
        rows = hidden.flatten(0, 1)
        out = torch.zeros_like(rows)
        for e, weight in enumerate(self.weight):
            picked = (route.flatten() == e).nonzero()[:2, 0]
            out = out.index_put((picked,), torch.tanh(rows[picked] @ weight))
        return out.view_as(hidden)


class Dropping(Routed):
    """A model that drops tokens beyond the capacity of an expert."""

    def __init__(self, d=8):
        super().__init__(d)
        self.experts = Capped(d)


class Halve(torch.autograd.Function):
    """An operation with a backward and without `jvp`, as most are."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class Answer:
    """An answer with logits, as transformers gives one."""

    def __init__(self, logits):
        self.logits = logits


class Logits(nn.Module):
    """Bare logits as an answer with `.logits`, for the reference implementation."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        out = self.model(input_ids=input_ids)
        return Answer(getattr(out, "logits", out))


class SecondHead(Routed):
    """A model that uses a weight outside its module."""

    answer = staticmethod(lambda logits: logits)

    def forward(self, input_ids, position_ids=None):
        logits = super().forward(input_ids).logits
        return self.answer(logits + 0.1 * self.embed(input_ids) @ self.embed.weight.T)


def ready(build, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)
