"""Rows belong to the samples they are counted for, in `profile` and in `check`, at any B and T.

A model's modules may see rows token by token first, in another order, or rows in which samples
meet. Where there are as many samples as tokens, shapes do not tell the axes apart. Every case is
exact or refused, by both `profile` and `check`.
"""

from __future__ import annotations

import pytest
import torch
from architectures import VOCAB
from models import build, samples
from reference import close, effects
from small_models import Answer, ready
from torch import nn

import geffect_fast as gf
from geffect_fast.capture.attribution import Attribution
from geffect_fast.errors import UnsupportedModelError

WIDTH = 8


class Causal(nn.Module):
    """An embedding, a causal mean, one step of `(n, tokens, WIDTH)` and a head; no positions."""

    def __init__(self, step, **parts):
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.step = step

    def forward(self, input_ids):
        x = self.embed(input_ids)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(x.dtype)
        x = x + self.mix(x.cumsum(1) / steps)
        return Answer(self.head(self.step(self, x)))


class Placed(Causal):
    """A model that takes `position_ids` without need, as none of its tokens sees another."""

    def forward(self, input_ids, position_ids=None):
        return Answer(self.head(self.step(self, self.mix(self.embed(input_ids)))))


def linear():
    return nn.Linear(WIDTH, WIDTH)


def table_of_positions(b, x):
    return x + b.table(torch.arange(x.shape[1]))


def encoder(b, x):
    """A step by `nn.TransformerEncoder` with its defaults, where tokens come first."""
    tokens = x.shape[1]
    mask = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=x.dtype)
    return b.encoder(x.transpose(0, 1), mask=mask).transpose(0, 1)


def token_first(b, x):
    return x + b.inner(x.transpose(0, 1)).tanh().transpose(0, 1)


def token_first_flat(b, x):
    rows = b.inner(x.transpose(0, 1).reshape(-1, WIDTH)).tanh()
    return x + rows.view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1)


def sorted_by_expert(b, x):
    """A step on tokens in the order of a score, as an expert receives them."""
    rows = x.reshape(-1, WIDTH)
    order = rows[:, 0].argsort()
    return x + b.inner(rows[order]).tanh()[order.argsort()].view_as(x)


def merged_heads(b, x):
    """A step with heads before tokens in one axis: `(n, heads * tokens, d)`, rows as one list."""
    n, tokens, _ = x.shape
    heads = x.view(n, tokens, 2, -1).permute(2, 0, 1, 3).reshape(-1, WIDTH // 2)
    back = b.each(heads).tanh().view(2, n, tokens, -1).permute(1, 2, 0, 3)
    return x + back.reshape(x.shape)


def reversed_samples(b, x):
    return x + b.inner(x.flip(0)).tanh().flip(0)


def token_first_where_square(b, x):
    """A step with another order of rows only where there are as many samples as tokens."""
    return token_first(b, x) if x.shape[0] == x.shape[1] else x + b.inner(x).tanh()


def token_first_where_long(b, x):
    return token_first(b, x) if x.shape[1] > 7 else x + b.inner(x).tanh()


def leaking(b, x):
    """A step that adds a ten-thousandth of the batch's mean to every sample."""
    return x + b.inner(x).tanh() + 1e-4 * x.mean(0, keepdim=True).tanh()


def encoder_layers():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


MODELS = {
    "positions": lambda: Causal(table_of_positions, table=nn.Embedding(64, WIDTH)),
    "encoder": lambda: Causal(encoder, encoder=encoder_layers()),
    "token first": lambda: Causal(token_first, inner=linear()),
    "token first, flat": lambda: Causal(token_first_flat, inner=linear()),
    "sorted by expert": lambda: Causal(sorted_by_expert, inner=linear()),
    "merged heads": lambda: Causal(merged_heads, each=nn.Linear(WIDTH // 2, WIDTH // 2)),
    "reversed": lambda: Causal(reversed_samples, inner=linear()),
    "token first where square": lambda: Causal(token_first_where_square, inner=linear()),
    "token first where long": lambda: Causal(token_first_where_long, inner=linear()),
    "leaking": lambda: Causal(leaking, inner=linear()),
    "packed, sorted": lambda: Placed(sorted_by_expert, inner=linear()),
    "packed, merged": lambda: Placed(merged_heads, each=nn.Linear(WIDTH // 2, WIDTH // 2)),
}


def refusal(run):
    """A call's result and its refusal; one of the two is None."""
    try:
        return run(), None
    except UnsupportedModelError as error:
        return None, str(error)


def exact_or_refused(model, rows):
    """Whether `profile` and `check` serve a model; they must agree, and be exact if they do."""
    found, of_profile = refusal(
        lambda: gf.profile(
            model, None, forget=rows, retain=rows[:2], objectives=["ga"], engine="reverse"
        )
    )
    checked, of_check = refusal(lambda: gf.check(model, None, data=rows, samples=len(rows)))
    assert of_profile == of_check
    if found is None:
        return False
    expected = effects(model, model, [(1.0, "ga", {})], rows, rows[:2], None)
    close(found.g_effect[0].values, expected[..., : len(rows)], 1e-9)
    assert checked.exact and checked.layout == found.attrs["layout"]
    return True


SIZES = [(4, 4), (8, 8), (3, 5), (2, 14)]
BY_SIZE = ("encoder", "token first", "token first where square", "token first where long")
"""Models that look at their sizes: torch's encoder, too, chooses a way by them."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "tokens"),
    [(name, *size) for name in MODELS for size in (SIZES if name in BY_SIZE else [(4, 4), (3, 5)])],
)
def test_every_model_is_exact_or_refused(name, n, tokens):
    served = exact_or_refused(ready(MODELS[name]), samples([tokens] * n, 1))
    # The number of tokens decides the order of rows: the two short sequences of the trial do not
    # show it.
    refused = {"token first where square": n == tokens, "token first where long": tokens > 7}
    assert served != refused.get(name, False)


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_end_alike_hide_nothing(name):
    """The two sequences of the trial may end in the same tokens."""
    rows = samples([9] * 3, 1)
    for row in rows[:2]:
        row["input_ids"][2:] = row["labels"][2:] = rows[0]["input_ids"][2:]
    served = exact_or_refused(ready(MODELS[name]), rows)
    assert served == (name != "token first where long")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_leak_is_seen_in_low_precision(dtype):
    rows = samples([7] * 7, 1)
    for name, layout in (("leaking", "single"), ("token first where square", "equal_length")):
        model = ready(MODELS[name], dtype)
        found = gf.profile(
            model, None, forget=rows[:6], retain=rows[:6], objectives=["ga"], engine="reverse"
        )
        assert found.attrs["layout"] == layout


def test_rows_are_tried_once_a_model_and_structure(monkeypatch):
    trials = []
    weighted = Attribution.weighted

    def counted(self, losses):
        trials.append(len(losses))
        return weighted(self, losses)

    monkeypatch.setattr(Attribution, "weighted", counted)
    model = ready(MODELS["token first where square"])

    def profile(rows, times=1):
        for _ in range(times):
            gf.profile(model, None, forget=rows, retain=rows, objectives=["ga"], engine="reverse")
        seen = list(trials)
        trials.clear()
        return seen

    assert profile(samples([5] * 3 + [6] * 4, 1), 3) == [2], "the two sequences that are tried"
    with pytest.raises(UnsupportedModelError, match="module 'inner': losses of other samples"):
        profile(samples([5] * 5, 1))
    trials.clear()
    model = build("llama")
    assert profile(samples([5] * 5, 1)) == [], "its code shows it"
