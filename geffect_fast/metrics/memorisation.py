"""Metrics of the text that a model knows by heart, from one teacher-forced pass.

With `n` label tokens of an answer, `m` of them in its longest suffix in which the model predicts
every token,

    extraction strength = m / n = 1 - k / n

where `k = n - m` is the length of the shortest prefix from which greedy decoding gives the rest. As
long as decoding is right, it reads the same tokens as teacher forcing, so no generation is needed.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from geffect_fast.metrics.base import Metric, Need
from geffect_fast.metrics.observed import Observed, Scored, required
from geffect_fast.metrics.registry import register


class _Strength(Metric):
    floor: bool = False
    """Whether an answer scores at least 1/n, as in the released code, which never compares an empty
    suffix; otherwise an answer whose last token is wrong scores 0."""

    def _of(self, scored: list[Scored]) -> np.ndarray:
        return np.array([extraction_strength(required(s.greedy), self.floor) for s in scored])


@register("extraction_strength")
class ExtractionStrength(_Strength):
    """Extraction strength of the answer to the question (arXiv 2406.09179)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers"})

    def scores(self, seen: Observed) -> np.ndarray:
        return self._of(required(seen.answers))


@register("paraphrased_extraction_strength")
class ParaphrasedExtractionStrength(_Strength):
    """Extraction strength of the answer to the paraphrased question."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rephrased"})

    def scores(self, seen: Observed) -> np.ndarray:
        return self._of(required(seen.rephrased))


def extraction_strength(greedy: np.ndarray, floor: bool = False) -> float:
    """The extraction strength `m / n` of one answer; 0 of an empty one.

    Args:
        greedy: `(n,)` bool, whether each label is the most probable token.
        floor: whether the value is at least `1 / n`.
    """
    n = len(greedy)
    if n == 0:
        return 0.0
    wrong = np.flatnonzero(~greedy)
    suffix = n if len(wrong) == 0 else n - 1 - int(wrong[-1])
    return max(suffix, int(floor)) / n


@register("exact_memorisation")
class ExactMemorisation(Metric):
    """The part of an answer's tokens that the model finds most probable after the tokens before."""

    needs: ClassVar[frozenset[Need]] = frozenset({"answers"})

    def scores(self, seen: Observed) -> np.ndarray:
        return np.array([required(each.greedy).mean() for each in required(seen.answers)])
