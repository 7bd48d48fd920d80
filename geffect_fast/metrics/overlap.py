"""Metrics of what a model writes: ROUGE-L of greedy continuations, by the package rouge-score."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from geffect_fast.metrics.base import Metric, Need
from geffect_fast.metrics.extra import rouge_scorer
from geffect_fast.metrics.observed import Observed, known
from geffect_fast.metrics.registry import register


def rouge(seen: Observed, measure: str, *, use_stemmer: bool) -> np.ndarray:
    """ROUGE-L of every row's continuation against what the data has there, `(n,)`.

    Args:
        seen: with continuations.
        measure: `recall` or `fmeasure`.
        use_stemmer: whether words are compared by their stems.
    """
    scorer = rouge_scorer(use_stemmer=use_stemmer)
    pairs = zip(known(seen.truths), known(seen.continuations), strict=True)
    return np.array([getattr(scorer.score(*pair)["rougeL"], measure) for pair in pairs])


class _Overlap(Metric):
    needs: ClassVar[frozenset[Need]] = frozenset({"continuations"})


@register("rouge_l")
class RougeL(_Overlap):
    """ROUGE-L recall of the answer, words compared by their stems: TOFU's ROUGE."""

    def scores(self, seen: Observed) -> np.ndarray:
        return rouge(seen, "recall", use_stemmer=True)


@register("verbatim_memorisation")
class VerbatimMemorisation(_Overlap):
    """ROUGE-L F1 of a text's continuation against the text: MUSE's VerbMem, from 0 to 1.

    What a row leaves without labels is the prompt; of a row that has labels on all its tokens, as
    plain text has, the first 200 are, or the first half.
    """

    def scores(self, seen: Observed) -> np.ndarray:
        return rouge(seen, "fmeasure", use_stemmer=False)


@register("knowledge_memorisation")
class KnowledgeMemorisation(_Overlap):
    """ROUGE-L F1 of the answer that a model writes to a question: MUSE's KnowMem, from 0 to 1."""

    def scores(self, seen: Observed) -> np.ndarray:
        return rouge(seen, "fmeasure", use_stemmer=False)
