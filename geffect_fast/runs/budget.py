"""Memory that runs out for good, answered with the token budget that was too large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geffect_fast.engines.attempts import TokenBudget
from geffect_fast.errors import OutOfMemoryError
from geffect_fast.trying import no_memory


@contextmanager
def within_budget(budget: TokenBudget, *, one_sample: bool = False) -> Iterator[None]:
    """Run batches; where memory runs out all the same, say what to try.

    Args:
        budget: of tokens a batch, as it has become by then.
        one_sample: whether every batch inside is one sample, which no budget divides.

    Raises:
        OutOfMemoryError: one line, in place of the allocator's many.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        if not one_sample and not budget.exhausted:
            half = budget.tokens // 2
            raise OutOfMemoryError(
                f"out of memory with a token budget of {budget.tokens}; give a smaller one, such "
                f"as --token-budget {half} (token_budget={half})"
            ) from error
        raise OutOfMemoryError(
            f"out of memory with a token budget of {budget.tokens}, which is one sample a batch; "
            "shorten the longest samples (--max-length finds them), give fewer objectives, or use "
            "--dtype bfloat16"
        ) from error
