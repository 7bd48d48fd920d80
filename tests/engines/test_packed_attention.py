"""Packed sequences attend one by one: the conditions, the function, and no lasting change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, SMALL
from models import build, fp64_throughout, samples
from torch import nn

import geffect_fast as gf
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines import model_outputs as module
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.errors import UnsupportedModelError

LENGTHS = [5, 5, 9, 3, 9, 9]


def batch_of(lengths, layout="packed"):
    found = make_batches(
        tokenize_rows(samples(lengths), None, name="forget"),
        ("answer",),
        token_budget=10_000,
        layout=layout,
    )
    assert len(found) == 1
    return found[0]


def mistral(window):
    return replace(ARCHITECTURES["mistral"], settings=SMALL | {"sliding_window": window})


def eager():
    model = ARCHITECTURES["llama"]()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def watched(monkeypatch):
    """Shapes of the queries that torch's attention is called with, and whether there was a mask."""
    seen = []
    attend = nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, **kwargs):
        seen.append((tuple(query.shape), attn_mask is not None))
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch)
    return seen


def implementations(model):
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


def test_sequences_attend_by_themselves(watched):
    model, batch = build("llama", torch.float64), batch_of(LENGTHS)
    masked = model_outputs(model, batch).token_logprob
    assert {mask for _, mask in watched} == {True}
    watched.clear()
    with packed_attention(model, batch):
        alone = model_outputs(model, batch).token_logprob
    # Neighbours of one length share a call, in each of three layers.
    shapes = [(2, 4, 5, 4), (1, 4, 9, 4), (1, 4, 3, 4), (2, 4, 9, 4)]
    assert watched == [(shape, False) for shape in shapes] * 3
    torch.testing.assert_close(alone, masked, rtol=1e-9, atol=1e-9)
    assert implementations(model) == {"sdpa"}


def test_a_profile_uses_it_and_puts_the_model_back(watched):
    model = build("llama")
    gf.profile(model, None, forget=samples([9] * 4), retain=samples([7, 6]), objectives=["ga"])
    assert not any(mask for _, mask in watched)
    assert any(shape[0] == 4 and not mask for shape, mask in watched)
    assert implementations(model) == {"sdpa"}


@pytest.mark.parametrize(
    ("make", "lengths", "layout", "used"),
    [
        ("llama", LENGTHS, "packed", True),
        ("llama", [9], "packed", False),
        ("llama", [9, 9], "equal_length", False),
        (eager, LENGTHS, "packed", False),
        (mistral(9), LENGTHS, "packed", True),
        (mistral(8), LENGTHS, "packed", False),
        (mistral(None), LENGTHS, "packed", True),
    ],
    ids=["llama", "one", "side-by-side", "eager", "window", "beyond-window", "no-window"],
)
def test_where_it_is_used(make, lengths, layout, used):
    model = build(make)
    before = implementations(model)
    with packed_attention(model, batch_of(lengths, layout)):
        assert (implementations(model) == {module.PACKED}) == used
    assert implementations(model) == before


def test_a_model_with_attention_of_its_own_runs_as_it_is():
    model = build("llama")
    type(model)._supports_attention_backend = False
    try:
        with packed_attention(model, batch_of(LENGTHS)):
            assert implementations(model) == {"sdpa"}
    finally:
        del type(model)._supports_attention_backend


@pytest.mark.parametrize("window", [4, 12, 40])
def test_windows_are_exact(window):
    """Batches run under the model's mask or sequence by sequence, with the same numbers."""
    with fp64_throughout():
        model = build(mistral(window), torch.float64)
        rows, retain = samples([20, 5, 9, 30], 1), samples([8, 13], 2)
        found = {
            budget: gf.profile(
                model, None, forget=rows, retain=retain, objectives=["ga"], token_budget=budget
            )
            for budget in (1, 34, 100)
        }
    assert found[100].attrs["layout"] == "packed"
    for budget in (34, 100):
        torch.testing.assert_close(
            torch.from_numpy(found[budget].g_effect.values),
            torch.from_numpy(found[1].g_effect.values),
            rtol=1e-9,
            atol=1e-12,
        )


def test_an_error_inside_puts_the_model_back():
    model, batch = build("llama"), batch_of(LENGTHS)
    with pytest.raises(KeyboardInterrupt), packed_attention(model, batch):
        raise KeyboardInterrupt
    assert implementations(model) == {"sdpa"}


def test_other_tokens_than_the_batch_holds_are_refused():
    model, batch = build("llama"), batch_of(LENGTHS)
    told = pytest.raises(UnsupportedModelError, match="not run over exactly the tokens")
    with packed_attention(model, batch), told:
        model(input_ids=batch.input_ids[:, :7])
