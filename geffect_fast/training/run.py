"""An unlearning run: its preparation, before anything is written, and its training."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.capture.compat import check_is_model, is_sharded
from geffect_fast.capture.shards import at_work
from geffect_fast.data import Layout
from geffect_fast.engines.known_models import choose_layout
from geffect_fast.engines.layout import longest_sequence
from geffect_fast.errors import GEffectError, InputError, NonFiniteError
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.measure.prepare import prepare
from geffect_fast.measure.profiler import Profiler
from geffect_fast.measure.sources import Sources, needs_of, parts_of, read_sources, resolved_list
from geffect_fast.objectives import Objective
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.settings import LiveMetrics, Measuring, Reading
from geffect_fast.steps.live_measures import LiveMeasures
from geffect_fast.steps.probe import Probe, run_identity
from geffect_fast.storage.run_folder import STEPS
from geffect_fast.storage.step_store import StepStore
from geffect_fast.terminal import progress_bar
from geffect_fast.training.probe_rows import choose_rows
from geffect_fast.training.resume import check_whole, checkpoints
from geffect_fast.training.rule_losses import protected_part, updater_of
from geffect_fast.training.single_process import single_process
from geffect_fast.unlearn_settings import Training

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.training.watch import OnProbe

ROWS_AN_UPDATE = 32
"""Forget rows that an update reads where no batch size is given."""

SAME_NUMBERS = {"save_every", "keep_checkpoints", "report_to", "shard"}
"""Fields of an unlearning config that change no number of a run."""

IN_PARTS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers, by their names in transformers, that step each element of a weight by itself."""

TRAINING_TENSORS = 3
"""Tensors as large as a trained weight beside the weight: its gradient and Adam's two states."""


class Unlearning:
    """An unlearning run that is checked and prepared; nothing is written before `train`.

    Several ranks may make the same run and train together. They then share out the rows of updates
    and of probes.

    Attributes:
        model: the module that is trained: the model, or an adapter around it.
        training: settings of the training.
        sets: the whole data sets.
        rows: the rows of the data sets that a probe measures.
        profiler: measures the effects at a probe.
        identity: a digest by which a step or a checkpoint is known to belong to this run.
        cost: cost of the updates so far.
        whole_weights: whole weights of a trained model that ranks share out, on the first of them;
            None before training, and where ranks do not share out the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        training: Training,
        *,
        objectives: Sequence[str | Objective],
        sources: Sources,
        settings: Measuring,
        reference_model: nn.Module | str | Path | None,
        live: LiveMetrics,
        holdout: Any = None,
        retain_model: nn.Module | str | Path | None = None,
    ) -> None:
        from geffect_fast.training.adapters import with_adapter
        from geffect_fast.training.cost import TrainingCost
        from geffect_fast.training.loss import Loss
        from geffect_fast.training.trainer_arguments import check_precision, training_arguments

        measured = resolved_list(objectives)
        check_is_model(model, "model")
        sources = read_sources(sources, measured, settings.data_format)
        self.device = next(model.parameters()).device
        sized = training.model_copy(update={"batch_size": training.batch_size or 1})
        with single_process(self.device):
            training_arguments(sized, ".", self.device)  # only to check them
        check_precision(training, model)
        shared_out = is_sharded(model)
        if shared_out:
            _check_serves_shards(model, training)
        prepared = prepare(model, tokenizer, sources, measured, settings, reference_model)
        # A row of plain text counts as many rows as it has windows.
        self.training = training = with_batch_size(training, len(prepared.sets["forget"]))
        self.tokenizer, self.sets = tokenizer, prepared.sets
        if prepared.compares and prepared.reference is None:
            if shared_out:
                raise InputError(
                    f"reference_model: '{measured[0]}' compares with the model before training, of "
                    "which no copy is made where FSDP shares it out; give its folder (--reference)"
                )
            shares = training.lora_rank is not None
            prepared = replace(prepared, reference=_as_it_is(model, shares))
        if training.lora_rank is not None and not shared_out:
            model = with_adapter(model, training)
        self.model: Any = model
        self._updater = updater_of(training, model)
        trained = self._trained_on(measured[0])
        if self._updater is not None:
            self._updater.check_rows(self._rows_an_update(trained).get("retain", 0))
        self.rows = choose_rows(
            self.sets,
            training.probe_rows,
            trained=trained,
            measured=prepared.parts,
            settings=settings,
            rows_an_update=self._rows_an_update(trained),
        )
        self.profiler = Profiler(replace(prepared.of_rows(self.rows.rows), model=model))
        self.ranks = self.profiler.ranks
        layout: Layout = self.profiler.attributes["layout"]
        if layout == "packed":  # rows that are not probed may be longer
            longest = max(map(longest_sequence, self.sets.values()))
            with self.ranks.in_step(shared_out), at_work(model):
                layout = choose_layout(self.profiler.plan, self.sets["forget"], longest)
            self.ranks.check_same({"layout": layout})
        self.loss = Loss(
            measured[0],
            self.sets,
            self.profiler.token_budget,
            layout,
            settings.reduction,
            training.accumulation,
        )
        self.cost = TrainingCost()
        self.whole_weights: dict[str, Any] | None = None
        self._reference = prepared.reference
        self._measures = None
        if live.evaluates:
            budget = {"token_budget": self.profiler.token_budget}
            self._measures = LiveMeasures(
                model,
                tokenizer,
                sources.sets,
                live,
                Reading(**settings.fields(Reading) | budget),
                holdout=holdout,
                reference_model=reference_model,
                retain_model=retain_model,
            )
        decides = training.model_dump(mode="json", exclude=SAME_NUMBERS)
        decides["probe_rows"] = self.rows.rows  # whether they were chosen here or by the user
        if self._measures is not None:
            decides["measures"] = self._measures.identity
        self.identity = run_identity(self.profiler, self.sets, training=decides)
        self.ranks.check_same({"training": str(decides), "updates": self.identity})

    def train(
        self,
        folder: Path | None,
        *,
        progress: bool = False,
        on_probe: OnProbe | None = None,
    ) -> xr.Dataset:
        """Train from the last complete checkpoint in the folder, or from the beginning.

        Args:
            folder: folder of the run, which the first rank writes and all ranks see; None: results
                stay in memory, and nothing can be resumed.
            progress: show a bar.
            on_probe: called after every probe.

        Returns:
            All probes along the axis `step`.
        """
        from geffect_fast.steps.callback import GEffectCallback
        from geffect_fast.training.logs import logged
        from geffect_fast.training.loss import Draws, RowReference
        from geffect_fast.training.trainer import UnlearnTrainer
        from geffect_fast.training.trainer_arguments import refused, training_arguments
        from geffect_fast.training.watch import Watch

        training, ranks = self.training, self.ranks
        store = StepStore(None if folder is None else folder / STEPS, self.identity, ranks)
        saved = checkpoints(folder, self.identity) if folder is not None and ranks.first else {}
        if saved:
            check_whole(saved[max(saved)])
            self._check_steps(store, saved[max(saved)], max(saved))
        saved = ranks.first_of(saved)
        probe = Probe(
            self.profiler,
            store,
            trained=str(self.loss.objective),
            second_order=training.second_order,
            forget_rows=len(self.sets["forget"]),
            measures=self._measures,
        )
        live = GEffectCallback.of(probe, training.probe_every)
        sizes = self._rows_an_update(self._trained_on(self.loss.objective))
        needs = needs_of(self.loss.parts)
        shards = self.profiler.plan.shards
        with (
            progress_bar(
                progress and ranks.first, f"unlearning, {self.loss.objective}", training.steps
            ) as show,
            single_process(self.device),
            ranks.in_step(shards is not None),
            at_work(self.model),
            only_weights_change(self.model),
        ):
            reference = None
            if needs & REFERENCE_NEEDS and self._reference is not None:
                reference = RowReference(self._reference, self.loss, ranks)
            self._reference = None  # the profiler drops it too, where it can
            try:
                trainer = UnlearnTrainer(
                    self.model,
                    training_arguments(training, folder or ".", self.device, reports=ranks.first),
                    loss=self.loss,
                    draws=Draws(
                        {name: (len(self.sets[name]), count) for name, count in sizes.items()},
                        training.steps,
                        training.seed,
                    ),
                    reference=reference,
                    identity=self.identity,
                    updater=self._updater,
                    callbacks=[
                        self.cost,
                        live,
                        Watch(
                            probe,
                            folder=folder,
                            removes=ranks.first,
                            save_every=training.save_every or training.probe_every,
                            keep=training.keep_checkpoints,
                            on_probe=on_probe or (lambda step, dataset: None),
                            tick=lambda step: show(completed=step),
                        ),
                    ],
                    ranks=ranks,
                    shards=shards,
                )
                trainer.create_optimizer_and_scheduler(training.steps)
                if self._updater is not None:
                    self._updater.check(trainer.optimizer)
            except GEffectError:
                raise
            except Exception as error:  # of many kinds, from transformers, torch and reporters
                raise refused(training, error) from error
            with logged(folder, trainer, max(saved, default=None)):
                self._until_done(trainer, saved[max(saved)] if saved else None)
            if folder is not None:
                self.whole_weights = trainer.whole_weights()
        assert live.result is not None
        ranks.meet()  # all ranks have read the steps; the first may move them now
        return live.result.assign_attrs(self.attributes())

    def _check_steps(self, store: StepStore, checkpoint: Path, done: int) -> None:
        """Raise `InputError` where the result of a step up to the checkpoint is lost."""
        ends = [done] if done == self.training.steps else []
        for step in [*range(0, done + 1, self.training.probe_every), *ends]:
            store.check_free([step])
            if step not in store.steps:
                raise InputError(
                    f"{store.where}: step {step} is missing, and {checkpoint.name} is behind it; "
                    "put its file back, or remove that folder to train again"
                )

    def attributes(self) -> dict[str, Any]:
        """Attributes of the result that describe the run."""
        return {
            "command": "unlearn",
            "probe_cost": self.rows.cost,
            "probe_rows": json.dumps({name: list(rows) for name, rows in self.rows.rows.items()}),
            "training": json.dumps(
                self.training.model_dump(mode="json", exclude={*SAME_NUMBERS, "probe_rows"})
            ),
        }

    def _until_done(self, trainer: Any, checkpoint: Path | None) -> None:
        """Run the Trainer's loop, and name the step in its errors."""
        try:
            with quiet_transformers():
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except NonFiniteError as error:
            if error.told or error.step is not None:
                raise
            raise NonFiniteError(
                error.problem,
                remedy="the training made it so: try a smaller --learning-rate, or --dtype float32",
                step=trainer.state.global_step,
            ) from error

    def _trained_on(self, objective: Objective) -> list[Objective]:
        """The parts that an update reads rows for: those of the objective and of its rule."""
        parts = parts_of([objective])
        protected = self._updater and protected_part(self._updater.rule, objective)
        return [*parts, protected] if protected else parts

    def _rows_an_update(self, trained: Sequence[Objective]) -> dict[str, int]:
        """Number of rows of each data set that an update reads."""
        training = self.training
        assert training.batch_size is not None
        rows = {"forget": training.batch_size * training.accumulation}
        if any(part.on == "retain" for part in trained):
            retain = training.retain_batch_size or training.batch_size
            rows["retain"] = retain * training.accumulation
        return rows


def with_batch_size(training: Training, n_forget: int) -> Training:
    """The training with its batch size decided, and checked against the number of forget rows."""
    size = training.batch_size or max(min(ROWS_AN_UPDATE, n_forget) // training.accumulation, 1)
    if size * training.accumulation > n_forget:
        times = "" if training.accumulation == 1 else f" times {training.accumulation}"
        raise InputError(
            f"batch_size: {size}{times} is more than the {n_forget} rows of forget; give fewer"
        )
    return training.model_copy(update={"batch_size": size})


def _check_serves_shards(model: nn.Module, training: Training) -> None:
    """Raise `InputError` where a setting needs weights or gradients that are whole."""
    if training.lora_rank is not None and not hasattr(model, "peft_config"):
        raise InputError(
            "lora_rank: FSDP shares out the model already; put an adapter into it before "
            "fully_shard, and leave lora_rank out"
        )
    check_steps_parts(training.optimizer)
    if training.precision == "fp16":
        raise InputError(
            "precision: fp16 looks for overflow in whole gradients, and FSDP shares out the model; "
            "use bf16, or leave it out"
        )


def check_steps_parts(optimizer: str) -> None:
    """Raise `InputError` where an optimizer may step a part of a weight unlike a whole weight."""
    if optimizer not in IN_PARTS:
        raise InputError(
            f"optimizer: {optimizer} is not known to step parts of weights as it steps whole ones, "
            f"and FSDP shares out the model; use one of {', '.join(IN_PARTS)}"
        )


def _as_it_is(model: nn.Module, shares: bool) -> nn.Module:
    """A frozen copy of a model; with `shares` a copy around the model's own parameters.

    Parameters are shared only where they will not change, which is so under an adapter.
    """
    memo = {id(p): p for p in model.parameters()} if shares else {}
    reference = copy.deepcopy(model, memo)
    return reference if shares else reference.requires_grad_(False)


@contextmanager
def only_weights_change(model: nn.Module) -> Iterator[None]:
    """Restore the model's modes, config and forward after a training, and put it in eval mode."""
    from accelerate.utils import extract_model_from_parallel

    config = getattr(model, "config", None)
    uses_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)  # takes autocast off
        for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            if callable(getattr(model, name, None)):  # transformers 5 renamed it
                getattr(model, name)()
                break
        if config is not None:
            config.use_cache = uses_cache
        model.eval()
