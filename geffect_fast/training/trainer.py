"""Training on an unlearning objective: transformers' Trainer with packed batches and our losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import Shards, part_of, whole_values
from geffect_fast.data import Layout, SampleSet, make_batches
from geffect_fast.data.batch import Batch, Reduction, Role
from geffect_fast.data.packing import token_places
from geffect_fast.engines.batches import (
    Attempt,
    DataPass,
    TokenBudget,
    dealt,
    each_batch,
    passes_for,
)
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.errors import InputError, NonFiniteError, UnfinishedError, in_one_line
from geffect_fast.measure.memory import within_budget
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.ranks import ALONE, Ranks
from geffect_fast.training.resume import RULE_STATE, load_weights, saving, saving_folder
from geffect_fast.training.rule_losses import update_by_rule
from geffect_fast.updates import Updater

RowNumbers = Mapping[str, Sequence[int]]
"""RowNumbers of an update, by data set."""


class Draws(Dataset[RowNumbers]):
    """Which rows each update reads: every row once, in random order, then all over again.

    They follow from the seed and the number of the update, so that a run that is resumed reads what
    it would have read.

    Args:
        sizes: by data set the number of its rows, and how many an update reads.
        n_updates: of the run.
        seed: of the order.
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
    """What a training step descends on, and how its rows become batches.

    Attributes:
        objective: the objective.
        sets: the data sets by name, whole.
        token_budget: tokens a batch; a larger update is several, whose gradients add up exactly.
        layout: of the batches.
        reduction: over what means are taken, within the rows of an update.
        pieces: batches an update is cut into at least.
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
        """The data sets that it reads; the forget set first."""
        on = {part.on for part in self.parts}
        return ["forget", *(["retain"] if "retain" in on else [])]

    def passes(self, rows: RowNumbers) -> list[DataPass]:
        """The batches of an update, and which parts of the objective read them.

        Samples are numbered as in `rows`, in which one may come twice.
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
        """The share of a batch in the objective, a scalar, differentiable."""
        shares = [
            coefficient * part.loss(outputs, batch, reference)
            for coefficient, part in self.objective.parts()
            if part in data_pass.parts.values()
        ]
        return torch.stack([share.double() for share in shares]).sum()


class RowReference:
    """What the reference model says of any rows: log-probabilities are computed once and kept.

    Only for logits and hidden states, whose size forbids that, the model is kept. Ranks share out
    the rows, and each keeps what all have found.

    Args:
        model: the reference.
        loss: says what is needed of it.
        ranks: who train.
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
        """The reference's outputs on a batch of the update `rows`; None where nothing needs them.

        Args:
            data_pass: which parts read the batch.
            rows: of the update.
            batch: one of the pass's, on the CPU.
            moved: the same, where the model is.
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
        """Log-probabilities of every row's tokens, through its answer and its alternatives."""
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
    """Where each token of a batch stands in its samples laid end to end; -1 for extensions."""
    places = token_places(samples, batch)
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    sample = batch.sequence_sample[batch.token_sequence()]
    return torch.where(places < 0, -1, places + starts[sample])


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
        self._wholes: list[nn.Parameter] = []
        if shards is not None:
            shards.rest()
            self._wholes = [shards.whole(p) for p in model.parameters() if p.requires_grad]
        self._reached: set[int] = set()
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
        if self.ranks.size > 1:  # of their own dropout, whatever a checkpoint says of the first's
            state = [self.args.seed, self.state.global_step, self.ranks.rank]
            torch.manual_seed(int(np.random.SeedSequence(state).generate_state(1)[0]))
        with within_budget(self.budget):
            total = self._update(model, inputs)
        if not isfinite(total):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss of {self.loss.objective} is {total}; "
                "try a smaller --learning-rate, --trainer max_grad_norm=1, or --dtype float32"
            )
        return torch.tensor(total, device=self.args.device)

    def _update(self, model: nn.Module, rows: RowNumbers) -> float:
        """The loss of an update; where memory runs out, all of it is redone in smaller batches.

        A backward that stops half way has added to some gradients and not to others, so they begin
        anew. Where there were gradients before, that cannot be, and the lack of memory is an error.
        """
        if self.updater is not None:
            return update_by_rule(self, self.updater, model, rows)
        if self.shards is not None:
            return self._update_of_shards(self.shards, model, rows)
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

    def _update_of_shards(self, shards: Shards, model: nn.Module, rows: RowNumbers) -> float:
        """The loss of an update of a model whose parameters ranks share out.

        FSDP adds up gradients over ranks with every backward, of which each rank runs as many.
        """
        passes = replace(self.loss, token_budget=self.budget.tokens).passes(rows)
        own = [dealt(each, self.ranks, in_step=True) for each in passes]
        self._reached = set()
        with shards.sums():
            value = 0.0
            for data_pass in own:
                for at, batch in enumerate(data_pass.batches):
                    idle = at >= len(data_pass.batches) - data_pass.idle
                    value += self.descend(model, rows, data_pass, batch, self.loss, idle=idle)
            found = [(p, p.grad) for p in self.model.parameters() if p.requires_grad]
        reached = [id(shards.whole(p)) in self._reached for p, _ in found]
        told = self.ranks.meet((value, reached))
        for (p, grad), *there in zip(found, *(each for _, each in told), strict=True):
            p.grad = grad if any(there) else None  # else a group's other parameters were reached
        return sum(value for value, _ in told)

    def add_up(self, value: float) -> float:
        """The sum of what ranks have found, and in `.grad` the sums of their gradients.

        Args:
            value: this rank's share in a loss, whose gradient stands in `.grad`.
        """
        if self.ranks.size == 1:
            return value
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
            if self.shards is not None and loss.requires_grad:
                loss, reached = self.shards.with_zeros(0 * loss if idle else loss, self._wholes)
                self._reached |= set() if idle else reached
            if loss.requires_grad:  # else it reads layers below everything that can be trained
                self.accelerator.backward(loss)
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
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            state = {name: value for name, value in state.items() if name in trained}
        return whole_values(state, self.ranks)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint to resume from, whole or not there; the first rank writes it.

        Raises:
            UnfinishedError: the disk refuses.
        """
        run, step = Path(self.args.output_dir), self.state.global_step
        self._saved = self.whole_weights()
        if not self.ranks.first:
            if self.shards is not None:
                self.optimizer.state_dict()  # in which it has a part
            return
        try:
            with saving(run, step, self.identity):
                super()._save_checkpoint(model, trial)
                if self.updater is not None:
                    folder = saving_folder(run) / f"checkpoint-{step}"
                    torch.save(self.updater.state_dict(), folder / RULE_STATE)
        except (OSError, RuntimeError, SafetensorError) as error:  # all of them say: disk full
            reason = getattr(error, "strerror", None) or error
            raise UnfinishedError(
                f"checkpoint of step {step} in {run} cannot be written: {reason}; free some space "
                "and go on with --resume"
            ) from error
        finally:
            self._saved = None

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
