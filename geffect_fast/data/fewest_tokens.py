"""A lower bound on the tokens of a long text, found without minutes of tokenising."""

from __future__ import annotations

import json
from typing import Any

_MANY = 20_000
"""Characters of the shortest text that gets a bound; shorter texts are tokenised quickly."""


class FewestTokens:
    """A lower bound on the tokens of texts, for one tokenizer.

    The bound is the number of characters of a text, without white space, over that of the
    tokenizer's longest token. The bound holds where no token stands for text of any length, and
    where tokenising leaves out nothing but white space. For other tokenizers the bound is 0.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._longest: int | None = None

    def __call__(self, text: str) -> int:
        """The bound for a text; 0 for a short text."""
        if len(text) < _MANY:
            return 0
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._longest is None:
            self._longest = _longest_token(backend) if backend is not None else 0
        if self._longest == 0:
            return 0
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        seen = sum(map(len, text.replace("▁", " ").split()))
        return -(-seen // self._longest)


def _longest_token(backend: Any) -> int:
    """Characters of the longest token; 0 where a token may stand for more text than it spells."""
    model, vocabulary = backend.model, backend.get_vocab()
    if type(model).__name__ != "BPE" or not vocabulary:
        return 0
    steps = str(json.loads(backend.pre_tokenizer.__getstate__())) if backend.pre_tokenizer else ""
    whole = (
        model.byte_fallback or "'ByteLevel'" in steps or (model.unk_token and not model.fuse_unk)
    )
    return max(map(len, vocabulary)) if whole and "'Removed'" not in steps else 0
