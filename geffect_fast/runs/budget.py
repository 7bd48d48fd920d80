"""Memory that runs out, answered with the token budget that was too large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geffect_fast.data.memory import no_memory
from geffect_fast.errors import OutOfMemoryError


@contextmanager
def within_budget(token_budget: int, n_samples: int) -> Iterator[None]:
    """Run batches; where memory runs out, say which token budget to try.

    Args:
        token_budget: tokens a batch.
        n_samples: in the largest batch; no budget divides a batch of one.

    Raises:
        OutOfMemoryError: one line, in place of the allocator's many.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        if n_samples > 1:
            half = token_budget // 2
            raise OutOfMemoryError(
                f"out of memory with a token budget of {token_budget}; give a smaller one, such as "
                f"--token-budget {half} (token_budget={half})"
            ) from error
        raise OutOfMemoryError(
            f"out of memory with a token budget of {token_budget}, which is one sample a batch; "
            "shorten the longest samples (--max-length finds them), give fewer objectives, or use "
            "--dtype bfloat16"
        ) from error
