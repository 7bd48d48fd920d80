"""`use_update_rule`: an update rule in any transformers `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geffect_fast.capture import Segments
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import Shards
from geffect_fast.capture.summed_backwards import SummedBackwards
from geffect_fast.data.batch import IGNORE
from geffect_fast.errors import InputError, UnsupportedModelError, in_one_line
from geffect_fast.precision import widened
from geffect_fast.ranks import Ranks
from geffect_fast.updates import RetainBatch, Updater, UpdateRule, parse

_READ = ("input_ids", "attention_mask", "labels")
"""Fields of retain rows that are read."""

STATE = "update_rule.pt"
"""File in a Trainer's checkpoint that holds the rule's state."""


def use_update_rule(
    trainer: Trainer, rule: UpdateRule | str, *, retain_weight: float = 0.0
) -> Updater:
    """Let an update rule make a Trainer's gradients before the Trainer's optimizer steps.

    The Trainer's items are mappings with `forget` and `retain`, like those of open-unlearning. The
    Trainer's `compute_loss` is the forget part: an objective without its retain part (`alpha=0` in
    open-unlearning). The retain loss is the mean negative log-likelihood of the labels of `retain`.
    Batches whose gradients are accumulated form one update.

    With a model that FSDP2 has sharded before the Trainer was made, the batches of all ranks form
    one update: the forget part is the mean of the ranks' `compute_loss`, as in FSDP, and the mean
    of the retain loss is over the labels of all ranks. Each rank calls this function.

    Args:
        trainer: a Trainer, before its `train`.
        rule: an update rule, or its string.
        retain_weight: weight of the retain loss in the update; with 0 retain is only protected.

    Returns:
        The updater that applies the rule.

    Raises:
        InputError: a rule, weight, precision or optimizer does not fit. The error may come here,
            when training begins, or at an update.
        UnsupportedModelError: the training is spread over devices in another way.

    Examples:
        >>> trainer = Trainer(model, args, train_dataset=pairs, data_collator=collate)
        >>> gf.integrations.use_update_rule(trainer, gf.updates.OrthoGrad(), retain_weight=1.0)
        >>> trainer.train()
    """
    if not isinstance(trainer, Trainer):
        raise InputError(f"trainer: got {type(trainer).__name__}; give a Trainer of transformers")
    made = parse(rule)
    weight = retain_weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e308:
        raise InputError(f"retain_weight: must be a number of at least 0, got {weight!r}")
    if isinstance(getattr(trainer.training_step, "__self__", None), _Steps):
        raise InputError("trainer: has an update rule already; make another Trainer for another")
    if trainer.args.fp16:
        raise InputError(
            f"update {made}: fp16 scales gradients up, and their inner products then overflow; "
            "use bf16"
        )
    if trainer.model is None:
        raise InputError("trainer: has no model yet; give it one")
    several = max(trainer.args.world_size, trainer.args.n_gpu) > 1
    if several and not is_sharded(trainer.model):
        raise UnsupportedModelError(
            f"update {made}: inner products need all rows of an update on one device; train on one "
            "(CUDA_VISIBLE_DEVICES=0, without torchrun), or give the Trainer a model that "
            "fully_shard has shared out before"
        )
    updater = Updater(made, trainer.model)
    steps = _Steps(trainer, updater, float(weight))
    trainer.training_step = steps.training_step
    trainer.add_callback(_State(updater))
    return updater


class _Steps:
    """The training steps of a Trainer, whose batches wait until their update is complete."""

    def __init__(self, trainer: Trainer, updater: Updater, retain_weight: float) -> None:
        self._trainer, self._updater, self._weight = trainer, updater, retain_weight
        self._summed: SummedBackwards | None = None
        if is_sharded(updater.model):
            shards = Shards(updater.model, updater.ranks)
            trained = [p for p in updater.model.parameters() if p.requires_grad]
            self._summed = SummedBackwards(shards, trained, Tensor.backward)
        self._plain: Callable[..., Tensor] = trainer.training_step
        self._waiting: list[tuple[Any, Any]] = []

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Keep a batch; if it completes an update, set `.grad` by the rule and return the loss.

        The value is 0 for a batch that does not complete an update.
        """
        self._waiting.append((inputs, num_items_in_batch))
        if not self._trainer.accelerator.sync_gradients:
            return torch.zeros((), device=self._trainer.args.device)
        waiting, self._waiting = self._waiting, []
        reads = self._weight or self._updater.rule.reads_retain
        ranks = self._updater.ranks
        with ranks.in_step(ranks.size > 1):
            if reads:
                for each, _ in waiting:
                    _check_rows(each, str(self._updater.rule))
            losses = _OfBatches(
                self._trainer, self._plain, model, waiting, self._weight, ranks, self._summed
            )
            value = self._updater.update(losses, self._trainer.optimizer)
        return torch.tensor(value, device=self._trainer.args.device)


class _OfBatches:
    """The losses of the batches of one update.

    Args:
        trainer: the Trainer.
        plain: the Trainer's own training step.
        model: the model, as the Trainer passes it to a training step.
        waiting: the batches, each with the Trainer's number of items in it.
        retain_weight: weight of the retain loss in the update.
        ranks: the ranks whose batches form one update.
        summed: backward passes of a model that the ranks share; None for a model that is whole.
    """

    def __init__(
        self,
        trainer: Trainer,
        plain: Callable[..., Tensor],
        model: nn.Module,
        waiting: list[tuple[Any, Any]],
        retain_weight: float,
        ranks: Ranks,
        summed: SummedBackwards | None,
    ) -> None:
        self.retain_weight = retain_weight
        self._trainer, self._plain, self._model = trainer, plain, model
        self._waiting, self._ranks, self._summed = waiting, ranks, summed

    def forget(self) -> float:
        """Add the gradient of `compute_loss` to `.grad`, and return its value."""
        return sum(float(self._plain(self._model, each, n)) for each, n in self._waiting)

    def retain(self) -> float:
        """Add the gradient of the retain loss to `.grad`, and return its value."""
        value = 0.0
        for batch in self._batches([each["retain"] for each, _ in self._waiting]):
            with batch.around():
                loss = batch.losses(self._model, batch).sum()
            self.backward(loss)
            value += float(loss.detach())
        return sum(self._ranks.meet(value))

    def retain_batches(self) -> list[RetainBatch]:
        """The retain rows of all ranks, with losses that add up to the mean over all labels."""
        rows = [each["retain"] for each, _ in self._waiting]
        if self._ranks.size > 1:
            own = [{name: x.cpu() for name, x in each.items() if name in _READ} for each in rows]
            rows = [each for told in self._ranks.meet(own) for each in told]
        return self._batches(rows)

    def _batches(self, rows: Sequence[Mapping[str, Tensor]]) -> list[RetainBatch]:
        prepared = [self._trainer._prepare_inputs(each) for each in rows]
        own = [each["retain"]["labels"] for each, _ in self._waiting]
        n_labels = sum(self._ranks.meet(sum(int((each[:, 1:] != IGNORE).sum()) for each in own)))
        return [self._batch(each, max(n_labels, 1)) for each in prepared]

    def _batch(self, rows: Mapping[str, Tensor], n_labels: int) -> RetainBatch:
        given = {name: rows[name] for name in ("input_ids", "attention_mask") if name in rows}
        labels = rows["labels"][:, 1:]

        def losses(model: nn.Module, _batch: Any) -> Tensor:
            logits = widened(model(**given).logits[:, :-1])
            nll = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORE)
            return nll.sum(1) / n_labels

        shape, around = rows["input_ids"].shape, self._trainer.compute_loss_context_manager
        axis = Segments.rectangular(shape)
        return RetainBatch(axis, shape.numel(), losses, around, losses.__code__)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to `.grad`; with a sharded model, of all ranks' scalars."""
        if self._summed is None:
            loss.backward()
            return
        with self._summed.adding_up():
            self._summed.backward(loss)


def _check_rows(inputs: Any, rule: str) -> None:
    """Raise `InputError` where a batch of a Trainer has no retain rows of the shape needed."""
    retain = inputs.get("retain") if isinstance(inputs, Mapping) else None
    if retain is None:
        raise InputError(
            f"update {rule}: the Trainer's batches have no 'retain', whose gradient it needs; give "
            "items with 'forget' and 'retain'"
        )
    for name in ("input_ids", "labels"):
        rows = retain.get(name) if isinstance(retain, Mapping) else None
        if not isinstance(rows, Tensor) or rows.dim() != 2:
            raise InputError(
                f"update {rule}: '{name}' of the batch's 'retain' is no tensor (rows, length); "
                "collate it as that of 'forget'"
            )


class _State(TrainerCallback):
    """A callback that keeps a rule's state in the Trainer's checkpoints."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the optimizer, and load the rule's state from the checkpoint that is resumed."""
        self._updater.check(kwargs["optimizer"])
        if state.global_step == 0:
            return
        path = _state_of(args, state)
        try:
            loaded = torch.load(path, map_location="cpu")
        except Exception as error:  # torch raises anything on a damaged file
            raise InputError(
                f"{path}: cannot be loaded ({in_one_line(error, 120)}); resume from a checkpoint "
                "in output_dir that was written with this rule"
            ) from error
        self._updater.load_state_dict(loaded)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the rule's state."""
        known = self._updater.state_dict()  # on all ranks: each contributes a part
        if self._updater.ranks.first:
            torch.save(known, _state_of(args, state))


def _state_of(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE
