"""The loss of an update: the rows that are drawn, their batches, and the loss of each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from geffect_fast.capture.compat import is_sharded
from geffect_fast.data import Layout, SampleSet, make_batches
from geffect_fast.data.batch import Batch, Reduction, Role
from geffect_fast.data.packing import token_places
from geffect_fast.engines.batches import DataPass, TokenBudget, dealt, each_batch, passes_for
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.ranks import ALONE, Ranks

RowNumbers = Mapping[str, Sequence[int]]
"""Numbers of the rows that an update reads, by data set."""


class Draws(Dataset[RowNumbers]):
    """The rows that each update reads: every row once in random order, then again in a new order.

    The rows follow from the seed and the number of the update alone. A resumed run therefore reads
    the rows that it would have read without the interruption.

    Args:
        sizes: by data set, the number of its rows and the number of rows that an update reads.
        n_updates: number of updates in the run.
        seed: seed of the random orders.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], n_updates: int, seed: int) -> None:
        self.sizes = dict(sizes)
        self.n_updates = n_updates
        self.seed = seed

    def __len__(self) -> int:
        return self.n_updates

    def __getitem__(self, update: int) -> RowNumbers:
        if not 0 <= update < self.n_updates:
            raise IndexError(f"update {update} of {self.n_updates}")
        rows: dict[str, list[int]] = {}
        for which, (name, (n, count)) in enumerate(self.sizes.items()):
            places = range(update * count, (update + 1) * count)
            orders = {p: self._order(which, p, n) for p in {place // n for place in places}}
            rows[name] = [int(orders[place // n][place % n]) for place in places]
        return rows

    def _order(self, which: int, number: int, n: int) -> np.ndarray:
        return np.random.default_rng([self.seed, which, number]).permutation(n)


@dataclass(frozen=True)
class Loss:
    """The loss of a training step, and the rule that makes batches of its rows.

    Attributes:
        objective: the objective.
        sets: the whole data sets, by name.
        token_budget: the most tokens of a batch; a larger update is cut into several batches,
            whose gradients add up exactly.
        layout: layout of the batches.
        reduction: what means are taken over, within the rows of an update.
        pieces: the least number of batches that an update is cut into.
    """

    objective: Objective
    sets: Mapping[str, SampleSet]
    token_budget: int
    layout: Layout
    reduction: Reduction
    pieces: int = 1

    @property
    def parts(self) -> list[Objective]:
        return list(dict.fromkeys(part for _, part in self.objective.parts()))

    @property
    def reads(self) -> list[str]:
        """The data sets that the objective reads; the forget set first."""
        on = {part.on for part in self.parts}
        return ["forget", *(["retain"] if "retain" in on else [])]

    def passes(self, rows: RowNumbers) -> list[DataPass]:
        """The batches of an update, with the parts of the objective that read them.

        Samples are numbered by their place in `rows`. A row may stand there twice.
        """
        picked = {name: self.sets[name].part(chosen).samples for name, chosen in rows.items()}

        def batches_of(name: str, roles: tuple[Role, ...]) -> list[Batch]:
            totals = SampleSet(name, picked[name]).totals()
            edges = np.linspace(0, len(picked[name]), self.pieces + 1).round().astype(int)
            return [
                replace(batch, totals=totals)
                for start, end in pairwise(edges)
                if end > start
                for batch in make_batches(
                    SampleSet(name, picked[name][start:end]),
                    roles,
                    token_budget=self.token_budget,
                    reduction=self.reduction,
                    layout=self.layout,
                )
            ]

        return passes_for(self.parts, batches_of, dict.fromkeys(picked, 0))

    def value(
        self, data_pass: DataPass, outputs: Outputs, batch: Batch, reference: Outputs | None
    ) -> Tensor:
        """The share of a batch in the objective: a differentiable scalar."""
        shares = [
            coefficient * part.loss(outputs, batch, reference)
            for coefficient, part in self.objective.parts()
            if part in data_pass.parts.values()
        ]
        return torch.stack([share.double() for share in shares]).sum()


class RowReference:
    """Outputs of the reference model on any rows of the data sets.

    Log-probabilities are computed once and kept. Logits and hidden states are too large to keep, so
    for these the model itself is kept. Ranks share out the rows, and every rank keeps the
    log-probabilities of all rows.

    Args:
        model: the reference.
        loss: the loss, which tells what outputs are needed.
        ranks: the ranks that train together.
    """

    def __init__(self, model: nn.Module, loss: Loss, ranks: Ranks = ALONE) -> None:
        self._known: dict[str, Mapping[int, Tensor]] = {}
        self._loss, self._ranks = loss, ranks
        every = {name: range(len(loss.sets[name])) for name in loss.reads}
        passes = loss.passes(every)
        needs = [data_pass.needs & REFERENCE_NEEDS for data_pass in passes]
        for data_pass, needed in zip(passes, needs, strict=True):
            if needed == {"reference"}:
                self._keep(model, data_pass)
        self._model = model if any(needed - {"reference"} for needed in needs) else None

    @torch.no_grad()
    def outputs(
        self, data_pass: DataPass, rows: RowNumbers, batch: Batch, moved: Batch
    ) -> Outputs | None:
        """The reference's outputs on a batch; None where no part needs them.

        Args:
            data_pass: the pass of the batch, which knows the parts that read it.
            rows: the rows of the update.
            batch: a batch of the pass, on the CPU.
            moved: the same batch, on the model's device.
        """
        needs = data_pass.needs & REFERENCE_NEEDS
        if not needs:
            return None
        if needs != {"reference"}:
            assert self._model is not None
            with packed_attention(self._model, moved):
                return model_outputs(self._model, moved, needs)
        chosen = rows[data_pass.on]
        known = [self._known[data_pass.on][chosen[row]] for row in batch.rows]
        at = _flat_places(
            self._loss.sets[data_pass.on].part(chosen), batch, [len(k) for k in known]
        )
        values = torch.cat(known)[at.clamp(min=0)]
        return Outputs(values.masked_fill(at < 0, 0.0).to(moved.labels.device))

    @torch.no_grad()
    def _keep(self, model: nn.Module, data_pass: DataPass) -> None:
        """Keep the log-probabilities of every row's tokens: of its answer, then alternatives."""
        on, samples = data_pass.on, self._loss.sets[data_pass.on]
        lengths = [sum(map(len, (s.answer, *s.alternatives))) for s in samples.samples]
        # Another pass may have read other sequences of the same rows.
        known = self._known.get(on, {})
        device = next(model.parameters()).device
        budget = TokenBudget(self._loss.token_budget)
        own = replace(data_pass, token_budget=budget)
        own = dealt(own, self._ranks, in_step=is_sharded(model))
        kept: dict[int, Tensor] = {}
        for _, attempt in each_batch([own]):
            batch = attempt.batch
            with attempt:
                moved = batch.to(device)
                with packed_attention(model, moved):
                    found = model_outputs(model, moved).token_logprob.cpu()
            if attempt.failed:
                continue
            inside = [lengths[row] for row in batch.rows]
            before = [
                known[row] if row in known else found.new_zeros(length)
                for row, length in zip(batch.rows, inside, strict=True)
            ]
            flat = torch.cat(before)
            at = _flat_places(samples, batch, inside)
            flat[at[at >= 0]] = found[at >= 0]
            for row, piece in zip(batch.rows, flat.split(inside), strict=True):
                kept[row] = piece.clone()
        self._known[on] = {**known, **self._ranks.united(kept)}


def _flat_places(samples: SampleSet, batch: Batch, lengths: list[int]) -> Tensor:
    """Place of each token of a batch in its samples laid end to end; -1 for extensions."""
    places = token_places(samples, batch)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    sample = batch.sequence_sample[batch.token_sequence()]
    return torch.where(places < 0, -1, places + starts[sample])
