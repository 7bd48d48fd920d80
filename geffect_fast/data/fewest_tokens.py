"""How many tokens a text has at least, told from its length: before it is tokenised for minutes."""

from __future__ import annotations

import json
from typing import Any

_MANY = 20_000
"""Shorter texts are tokenised at once."""


class FewestTokens:
    """A bound for one tokenizer: characters of a text over characters of its longest token.

    It holds where no token stands for any length of text, and where nothing but white space is
    left out on the way; of other tokenizers nothing is known, and the bound is 0.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._longest: int | None = None

    def __call__(self, text: str) -> int:
        """The bound for a text, 0 for a short one."""
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
    """Characters of the longest token; 0 where tokens may stand for more than they hold."""
    model, vocabulary = backend.model, backend.get_vocab()
    if type(model).__name__ != "BPE" or not vocabulary:
        return 0
    steps = str(json.loads(backend.pre_tokenizer.__getstate__())) if backend.pre_tokenizer else ""
    whole = (
        model.byte_fallback or "'ByteLevel'" in steps or (model.unk_token and not model.fuse_unk)
    )
    return max(map(len, vocabulary)) if whole and "'Removed'" not in steps else 0
