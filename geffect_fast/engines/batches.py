"""Batches one by one; where memory runs out, the one that failed is redone in smaller ones.

Nothing is counted twice: what was finished of a batch before memory ran out, objective by
objective, is not done again, and the rest was not counted yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from geffect_fast.data.batch import Batch
from geffect_fast.data.packing import split_batch
from geffect_fast.errors import GEffectWarning
from geffect_fast.trying import no_memory


class TokenBudget:
    """Tokens a batch, halved where memory runs out.

    Attributes:
        tokens: as it is now.
        exhausted: whether memory ran out for a batch of one sample, which no budget divides.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.exhausted = False

    def halve(self, n_tokens: int) -> None:
        """Allow half of what memory ran out for, and say so in a line (`GEffectWarning`).

        Args:
            n_tokens: of the batch that did not fit; the budget may be larger than the data.
        """
        self.tokens = max(min(self.tokens, n_tokens) // 2, 1)
        warnings.warn(
            f"out of memory with a batch of {n_tokens} tokens; going on with a token budget of "
            f"{self.tokens}",
            GEffectWarning,
            stacklevel=3,
        )


class Attempt:
    """One try at a batch, as a context manager: inside it, a lack of memory ends the try alone.

    Not where the batch is one sample, nor inside `finishing`. What failed should hold nothing that
    takes memory afterwards: run it in a function of its own.

    Attributes:
        batch: on the CPU.
        done: numbers of objectives that are done for this batch's samples already.
        failed: whether memory ran out.
    """

    def __init__(
        self, batch: Batch, budget: TokenBudget | None, done: frozenset[int] = frozenset()
    ) -> None:
        self.batch = batch
        self.done = done
        self.failed = False
        self._budget = budget
        self._finishing = False

    @contextmanager
    def finishing(self, index: int) -> Iterator[None]:
        """Inside, add up what was found for objective `index`; afterwards it is done."""
        self._finishing = True
        yield
        self._finishing = False
        self.done |= {index}

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None or self._budget is None or self._finishing or not no_memory(error):
            return False
        self._budget.exhausted = self.batch.n_samples == 1
        self.failed = not self._budget.exhausted
        return self.failed


def attempts(batches: list[Batch], budget: TokenBudget | None = None) -> Iterator[Attempt]:
    """Every batch as an `Attempt`; what fails comes again in pieces of half its size.

    Args:
        batches: replaced in place by the pieces, so that they need not fail again.
        budget: as it is now; larger batches are cut before they are tried. None: nothing is cut,
            and a lack of memory is an error.
    """
    at, done = 0, [frozenset[int]()] * len(batches)
    while at < len(batches):
        batch = batches[at]
        if budget is not None and batch.total_tokens > budget.tokens and batch.n_samples > 1:
            pieces = split_batch(batch, budget.tokens)
            batches[at : at + 1] = pieces
            done[at : at + 1] = [done[at]] * len(pieces)
            continue
        attempt = Attempt(batch, budget, done[at])
        yield attempt
        if attempt.failed:
            assert budget is not None
            budget.halve(batch.total_tokens)
            done[at] = attempt.done
        else:
            at += 1
