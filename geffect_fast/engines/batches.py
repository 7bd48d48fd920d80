"""Batches of the data, the parts of objectives evaluated on each, and the one loop over them.

Where memory runs out, the batch that failed is redone in smaller ones. Nothing is counted twice:
an objective that was finished on the batch before memory ran out is not done again, and the others
were not counted yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch
from torch import Tensor

from geffect_fast.data.batch import Batch, Role
from geffect_fast.data.packing import split_batch
from geffect_fast.errors import GEffectWarning
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.objectives.base import Need
from geffect_fast.ranks import ALONE, Ranks
from geffect_fast.trying import no_memory

ROLE_ORDER: tuple[Role, ...] = ("answer", "alternative")

Tick = Callable[[int], None]
"""Told how many tokens have just been worked through."""

Listener = Callable[["DataPass", int, Outputs, Batch, "Outputs | None"], None]
"""Told of every part, by its number, on every batch, with the model's and the reference's outputs.
"""

Collect = Callable[["DataPass", Batch, Tensor], None]
"""Receives the effects `(len(data_pass.parts), M, C, n)` fp64 of one batch's samples or tokens."""


class TokenBudget:
    """The tokens that a batch may hold, halved where memory runs out.

    Attributes:
        tokens: the budget as it is now.
        exhausted: whether memory ran out for a batch of one sample, which no budget divides.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.exhausted = False

    def halve(self, n_tokens: int) -> None:
        """Allow half of the tokens that memory ran out for, and warn in a line (`GEffectWarning`).

        Args:
            n_tokens: tokens of the batch that did not fit; the budget may be larger than the data.
        """
        self.tokens = max(min(self.tokens, n_tokens) // 2, 1)
        warnings.warn(
            f"out of memory with a batch of {n_tokens} tokens; going on with a token budget of "
            f"{self.tokens}",
            GEffectWarning,
            stacklevel=3,
        )


@dataclass
class DataPass:
    """One forward pass over a data set's batches, and the parts of objectives that it serves.

    Attributes:
        batches: the batches on the CPU; with several ranks, those dealt to this one. Smaller
            batches take their places where memory runs out.
        parts: the elementary objectives that read these batches, by their number among all parts.
        offset: number of the first row of this data set on the result's sample axis.
        on: name of the data set.
        watch: told of each part's evaluation, again where a batch is redone; None: no listener.
        token_budget: the budget of the batches; None: a lack of memory is an error.
        ranks: the ranks that share the batches.
        idle: number of last batches that count for nothing: they are run only to keep step with
            ranks that have more batches.
    """

    batches: list[Batch]
    parts: dict[int, Objective] = field(default_factory=dict)
    offset: int = 0
    on: str = ""
    watch: Listener | None = None
    token_budget: TokenBudget | None = None
    ranks: Ranks = ALONE
    idle: int = 0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset(need for part in self.parts.values() for need in part.needs)

    @property
    def n_tokens(self) -> int:
        return sum(b.total_tokens for b in self.batches)

    def terms(
        self, index: int, outputs: Outputs, batch: Batch, reference: Outputs | None
    ) -> tuple[Tensor, Tensor]:
        """The token terms of part `index` on `batch`, to be differentiated, and its value."""
        value = self.value(index, outputs, batch, reference)
        return self.parts[index].token_terms(outputs, batch, reference), value

    @torch.no_grad()
    def value(
        self, index: int, outputs: Outputs, batch: Batch, reference: Outputs | None
    ) -> Tensor:
        """The value of part `index` on `batch`, a fp64 scalar on its device."""
        if self.watch is not None:
            self.watch(self, index, outputs, batch, reference)
        return self.parts[index].loss(outputs, batch, reference).double()


def mixture_of(objectives: Sequence[Objective], parts: Sequence[Objective]) -> Tensor:
    """The coefficient of each part in each objective, `(K, n_parts)` fp64."""
    mixture = torch.zeros(len(objectives), len(parts), dtype=torch.float64)
    for k, objective in enumerate(objectives):
        for coefficient, part in objective.parts():
            mixture[k, parts.index(part)] += coefficient
    return mixture


def passes_for(
    parts: Sequence[Objective],
    batches_of: Callable[[str, tuple[Role, ...]], list[Batch]],
    offsets: dict[str, int],
    token_budget: TokenBudget | None = None,
) -> list[DataPass]:
    """Group parts of objectives by the data they read.

    Args:
        parts: elementary objectives.
        batches_of: gives a data set's (`forget`, `retain`) batches with sequences of the roles.
        offsets: where each data set starts on the sample axis.
        token_budget: as `DataPass` takes it.
    """
    passes: dict[tuple[str, tuple[Role, ...]], DataPass] = {}
    for index, part in enumerate(parts):
        roles = tuple(r for r in ROLE_ORDER if r in part.roles)
        key = (part.on, roles)
        if key not in passes:
            batches = batches_of(part.on, roles)
            passes[key] = DataPass(
                batches, offset=offsets[part.on], on=part.on, token_budget=token_budget
            )
        passes[key].parts[index] = part
    return list(passes.values())


def dealt(data_pass: DataPass, ranks: Ranks, *, in_step: bool) -> DataPass:
    """A pass over this rank's share of the batches.

    Args:
        data_pass: the pass over all batches, the same on every rank.
        ranks: the ranks that share the batches.
        in_step: whether every rank is to run the same number of batches, since ranks exchange
            weights meanwhile. Batches are then never cut, since a rank that is short of memory
            could not go its own way.
    """
    own, idle = ranks.dealt(data_pass.batches, in_step=in_step)
    allowed = None if in_step else data_pass.token_budget
    return replace(data_pass, batches=own, ranks=ranks, idle=idle, token_budget=allowed)


def ranks_of(passes: Sequence[DataPass]) -> Ranks:
    """The ranks that share the batches of every pass."""
    return passes[0].ranks if passes else ALONE


class Attempt:
    """One try at a batch, as a context manager in which a lack of memory ends the try alone.

    A lack of memory is raised where the batch is one sample, where there is no token budget, and
    inside `finishing`. A failed try should hold no memory afterwards: run it in a function of its
    own.

    Attributes:
        batch: the batch, on the CPU.
        done: numbers of objectives that are done for this batch's samples already.
        failed: whether memory ran out.
        idle: whether nothing of the batch counts.
    """

    def __init__(
        self,
        batch: Batch,
        token_budget: TokenBudget | None,
        done: frozenset[int] = frozenset(),
        *,
        idle: bool = False,
    ) -> None:
        self.batch = batch
        self.done = done
        self.idle = idle
        self.failed = False
        self._token_budget = token_budget
        self._finishing = False

    @contextmanager
    def finishing(self, index: int) -> Iterator[None]:
        """Inside, add up the results of objective `index`; afterwards the objective is done."""
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
        if error is None or self._token_budget is None or self._finishing or not no_memory(error):
            return False
        self._token_budget.exhausted = self.batch.n_samples == 1
        self.failed = not self._token_budget.exhausted
        return self.failed


def each_batch(
    passes: Iterable[DataPass], tick: Tick | None = None
) -> Iterator[tuple[DataPass, Attempt]]:
    """Every batch of every pass, to be run inside its `Attempt`; a failed one comes again, halved.

    The pieces replace the batch in its pass, so that it need not fail again. Batches larger than
    the token budget are cut before they are tried.

    Args:
        passes: the passes, in turn.
        tick: told of every batch that was run.
    """
    for data_pass in passes:
        batches, allowed = data_pass.batches, data_pass.token_budget
        at, done = 0, [frozenset[int]()] * len(batches)
        while at < len(batches):
            batch = batches[at]
            if allowed is not None and batch.total_tokens > allowed.tokens and batch.n_samples > 1:
                pieces = split_batch(batch, allowed.tokens)
                batches[at : at + 1] = pieces
                done[at : at + 1] = [done[at]] * len(pieces)
                continue
            idle = at >= len(batches) - data_pass.idle
            attempt = Attempt(batch, allowed, done[at], idle=idle)
            yield data_pass, attempt
            if attempt.failed:
                assert allowed is not None
                allowed.halve(batch.total_tokens)
                done[at] = attempt.done
                continue
            at += 1
            if tick is not None:
                tick(batch.total_tokens)
