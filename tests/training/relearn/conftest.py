"""A model that knows its rows, one that never saw some, and one that hides them."""

from __future__ import annotations

import copy

import pytest
from memorised import blank_model, fitted, tokenizer_of
from relearn_rows import ASKED, FORGET, OTHERS, ROWS

import geffect_fast as gf


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(ROWS)


@pytest.fixture(scope="module")
def blank(tokenizer):
    return blank_model(tokenizer)


@pytest.fixture(scope="module")
def original(blank, tokenizer):
    return fitted(copy.deepcopy(blank), tokenizer, [*FORGET, *OTHERS], 90)


@pytest.fixture(scope="module")
def retrained(blank, tokenizer):
    """A model that never saw the forget rows."""
    return fitted(copy.deepcopy(blank), tokenizer, OTHERS, 60)


@pytest.fixture(scope="module")
def unlearned(original, tokenizer):
    """A model after a little ascent, which hides rows rather than removes them."""
    return fitted(copy.deepcopy(original), tokenizer, FORGET, 5, sign=-1.0, lr=3e-3)


@pytest.fixture(scope="module")
def result(unlearned, original, retrained, tokenizer):
    return gf.relearn(unlearned, tokenizer, original=original, retrained=retrained, **ASKED)
