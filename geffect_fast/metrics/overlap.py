"""Metrics of texts that a model writes: ROUGE-L of greedy continuations, by rouge-score."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from geffect_fast.data.row_kinds import RowKind
from geffect_fast.metrics.base import Metric, Need
from geffect_fast.metrics.extra import rouge_scorer
from geffect_fast.metrics.observed import Observed, required
from geffect_fast.metrics.registry import register
from geffect_fast.metrics.rows import EXAMPLES


class _Overlap(Metric):
    def _rouge(
        self,
        continuations: list[str],
        truths: list[str],
        measure: Literal["recall", "fmeasure"],
        *,
        use_stemmer: bool,
    ) -> np.ndarray:
        """ROUGE-L of every row's continuation against the data's own text, `(n,)`."""
        scorer = rouge_scorer(use_stemmer=use_stemmer)
        pairs = zip(truths, continuations, strict=True)
        return np.array([getattr(scorer.score(*pair)["rougeL"], measure) for pair in pairs])


@register("rouge_l")
class RougeL(_Overlap):
    """ROUGE-L recall of the answer, words compared by their stems: TOFU's ROUGE.

    For a conversation, the assistant's first turn is written and compared. For a text, as many
    tokens are compared as may be written.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"continuations"})

    def scores(self, seen: Observed) -> np.ndarray:
        written, truths = required(seen.continuations), required(seen.truths)
        return self._rouge(written, truths, "recall", use_stemmer=True)


class _Muse(_Overlap):
    """ROUGE-L F1 in percent, without stemming, of a continuation of limited length."""

    needs: ClassVar[frozenset[Need]] = frozenset({"written"})
    statistic: ClassVar[str] = "mean percent"
    within: ClassVar[tuple[float, float]] = (0.0, 100.0)

    max_new_tokens: int = Field(default=128, gt=0)
    """Most tokens that the model writes."""

    def most_written(self) -> int:
        return self.max_new_tokens

    def _percent(self, written: list[str], truths: list[str]) -> np.ndarray:
        return 100 * self._rouge(written, truths, "fmeasure", use_stemmer=False)


@register("verbatim_memorisation")
class VerbatimMemorisation(_Muse):
    """ROUGE-L of continued texts: MUSE's VerbMem (arXiv 2407.06460), from 0 to 100.

    The metric reads beginnings and continuations (`prompt`, `gt`), as MUSE has them, and plain
    text. Of a plain text the first 200 tokens, or the first half of a shorter one, are the
    beginning. As many tokens of the text are compared as may be written.
    """

    kinds: ClassVar[tuple[RowKind, ...]] = ("continuation", "text")

    def scores(self, seen: Observed) -> np.ndarray:
        return self._percent(*required(seen.written)[self.max_new_tokens])


@register("knowledge_memorisation")
class KnowledgeMemorisation(_Muse):
    """ROUGE-L of answers: MUSE's KnowMem (arXiv 2407.06460), from 0 to 100.

    The metric reads questions and answers. MUSE puts answered questions (few-shot examples) before
    each question; they come from the probe `NAME_icl` of a set `NAME`. Without such a probe a
    question is asked alone, by the template.
    """

    kinds: ClassVar[tuple[RowKind, ...]] = ("question",)

    max_new_tokens: int = Field(default=32, gt=0)
    """Most tokens that the model writes."""

    stops: str = Field(default="\n\n|\nQuestion|Question:", pattern=r"^[^(),]*$")
    """Texts, with `|` between, at which a continuation is cut."""

    @classmethod
    def reads(cls, name: str) -> bool:
        return not name.endswith(EXAMPLES)

    def scores(self, seen: Observed) -> np.ndarray:
        written, truths = required(seen.written)[self.max_new_tokens]
        stops = [stop for stop in self.stops.split("|") if stop]
        cut = [
            min((text.partition(stop)[0] for stop in stops), key=len, default=text)
            for text in written
        ]
        return self._percent(cut, truths)
