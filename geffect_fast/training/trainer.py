"""Training on an unlearning objective: transformers' Trainer with packed batches and our losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from geffect_fast.capture.parts import part_of, whole_values
from geffect_fast.capture.shards import Shards
from geffect_fast.capture.summed_backwards import SummedBackwards
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import (
    Attempt,
    DataPass,
    TokenBudget,
    dealt,
)
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.errors import (
    GEffectError,
    InputError,
    NonFiniteError,
    UnfinishedError,
    in_one_line,
)
from geffect_fast.measure.memory import within_budget
from geffect_fast.ranks import ALONE, Ranks
from geffect_fast.training.loss import Draws, Loss, RowNumbers, RowReference
from geffect_fast.training.resume import RULE_STATE, load_weights, saving, saving_folder
from geffect_fast.training.rule_losses import update_by_rule
from geffect_fast.trying import no_memory
from geffect_fast.updates import Updater


class UnlearnTrainer(Trainer):
    """transformers' Trainer, whose loss is an objective on forget rows, and retain rows beside.

    Gradients of the batches of an update add up to the gradient of the objective on all of its rows
    together: means are taken over the update, not over its batches. Several ranks share out the
    batches, add up gradients, and each takes the same step; inside `single_process`.

    Args:
        model: a causal language model of transformers.
        args: the Trainer's.
        loss: what is descended on.
        draws: which rows each update reads.
        reference: None where the objective needs none.
        identity: of the run, for its checkpoints.
        updater: applies an update rule to the gradients; None: they are the update.
        callbacks: of transformers.
        ranks: who train together; the first of them saves.
        shards: of a model whose parameters they share out; None: each has them all.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loss: Loss,
        draws: Draws,
        reference: RowReference | None,
        identity: str = "",
        updater: Updater | None = None,
        callbacks: Sequence[Any] = (),
        ranks: Ranks = ALONE,
        shards: Shards | None = None,
    ) -> None:
        self.shards = shards
        self._summed: SummedBackwards | None = None
        if shards is not None:
            shards.rest()
            trained = [p for p in model.parameters() if p.requires_grad]
            self._summed = SummedBackwards(shards, trained, lambda x: self.accelerator.backward(x))
        self._saves = False
        self._saved: dict[str, Any] | None = None
        self.loss = replace(loss, pieces=ranks.size * -(-loss.pieces // ranks.size))
        self.ranks = ranks
        self.reference = reference
        self.identity = identity
        self.updater = updater
        self.budget = TokenBudget(loss.token_budget)
        super().__init__(
            model,
            args,
            train_dataset=draws,
            data_collator=lambda updates: updates[0],
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)

    def training_step(
        self, model: nn.Module, inputs: RowNumbers, num_items_in_batch: Any = None
    ) -> Tensor:
        """The gradient of one update, added to the parameters' `.grad`; returns the loss.

        Raises:
            NonFiniteError: the loss is not finite.
            OutOfMemoryError: a batch does not fit.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # of optimizers without a schedule
        with self._own_dropout(), within_budget(self.budget):
            total = self._update(model, inputs)
        if not isfinite(total):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss of {self.loss.objective} is {total}; "
                "try a smaller --learning-rate, --trainer max_grad_norm=1, or --dtype float32"
            )
        return torch.tensor(total, device=self.args.device)

    @contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """Inside, each of several ranks draws its own random numbers, of the seed and the step.

        So a resumed run draws what it would have drawn with as many ranks, and behind it all ranks
        draw alike.
        """
        if self.ranks.size == 1:
            yield
            return
        device, state = self.args.device, [self.args.seed, self.state.global_step, self.ranks.rank]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence(state).generate_state(1)[0]))
            yield

    def _update(self, model: nn.Module, rows: RowNumbers) -> float:
        """The loss of an update; where memory runs out, all of it is redone in smaller batches.

        A backward that stops half way has added to some gradients and not to others, so they begin
        anew. Where there were gradients before, that cannot be, and the lack of memory is an error.
        """
        if self.updater is not None:
            return update_by_rule(self, self.updater, model, rows)
        if self.shards is not None:
            passes = replace(self.loss, token_budget=self.budget.tokens).passes(rows)
            return self.descend_in_step(model, rows, passes, self.loss)
        parameters = list(model.parameters())
        begins = all(p.grad is None for p in parameters)
        if not self.ranks.first:
            for p in parameters:  # what is there already counts once
                p.grad = None
        while True:
            passes = replace(self.loss, token_budget=self.budget.tokens).passes(rows)
            own = [dealt(each, self.ranks, in_step=False) for each in passes]
            shares: list[float] = []
            missing = 0
            for data_pass, batch in [(each, batch) for each in own for batch in each.batches]:
                attempt = Attempt(batch, self.budget if begins else None)
                with attempt:
                    shares.append(self.descend(model, rows, data_pass, batch, self.loss))
                if attempt.failed:
                    missing = batch.total_tokens
                    break
            missing = max(self.ranks.meet(missing))
            if not missing:
                return self.add_up(sum(shares))
            for p in parameters:
                p.grad = None
            self.budget.halve(missing)

    def descend_in_step(
        self, model: nn.Module, rows: RowNumbers, passes: Sequence[DataPass], on: Loss
    ) -> float:
        """All batches forward and backward, of a model whose parameters ranks share out.

        FSDP adds up gradients over ranks with every backward, of which each rank runs as many.

        Args:
            model, rows, on: as `descend` takes them.
            passes: of `on.passes(rows)`.

        Returns:
            The loss of all ranks' batches, whose gradient is added to `.grad`.
        """
        value = 0.0
        with self.adding_up():
            for data_pass in [dealt(each, self.ranks, in_step=True) for each in passes]:
                for at, batch in enumerate(data_pass.batches):
                    idle = at >= len(data_pass.batches) - data_pass.idle
                    value += self.descend(model, rows, data_pass, batch, on, idle=idle)
        return sum(self.ranks.meet(value))

    def adding_up(self) -> AbstractContextManager[None]:
        """Inside, `backward` is called for one sum of gradients; all ranks enter and leave it."""
        return nullcontext() if self._summed is None else self._summed.adding_up()

    def backward(self, loss: Tensor, *, idle: bool = False) -> None:
        """One backward, where a loss depends on what is trained.

        Args:
            loss: a scalar.
            idle: as of `descend`.
        """
        if self._summed is not None:
            self._summed.backward(loss, idle=idle)
        elif loss.requires_grad:  # else it reads layers below everything that can be trained
            self.accelerator.backward(loss)

    def add_up(self, value: float) -> float:
        """The sum of what ranks have found, and in `.grad` the sums of their gradients.

        Args:
            value: this rank's share in a loss, whose gradient stands in `.grad`.

        Raises:
            GEffectError: a rank lacks memory for it, of which smaller batches need no less.
        """
        if self.ranks.size == 1:
            return value
        try:
            return self._added_up(value)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, GEffectError) or not no_memory(error):
                raise
            raise GEffectError(
                "out of memory where ranks add up their gradients, which takes as much whatever "
                "the batches are; train an adapter (lora_rank), or share out the model "
                "(--shard fsdp)"
            ) from error

    def _added_up(self, value: float) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        told = self.ranks.meet((value, [p.grad is not None for p in parameters]))
        # Where a rank's rows do not reach a weight, others' may: an expert among many.
        reached = map(any, zip(*(there for _, there in told), strict=True))
        summed = [p for p, there in zip(parameters, reached, strict=True) if there]
        for p in summed:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        self.ranks.add_up([p.grad for p in summed if p.grad is not None])
        return sum(value for value, _ in told)

    def descend(
        self,
        model: nn.Module,
        rows: RowNumbers,
        data_pass: DataPass,
        batch: Batch,
        on: Loss,
        *,
        idle: bool = False,
    ) -> float:
        """One batch forward and backward; its share in a loss.

        Args:
            model: as the Trainer calls it.
            rows: of the update.
            data_pass, batch: of `on.passes(rows)`.
            on: the loss.
            idle: whether the batch is run for other ranks' sake alone, and counts for nothing.
        """
        moved = batch.to(self.args.device)
        # What is computed again in the backward (gradient checkpointing) needs the attention too.
        with packed_attention(model, moved), self.compute_loss_context_manager():
            outputs = model_outputs(model, moved, data_pass.needs)
            other = None
            if self.reference is not None:
                other = self.reference.outputs(data_pass, rows, batch, moved)
            loss = on.value(data_pass, outputs, moved, other)
            loss = 0 * loss if idle else loss
            self.backward(loss, idle=idle)
        return float(loss.detach())

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """As the Trainer's; of what ranks share out its state is whole where it is saved."""
        if self.shards is None or self.optimizer is not None:
            return super().create_optimizer(*args)
        made = super().create_optimizer(*args)
        made.register_state_dict_post_hook(self._whole_state)
        made.register_load_state_dict_pre_hook(_own_state)
        return made

    def _whole_state(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        if not self._saves:  # accelerate reads it too, on each rank its own
            return state
        return state | {
            "state": {i: whole_values(of, self.ranks) for i, of in state["state"].items()}
        }

    def whole_weights(self) -> dict[str, Any] | None:
        """The weights to be saved, on the first of ranks that share them out; all of them call it.

        Returns:
            Of an adapter its own. None where the model has them.
        """
        if self.shards is None:
            return None
        self.shards.rest()
        state = self.model.state_dict()
        if hasattr(self.model, "peft_config"):
            import peft

            kept = peft.get_peft_model_state_dict(self.model, dict(zip(state, state, strict=True)))
            state = {name: state[name] for name in kept.values()}
        return whole_values(state, self.ranks)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint to resume from, whole or not there; the first rank writes it.

        Raises:
            UnfinishedError: the disk refuses.
        """
        run, step = Path(self.args.output_dir), self.state.global_step
        rule_state = None if self.updater is None else self.updater.state_dict()
        self._saved, self._saves = self.whole_weights(), True
        try:
            if not self.ranks.first:
                if self.shards is not None:
                    self.optimizer.state_dict()  # in which it has a part
                return
            with saving(run, step, self.identity):
                super()._save_checkpoint(model, trial)
                if rule_state is not None:
                    folder = saving_folder(run) / f"checkpoint-{step}"
                    torch.save(rule_state, folder / RULE_STATE)
        except (OSError, RuntimeError, SafetensorError) as error:  # all of them say: disk full
            reason = getattr(error, "strerror", None) or error
            raise UnfinishedError(
                f"checkpoint of step {step} in {run} cannot be written: {reason}; free some space "
                "and go on with --resume"
            ) from error
        finally:
            self._saved, self._saves = None, False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, self._saved if state_dict is None else state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return str(saving_folder(Path(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and self.updater is not None:
                state = torch.load(Path(checkpoint) / RULE_STATE, map_location="cpu")
                self.updater.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: transformers would count the tokens of one input."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def _own_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What this rank holds of a whole optimizer's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        i: {
            key: part_of(value, parameters[i])
            if isinstance(value, Tensor) and value.shape == parameters[i].shape
            else value
            for key, value in of.items()
        }
        for i, of in state["state"].items()
    }
    return state | {"state": own}


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """A checkpoint's states being loaded, which fail in many ways where they are none.

    Raises:
        InputError: they do.
    """
    try:
        yield
    except InputError:  # of a rule, which says what is wrong
        raise
    except Exception as error:
        reason = in_one_line(error, 120)
        raise InputError(
            f"checkpoint {checkpoint}: its optimizer.pt, scheduler.pt, rng_state.pth or "
            f"{RULE_STATE} cannot be loaded ({reason}); remove the folder to train again from what "
            "is before it"
        ) from error
