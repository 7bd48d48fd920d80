"""Training on an unlearning objective by transformers' Trainer, with packed batches."""

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
    """transformers' Trainer, whose loss is an objective on forget rows and, if read, retain rows.

    Gradients of the batches of an update add up to the gradient of the objective on all rows of the
    update together: means are taken over the update, not over its batches. Several ranks share out
    the batches and add up their gradients, and each rank takes the same step. The trainer is made
    and used inside `single_process`.

    Args:
        model: a causal language model of transformers.
        args: arguments of transformers' Trainer.
        loss: the loss that updates descend on.
        draws: the rows that each update reads.
        reference: outputs of the reference model; None where the objective needs none.
        identity: identity of the run, for its checkpoints.
        updater: applies an update rule to the gradients; None: the optimizer takes them as they
            are.
        callbacks: callbacks of transformers.
        ranks: the ranks that train together; the first of them saves.
        shards: the shards of a model whose parameters the ranks share out; None: each rank has all
            parameters.
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
        """Add the gradient of one update to the parameters' `.grad`, and return the loss.

        Raises:
            NonFiniteError: the loss is not finite.
            OutOfMemoryError: a batch does not fit.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers have modes too
        with self._own_dropout(), within_budget(self.budget):
            total = self._update(model, inputs)
        if not isfinite(total):
            raise NonFiniteError(
                f"the loss of {self.loss.objective} is {total}",
                remedy="try a smaller --learning-rate, --trainer max_grad_norm=1, or --dtype "
                "float32",
                step=self.state.global_step + 1,
            )
        return torch.tensor(total, device=self.args.device)

    @contextmanager
    def _own_dropout(self) -> Iterator[None]:
        """Let each of several ranks draw its own random numbers, from the seed and the step.

        A resumed run with as many ranks therefore draws what it would have drawn without the
        interruption. After the context all ranks draw the same numbers again.
        """
        if self.ranks.size == 1:
            yield
            return
        device, state = self.args.device, [self.args.seed, self.state.global_step, self.ranks.rank]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence(state).generate_state(1)[0]))
            yield

    def _update(self, model: nn.Module, rows: RowNumbers) -> float:
        """Add the gradient of an update to `.grad`, and return the loss.

        Where memory runs out, the whole update is redone in smaller batches. A backward that stops
        half way has added to some gradients and not to others, so all gradients are dropped first.
        Where gradients existed before the update they cannot be dropped, and the lack of memory is
        an error.
        """
        if self.updater is not None:
            return update_by_rule(self, self.updater, model, rows)
        if self.shards is not None:
            passes = replace(self.loss, token_budget=self.budget.tokens).passes(rows)
            return self.descend_in_step(model, rows, passes, self.loss)
        parameters = list(model.parameters())
        begins = all(p.grad is None for p in parameters)
        if not self.ranks.first:
            for p in parameters:  # earlier gradients count once
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
        """Run all batches forward and backward through a model whose parameters ranks share out.

        FSDP adds up gradients over ranks with every backward, so each rank runs the same number of
        backwards.

        Args:
            model, rows, on: as `descend` takes them.
            passes: passes of `on.passes(rows)`.

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
        """A context in which all calls of `backward` make one sum of gradients, over all ranks.

        All ranks enter and leave the context together.
        """
        return nullcontext() if self._summed is None else self._summed.adding_up()

    def backward(self, loss: Tensor, *, idle: bool = False) -> None:
        """Run one backward, where the loss depends on a trained parameter.

        Args:
            loss: a scalar.
            idle: as `descend` takes it.
        """
        if self._summed is not None:
            self._summed.backward(loss, idle=idle)
        elif loss.requires_grad:  # else the loss reads only layers below the trained ones
            self.accelerator.backward(loss)

    def add_up(self, value: float) -> float:
        """Replace `.grad` by its sum over ranks, and return the sum of the ranks' values.

        Args:
            value: this rank's share of a loss, whose gradient stands in `.grad`.

        Raises:
            GEffectError: a rank lacks memory for the sum, which smaller batches would not make
                smaller.
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
        # Other ranks' rows may reach a weight that this rank's do not, such as an expert.
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
        """Run one batch forward and backward, and return its share of a loss.

        Args:
            model: the model as the Trainer calls it.
            rows: rows of the update.
            data_pass, batch: a pass of `on.passes(rows)`, and one of its batches.
            on: the loss.
            idle: whether the batch only keeps this rank in step with others, and counts as 0.
        """
        moved = batch.to(self.args.device)
        # Gradient checkpointing computes layers again in the backward, with the same attention.
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
        """Make the Trainer's optimizer; where ranks share out the model, it saves whole states."""
        is_new = self.optimizer is None
        made = super().create_optimizer(*args)
        if is_new and self.shards is not None:
            made.register_state_dict_post_hook(self._whole_state)
            made.register_load_state_dict_pre_hook(_own_state)
        return made

    def _whole_state(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        if not self._saves:  # accelerate reads each rank's own part
            return state
        return state | {
            "state": {i: whole_values(of, self.ranks) for i, of in state["state"].items()}
        }

    def whole_weights(self) -> dict[str, Any] | None:
        """The weights to save of a model that ranks share out; all ranks call this method.

        Returns:
            On the first rank the whole weights, of an adapter its own alone; on the others an
            empty dict. None where ranks do not share out the model.
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
        """Write a checkpoint to resume from, completely or not at all; the first rank writes it.

        Raises:
            UnfinishedError: the disk refuses.
        """
        run, step = Path(self.args.output_dir), self.state.global_step
        rule_state = None if self.updater is None else self.updater.state_dict()
        self._saved, self._saves = self.whole_weights(), True
        try:
            if not self.ranks.first:
                if self.shards is not None:
                    self.optimizer.state_dict()  # all ranks take part
                return
            with saving(run, step, self.identity):
                super()._save_checkpoint(model, trial)
                if rule_state is not None:
                    folder = saving_folder(run) / f"checkpoint-{step}"
                    torch.save(rule_state, folder / RULE_STATE)
        except (OSError, RuntimeError, SafetensorError) as error:  # each may mean a full disk
            reason = getattr(error, "strerror", None) or error
            raise UnfinishedError(
                f"checkpoint of step {step} in {run} cannot be written: {reason}",
                remedy="free some space and go on with --resume",
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
        """0, since transformers would count the tokens of one input."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def _own_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of the whole state of an optimizer."""
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
    """Turn any error in loading the states of a checkpoint into an `InputError`.

    Raises:
        InputError: a state cannot be loaded.
    """
    try:
        yield
    except InputError:  # from an update rule, with its own message
        raise
    except Exception as error:
        reason = in_one_line(error, 120)
        raise InputError(
            f"checkpoint {checkpoint}: its optimizer.pt, scheduler.pt, rng_state.pth or "
            f"{RULE_STATE} cannot be loaded ({reason}); remove the folder to train again from what "
            "is before it"
        ) from error
