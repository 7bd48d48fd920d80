"""The lower bound on the number of tokens holds, and refuses text before it is tokenised."""

from __future__ import annotations

import pytest

from geffect_fast.data import tokenize_rows
from geffect_fast.data.fewest_tokens import FewestTokens
from geffect_fast.errors import InputError

TEXTS = ["word " * 8000, "a" * 30_000, "ü🦜 " * 9000, "\u0301e" * 20_000, " " * 25_000 + "x"]


@pytest.mark.parametrize("text", TEXTS, ids=["words", "letters", "bytes", "marks", "spaces"])
@pytest.mark.parametrize(
    "name", ["plain_tokenizer", "chat_tokenizer", "merging_tokenizer", "metaspace_tokenizer"]
)
def test_there_are_never_fewer(name, text, request):
    tokenizer = request.getfixturevalue(name)
    n_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert FewestTokens(tokenizer)(text) <= n_tokens


def test_text_that_cannot_fit_is_not_tokenised(plain_tokenizer, monkeypatch):
    bound = FewestTokens(plain_tokenizer)("a" * 1_000_000)
    assert bound > 1024
    row = {"question": "q?", "answer": "a" * 1_000_000}
    lengths = []
    kind = type(plain_tokenizer)
    real = kind.__call__

    def counted(self, text, *more, **kwargs):
        lengths.append(len(text))
        return real(self, text, *more, **kwargs)

    monkeypatch.setattr(kind, "__call__", counted)
    for limit in ({"max_length": 1024}, {"n_positions": 1024}):
        with pytest.raises(InputError, match=r"at least \d+ tokens, more than 1024"):
            tokenize_rows([row], plain_tokenizer, name="forget", **limit)
    assert max(lengths, default=0) < 1000


def test_where_a_token_stands_for_any_length_nothing_is_known():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert FewestTokens(tokenizer)("b" * 50_000) == 0
    assert FewestTokens(object())("b" * 50_000) == 0
