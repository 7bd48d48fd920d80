"""Which parts of objectives read which batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from geffect_fast.data.batch import Batch, Role
from geffect_fast.engines.batches import Attempt, TokenBudget, attempts
from geffect_fast.engines.model_outputs import model_outputs
from geffect_fast.engines.packed_attention import packed_attention
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.objectives.base import REFERENCE_NEEDS, Need

ROLE_ORDER: tuple[Role, ...] = ("answer", "alternative")


Listener = Callable[["Task", int, Outputs, Batch, "Outputs | None"], None]
"""Told of every part, by its number, on every batch, with the model's and the reference's outputs.
"""


@dataclass
class Task:
    """The parts of objectives that one forward pass over the same batches serves.

    Attributes:
        batches: on the CPU; smaller ones take their places where memory runs out.
        parts: the elementary objectives that read these batches, by their number among all parts.
        offset: number of the first row of this data set on the result's sample axis.
        on: name of the data set.
        watch: told of each part's evaluation, again where a batch is redone; None: nobody.
        budget: of tokens a batch; None: a lack of memory is an error.
    """

    batches: list[Batch]
    parts: dict[int, Objective] = field(default_factory=dict)
    offset: int = 0
    on: str = ""
    watch: Listener | None = None
    budget: TokenBudget | None = None

    def attempts(self) -> Iterator[Attempt]:
        """The batches, each to be run inside its `Attempt`."""
        return attempts(self.batches, self.budget)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset(need for part in self.parts.values() for need in part.needs)

    @property
    def n_tokens(self) -> int:
        return sum(b.total_tokens for b in self.batches)

    def terms(
        self, index: int, outputs: Outputs, batch: Batch, reference: Outputs | None
    ) -> tuple[Tensor, Tensor]:
        """What to differentiate for part `index` on `batch`, token by token, and its own value."""
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
    """How often each part counts in each objective, `(K, n_parts)` fp64."""
    mixture = torch.zeros(len(objectives), len(parts), dtype=torch.float64)
    for k, objective in enumerate(objectives):
        for coefficient, part in objective.parts():
            mixture[k, parts.index(part)] += coefficient
    return mixture


def tasks_for(
    parts: Sequence[Objective],
    batches_of: Callable[[str, tuple[Role, ...]], list[Batch]],
    offsets: dict[str, int],
    budget: TokenBudget | None = None,
) -> list[Task]:
    """Group parts of objectives by the data they read.

    Args:
        parts: elementary objectives.
        batches_of: the batches of a data set (`forget`, `retain`) holding sequences of the roles.
        offsets: where each data set starts on the sample axis.
        budget: of tokens a batch, as `Task` takes it.
    """
    tasks: dict[tuple[str, tuple[Role, ...]], Task] = {}
    for index, part in enumerate(parts):
        roles = tuple(r for r in ROLE_ORDER if r in part.roles)
        key = (part.on, roles)
        if key not in tasks:
            batches = batches_of(part.on, roles)
            tasks[key] = Task(batches, offset=offsets[part.on], on=part.on, budget=budget)
        tasks[key].parts[index] = part
    return list(tasks.values())


class Reference:
    """The frozen model that objectives compare with.

    Without a model of its own it is the profiled model as it stands, and costs nothing. Otherwise
    log-probabilities are computed once, before the engine starts, so that no second model need stay
    in memory; only logits (kl) and hidden states (rr) are computed batch by batch, with the model
    kept.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self._stored: dict[tuple[str, tuple[Role, ...], int], Tensor] = {}
        """Log-probabilities by data set, roles and row: batches may be cut anew."""

    @torch.no_grad()
    def prepare(self, tasks: Sequence[Task], device: torch.device) -> None:
        """Compute and keep what `tasks` need; let go of the model where nothing else is needed."""
        if self.model is None:
            return
        needs = [task.needs & REFERENCE_NEEDS for task in tasks]
        for task, needed in zip(tasks, needs, strict=True):
            if needed == {"reference"}:
                for attempt in task.attempts():
                    places = _places(task, attempt.batch)
                    if places[0] in self._stored:
                        continue  # an earlier measurement's
                    with attempt:
                        found = self._log_probabilities(self.model, attempt.batch.to(device))
                        lengths = attempt.batch.cu_samples.diff().tolist()
                        self._stored |= zip(places, found.split(lengths), strict=True)
        if not any(needed - {"reference"} for needed in needs):
            self.model = None

    @torch.no_grad()
    def is_computed_by(self, model: nn.Module, tasks: Sequence[Task], device: torch.device) -> bool:
        """Whether another model says the same, bit by bit, on all that `tasks` compare with.

        It ends at the first batch on which it does not. Before `prepare`, which may let go of the
        reference.
        """
        if self.model is None:
            return False
        for task in tasks:
            needs = task.needs & REFERENCE_NEEDS
            for attempt in task.attempts() if needs else ():
                with attempt:
                    moved = attempt.batch.to(device)
                    said = []
                    for each in (self.model, model):
                        with packed_attention(each, moved):
                            said.append(model_outputs(each, moved, needs))
                    if not _equal(*said):
                        return False
        return True

    @staticmethod
    def _log_probabilities(model: nn.Module, moved: Batch) -> Tensor:
        with packed_attention(model, moved):
            return model_outputs(model, moved).token_logprob

    @torch.no_grad()
    def given(self, task: Task, batch: Batch, moved: Batch) -> Outputs | None:
        """What another model says of `batch` (`moved`: on the device); None where there is none."""
        needs = task.needs & REFERENCE_NEEDS
        if needs == {"reference"} and self._stored:
            return Outputs(torch.cat([self._stored[place] for place in _places(task, batch)]))
        if not needs or self.model is None:
            return None
        with packed_attention(self.model, moved):
            return model_outputs(self.model, moved, needs)

    def outputs(self, task: Task, batch: Batch, moved: Batch, own: Outputs) -> Outputs | None:
        """The reference's outputs on `batch`, where `own` are the model's."""
        given = self.given(task, batch, moved)
        if given is not None or not task.needs & REFERENCE_NEEDS:
            return given
        return Outputs(
            own.token_logprob.detach(),
            None if own.logits is None else own.logits.detach(),
            None if own.hidden_states is None else tuple(h.detach() for h in own.hidden_states),
        )


def _equal(one: Outputs, other: Outputs) -> bool:
    """Whether two models say the same, bit by bit."""
    pairs = [(one.token_logprob, other.token_logprob)]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits))
    own, others = one.hidden_states or (), other.hidden_states or ()
    if len(own) != len(others):
        return False
    pairs += zip(own, others, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _places(task: Task, batch: Batch) -> list[tuple[str, tuple[Role, ...], int]]:
    """Where a reference keeps each sample of a batch."""
    roles = tuple(dict.fromkeys(batch.roles))
    return [(task.on, roles, row) for row in batch.rows]
