"""Publicly reported errors of per-sample gradients: here exact, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from reference import effects, error
from torch import Tensor, nn

import geffect_fast as gf
from geffect_fast.errors import UnsupportedModelError

WIDTH, VOCAB = 8, 13


class Tagger(nn.Module):
    """A model with logits of every token, from an embedding by way of `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = (
            nn.Embedding(VOCAB, WIDTH),
            inner,
            nn.Linear(WIDTH, VOCAB),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = x + self.inner(x, x, x, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Positions(nn.Module):
    """A table looked up by `arange(tokens)`, shared by all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.table(torch.arange(x.shape[1])))


class Bags(nn.Module):
    """Bags of ids with offsets: one row for each bag, however many ids the bag holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        n, length = ids.shape
        bags = self.bag(ids.flatten(), torch.arange(0, n * length, length))
        return self.head(bags)[:, None].expand(-1, length, -1)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


class Report(NamedTuple):
    """A public thread, the model that the thread is about, and whether it must be served."""

    source: str
    build: Callable[[], nn.Module]
    served: bool


REPORTS = [
    # learned positions with one row for all samples, and an output layer tied to the embedding
    Report("meta-pytorch/opacus#841", gpt2, True),
    Report("meta-pytorch/opacus#413", gpt2, True),
    Report("meta-pytorch/opacus#505", lambda: Tagger(Positions()), False),
    Report("meta-pytorch/opacus#650", lambda: Tagger(Attention(True)), True),
    Report("meta-pytorch/opacus#216", lambda: Tagger(Attention(False)), False),
    Report("meta-pytorch/opacus#717", lambda: Tagger(Gru()), True),
    Report("meta-pytorch/opacus#518", Bags, False),
]


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").sum(1)


@pytest.mark.parametrize(("n", "tokens"), [(4, 4), (3, 5), (2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.source)
def test_norms_are_exact_or_refused(report: Report, n: int, tokens: int) -> None:
    torch.manual_seed(0)
    model = report.build().double().eval()
    ids = torch.randint(VOCAB, (n, tokens))
    own = []
    for one in ids:
        found = torch.autograd.grad(
            losses(model, one[None])[0], list(model.parameters()), allow_unused=True
        )
        own.append(sum(g.square().sum() for g in found if g is not None).sqrt())
    try:
        norms = gf.functional.per_sample_grad_norms(model, losses, ids)
    except UnsupportedModelError as refusal:
        assert not report.served, refusal
        assert "module '" in str(refusal)
    else:
        torch.testing.assert_close(norms, torch.stack(own), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n_rows", [3, 6])
def test_dora_of_more_rows_than_risks(n_rows: int) -> None:
    """huggingface/peft#1474: a layer whose parts ask for gradients by themselves."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    rows = [{"input_ids": [3, 4, 5, 6 + i], "labels": [-100, 4, 5, 6 + i]} for i in range(n_rows)]
    found = gf.profile(model, None, forget=rows, retain=rows, objectives=["ga"])
    assert any("magnitude" in name for name in found.parameter.values)
    expected = effects(model, model, [(1.0, "ga", {})], rows, rows, None)[..., :n_rows]
    assert error(found.g_effect.values[0], expected) < 1e-4
