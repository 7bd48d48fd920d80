"""`use_update_rule`: an update rule in anyone's own transformers `Trainer`."""

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
from geffect_fast.capture.precision import widened
from geffect_fast.capture.shards import Shards
from geffect_fast.capture.summed_backwards import SummedBackwards
from geffect_fast.data.batch import IGNORE
from geffect_fast.errors import InputError, UnsupportedModelError, in_one_line
from geffect_fast.ranks import Ranks
from geffect_fast.updates import RetainBatch, Updater, UpdateRule, parse

_READ = ("input_ids", "attention_mask", "labels")
"""Of retain rows."""

STATE = "update_rule.pt"
"""What a checkpoint of the Trainer gets, for a rule to go on from."""


def use_update_rule(
    trainer: Trainer, rule: UpdateRule | str, *, retain_weight: float = 0.0
) -> Updater:
    """Have a Trainer's gradients made by an update rule before its optimizer steps.

    The Trainer's items are mappings with `forget` and `retain`, as those of open-unlearning. Its
    `compute_loss` is the forget part: an objective without its retain part (`alpha=0` there). The
    retain loss is the mean negative log-likelihood of the labels of `retain`. Batches that are
    accumulated are one update.

    Where FSDP2 has shared out the model before the Trainer is given it, the batches of all ranks
    are one update: the forget part is the mean of their `compute_loss`, as FSDP takes it, and the
    mean of the retain loss is over the labels of all ranks. Each of them calls this.

    Args:
        trainer: before `train`.
        rule: an update rule, or its string.
        retain_weight: what the retain loss counts in the update; 0: it is only protected.

    Returns:
        What applies the rule.

    Raises:
        InputError: a rule, weight, precision or optimizer that does not fit; here, when training
            begins, or at an update.
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
            f"update {made}: fp16 scales gradients up, which inner products of them do not bear; "
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
    """Training steps of a Trainer: batches wait until their update is complete."""

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
        """The rule's gradient in `.grad` where the update is complete; returns its loss then."""
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
        plain: the Trainer's own training step.
        waiting: the batches, and what the Trainer counts in them.
        ranks: whose batches are one update.
        summed: of a model that they share out.
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
        """Add the gradient of `compute_loss` to `.grad`; its value."""
        return sum(float(self._plain(self._model, each, n)) for each, n in self._waiting)

    def retain(self) -> float:
        """Add the gradient of the retain loss to `.grad`; its value."""
        value = 0.0
        for batch in self._batches([each["retain"] for each, _ in self._waiting]):
            with batch.around():
                loss = batch.losses(self._model, batch).sum()
            self.backward(loss)
            value += float(loss.detach())
        return sum(self._ranks.meet(value))

    def retain_batches(self) -> list[RetainBatch]:
        """The retain rows of all ranks, each with its part of the mean over their labels."""
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
        return RetainBatch(Segments.rectangular(shape), shape.numel(), losses, around)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to `.grad`; of a model in parts, of all ranks' scalars."""
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
    """A rule's memory in the Trainer's checkpoints."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the optimizer, and go on from the checkpoint that is resumed."""
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
        """Write what the rule goes on from."""
        known = self._updater.state_dict()  # in which each rank has a part
        if self._updater.ranks.first:
            torch.save(known, _state_of(args, state))


def _state_of(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE
