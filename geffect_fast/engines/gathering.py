"""Exchange of the effects that ranks find for their rows, batch by batch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import SpooledTemporaryFile

from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import Collect, DataPass, ranks_of

IN_MEMORY = 2**28
"""Bytes of effects that a rank keeps in memory until ranks meet; more go to a temporary file."""


@contextmanager
def gathered(passes: Sequence[DataPass], collect: Collect) -> Iterator[Collect]:
    """Let `collect` receive the effects of all ranks' batches, in the same order on every rank.

    Sums over rows are then the same on all ranks to the bit. One batch of each rank is in memory at
    a time.

    Args:
        passes: the passes whose batches were dealt to ranks.
        collect: receives every batch's effects, once each.

    Yields:
        The receiver of this rank's effects. With several ranks `collect` receives all effects, this
        rank's and the others', at the end of the block.
    """
    ranks = ranks_of(passes)
    if ranks.size == 1:
        yield collect
        return
    of = {id(data_pass): number for number, data_pass in enumerate(passes)}
    n_own = 0
    with SpooledTemporaryFile(IN_MEMORY) as own:

        def keep(data_pass: DataPass, batch: Batch, effects: Tensor) -> None:
            nonlocal n_own
            pickle.dump((of[id(data_pass)], batch, effects), own)
            n_own += 1

        yield keep
        own.seek(0)
        failed: Exception | None = None
        for source, n in enumerate(ranks.meet(n_own)):
            for _ in range(n):
                found = pickle.load(own) if source == ranks.rank else None
                number, batch, effects = ranks.broadcast(source, found)
                try:
                    if failed is None:
                        collect(passes[number], batch, effects)
                except Exception as error:  # such as a full disk on one rank; the others send on
                    failed = error
        if failed is not None:
            raise failed
