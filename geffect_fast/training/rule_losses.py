"""The losses of one update of `UnlearnTrainer`, in the form that update rules take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass, dealt
from geffect_fast.engines.model_outputs import model_outputs, packed_attention, sample_axis
from geffect_fast.errors import InputError
from geffect_fast.objectives import NLL, Objective
from geffect_fast.trying import no_memory
from geffect_fast.unlearn_settings import Training
from geffect_fast.updates import SGD, RetainBatch, Updater, UpdateRule, parse
from geffect_fast.updates.updater import no_retain_part

if TYPE_CHECKING:
    from geffect_fast.training.loss import Loss, RowNumbers
    from geffect_fast.training.trainer import UnlearnTrainer


def protected_part(rule: UpdateRule, objective: Objective) -> Objective | None:
    """The part whose retain gradient a rule protects where the objective has no retain part: nll.

    None where the rule reads no retain rows, or the objective has a retain part.

    Raises:
        InputError: the rule needs a retain part in the objective and there is none, or the retain
            parts read different sequences, so that their gradients are not those of single rows.
    """
    retain = [part for _, part in objective.parts() if part.on == "retain"]
    if "retain_part" in rule.needs and not retain:
        raise no_retain_part(rule, f"'{objective}'")
    if "retain_rows" in rule.needs and len({frozenset(part.roles) for part in retain}) > 1:
        raise InputError(
            f"update {rule}: the retain parts of '{objective}' read different sequences of a row; "
            "give one of them"
        )
    return NLL() if rule.reads_retain and not retain else None


def updater_of(training: Training, model: nn.Module) -> Updater | None:
    """The updater that applies the update rule of a run; None for the plain gradient.

    Raises:
        InputError, UnsupportedModelError: the rule would give wrong updates for this training or
            model.
    """
    rule = parse(training.update)
    if isinstance(rule, SGD):
        return None
    if training.precision == "fp16":
        raise InputError(
            f"update {rule}: --precision fp16 scales gradients up, which inner products of them do "
            "not bear; use bf16"
        )
    return Updater(rule, model)


class _RankOutOfMemoryError(MemoryError):
    """Raised by `agree` on every rank when memory has run out on any of them."""


class RuleLosses:
    """The forget and retain losses of an update, cut into batches of the Trainer's token budget.

    Ranks share out the batches of a loss. Where the rule compares single retain rows, every rank
    runs all batches of retain rows (`retain_batches`).

    Args:
        trainer: runs the batches.
        model: the model as the Trainer calls it.
        rows: rows of the update.
        loss: the loss that the training descends on, with the present token budget.
        protected: the retain loss outside `loss`, where the rule needs one and `loss` has none.
        told_apart: whether the rule compares single retain rows. The retain rows are then cut into
            as few batches as the token budget allows, since some modules need a single batch.
    """

    def __init__(
        self,
        trainer: UnlearnTrainer,
        model: nn.Module,
        rows: RowNumbers,
        loss: Loss,
        protected: Objective | None,
        *,
        told_apart: bool,
    ) -> None:
        self._trainer, self._model, self._rows = trainer, model, rows
        self._loss = loss
        self._retain_loss = replace(loss, pieces=1) if told_apart else loss
        self._forget = [each for each in loss.passes(rows) if each.on == "forget"]
        self._retain = [each for each in self._retain_loss.passes(rows) if each.on == "retain"]
        self.retain_weight = 1.0 if self._retain else 0.0
        if protected is not None:
            self._retain_loss = replace(self._retain_loss, objective=protected)
            self._retain = self._retain_loss.passes({"retain": rows["retain"]})

    @property
    def largest(self) -> Batch:
        """The batch with the most tokens."""
        return max(
            (batch for each in (*self._forget, *self._retain) for batch in each.batches),
            key=lambda batch: batch.total_tokens,
        )

    def forget(self) -> float:
        """Add the gradient of the forget loss to `.grad`, and return its value.

        Raises:
            MemoryError: a rank lacks memory.
        """
        return self._descend(self._forget, self._loss)

    def retain(self) -> float:
        """Add the gradient of the retain loss to `.grad`, and return its value.

        Raises:
            MemoryError: a rank lacks memory.
        """
        return self._descend(self._retain, self._retain_loss)

    def _descend(self, passes: Sequence[DataPass], loss: Loss) -> float:
        trainer = self._trainer
        if trainer.shards is not None:
            return trainer.descend_in_step(self._model, self._rows, passes, loss)
        own = [dealt(each, trainer.ranks, in_step=False) for each in passes]
        value = sum(
            trainer.descend(self._model, self._rows, each, batch, loss)
            for each in own
            for batch in each.batches
        )
        agree(trainer)
        return trainer.add_up(value)

    def retain_batches(self) -> list[RetainBatch]:
        """The batches of retain rows, whose token terms add up to the retain loss."""
        return [self._batch(each, batch) for each in self._retain for batch in each.batches]

    def _batch(self, data_pass: DataPass, batch: Batch) -> RetainBatch:
        trainer, loss, rows = self._trainer, self._retain_loss, self._rows
        moved = batch.to(trainer.args.device)
        parts = [p for p in loss.objective.parts() if p[1] in data_pass.parts.values()]

        def losses(model: nn.Module, _batch: Any) -> Tensor:
            outputs = model_outputs(model, moved, data_pass.needs)
            other = None
            if trainer.reference is not None:
                other = trainer.reference.outputs(data_pass, rows, batch, moved)
            terms = [c * part.token_terms(outputs, moved, other) for c, part in parts]
            total = torch.stack(terms).sum(0)
            return moved.sample_sum(total, torch.ones_like(total, dtype=torch.bool))

        @contextmanager
        def around() -> Iterator[None]:
            with packed_attention(self._model, moved), trainer.compute_loss_context_manager():
                yield

        axis = sample_axis(self._model, moved)
        return RetainBatch(axis, batch.total_tokens, losses, around, (losses.__code__, *parts))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to `.grad`.

        Where ranks share out the model, the gradient is that of the sum of all ranks' scalars.
        """
        trainer = self._trainer
        with trainer.adding_up():
            trainer.backward(loss)


def agree(trainer: UnlearnTrainer, *, missing: bool = False) -> None:
    """Wait for all ranks, and raise where one of them has run out of memory.

    Args:
        trainer: the trainer of this rank.
        missing: whether this rank lacks memory.

    Raises:
        MemoryError: a rank lacks memory.
    """
    if any(trainer.ranks.meet(missing)):
        raise _RankOutOfMemoryError("out of memory")


def update_by_rule(
    trainer: UnlearnTrainer, updater: Updater, model: nn.Module, rows: RowNumbers
) -> float:
    """Write the gradient of an update by its rule, and return the loss.

    Where memory runs out on any rank, the whole update is redone in smaller batches. This is not
    done where ranks share out the model and therefore run in step.
    """
    budget = trainer.budget
    protected = protected_part(updater.rule, trainer.loss.objective)
    while True:
        loss = replace(trainer.loss, token_budget=budget.tokens)
        told_apart = "retain_rows" in updater.rule.needs
        losses = RuleLosses(trainer, model, rows, loss, protected, told_apart=told_apart)
        if trainer.shards is not None:
            return updater.update(losses, trainer.optimizer)
        before = updater.state_dict()
        try:
            value = updater.update(losses, trainer.optimizer)
            agree(trainer)
            return value
        except (MemoryError, RuntimeError) as error:
            largest = losses.largest
            budget.exhausted = largest.n_samples == 1
            if not no_memory(error) or budget.exhausted:
                raise
            if not isinstance(error, _RankOutOfMemoryError):
                with suppress(_RankOutOfMemoryError):
                    agree(trainer, missing=True)
        # This rank may have finished the update while another ran out of memory.
        updater.load_state_dict(before)
        for p in model.parameters():
            p.grad = None
        budget.halve(largest.total_tokens)
