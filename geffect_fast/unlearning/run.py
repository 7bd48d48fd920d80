"""An unlearning run: what is checked and prepared before anything is written, and the training."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.data import Layout
from geffect_fast.engines.layout import choose_layout, longest_sequence
from geffect_fast.errors import GEffectError, InputError, NonFiniteError
from geffect_fast.objectives import Objective
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.runs.arguments import (
    check_model,
    check_needs_no_refusals,
    check_needs_no_weights,
    read_sets,
    reference_for,
    resolved_list,
    resolved_risk,
)
from geffect_fast.runs.models import quiet_transformers
from geffect_fast.runs.probe import Probe, run_identity
from geffect_fast.runs.profiler import Profiler
from geffect_fast.runs.progress import progress_bar
from geffect_fast.runs.steps import StepStore
from geffect_fast.runs.store import STEPS
from geffect_fast.runs.unlearn_config import Training
from geffect_fast.unlearning.checkpoints import check_whole, checkpoints
from geffect_fast.unlearning.probe_rows import choose_rows

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.unlearning.watch import Told

ROWS_AN_UPDATE = 32
"""Forget rows an update reads where nobody says."""

SAME_NUMBERS = {"save_every", "keep_checkpoints"}
"""Fields of `Training` that change no number of a run."""


class Unlearning:
    """A run that is checked and prepared; nothing is written before `train`.

    Attributes:
        model: what is trained: the model, or an adapter around it.
        training: how.
        sets: the data sets, whole.
        rows: which of them a probe measures.
        profiler: measures.
        identity: what makes a step or checkpoint belong to this run.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        training: Training,
        *,
        objective: str | Objective,
        objectives: Sequence[str | Objective],
        sources: Mapping[str, Any],
        reference_model: nn.Module | str | Path | None,
        measuring: Mapping[str, Any],
        reading: Mapping[str, Any],
        trust_remote_code: bool = False,
    ) -> None:
        from geffect_fast.unlearning.adapters import with_adapter
        from geffect_fast.unlearning.arguments import check_precision, training_arguments
        from geffect_fast.unlearning.training import Loss

        measured = resolved_list([objective, *objectives])
        parts = list(dict.fromkeys(part for o in measured for _, part in o.parts()))
        needs = {need for part in parts for need in part.needs}
        self.tokenizer = tokenizer
        self.sets = sets = read_sets(
            tokenizer,
            **sources,
            alternatives=any("alternative" in part.roles for part in parts),
            **reading,
            model=model,
        )
        if not sets["forget"].has_alternatives:
            check_needs_no_refusals(measured)
        if not sets["forget"].has_weights:
            check_needs_no_weights(measured)
        check_model(model, sets)
        self.training = training = self._with_sizes(training)
        self.device = next(model.parameters()).device
        training_arguments(training, ".", str(self.device))  # to have them checked
        check_precision(training, model)
        reference = reference_for(reference_model, needs, model, sets, trust_remote_code)
        if needs & REFERENCE_NEEDS and reference is None:
            reference = _as_it_is(model, shares=training.lora_rank is not None)
        if training.lora_rank is not None:
            torch.manual_seed(training.seed)
            model = with_adapter(model, training)
        self.model: Any = model
        trained = [part for _, part in measured[0].parts()]
        self.rows = choose_rows(
            sets,
            training.probe_rows,
            trained=trained,
            measured=parts,
            risk=resolved_risk(measuring["risk"]),
            rows_an_update=self._rows_an_update(trained),
            norms=measuring["norms"] is not False,
            resolve=measuring["resolve"],
            engine=measuring["engine"],
        )
        part_of = {name: sets[name].part(rows) for name, rows in self.rows.rows.items()}
        self.profiler = Profiler(
            model,
            tokenizer,
            forget=part_of.pop("forget"),
            retain=part_of.pop("retain"),
            probes=part_of,
            objectives=measured,
            reference_model=reference,
            date=reading["date"],
            **measuring,
        )
        layout: Layout = self.profiler.settings["layout"]
        if layout == "packed":  # rows that are not probed may be longer
            longest = max(map(longest_sequence, sets.values()))
            layout = choose_layout(self.profiler.plan, sets["forget"], longest)
        self.loss = Loss(
            measured[0],
            sets,
            self.profiler.token_budget,
            layout,
            measuring["reduction"],
            training.accumulation,
        )
        self._reference = reference
        decides = training.model_dump(mode="json", exclude=SAME_NUMBERS)
        decides["probe_rows"] = self.rows.rows  # whether they were chosen here or by the user
        self.identity = run_identity(self.profiler, sets, training=decides)

    def train(
        self,
        folder: Path | None,
        *,
        progress: bool = False,
        told: Told | None = None,
    ) -> xr.Dataset:
        """Train from the last complete checkpoint in the folder, or from the beginning.

        Args:
            folder: of the run; None: results stay in memory, and nothing can be resumed.
            progress: show a bar.
            told: of every probe.

        Returns:
            All probes along the axis `step`.
        """
        from geffect_fast.integrations import GEffectCallback
        from geffect_fast.unlearning.arguments import refused, training_arguments
        from geffect_fast.unlearning.training import Draws, RowReference, UnlearnTrainer
        from geffect_fast.unlearning.watch import Watch

        training = self.training
        store = StepStore(None if folder is None else folder / STEPS, self.identity)
        saved = {} if folder is None else checkpoints(folder, self.identity)
        if saved:
            check_whole(saved[max(saved)])
            self._check_steps(store, saved[max(saved)], max(saved))
        probe = Probe(
            self.profiler,
            store,
            trained=str(self.loss.objective),
            forget_rows=len(self.sets["forget"]),
        )
        live = GEffectCallback.of(probe, training.probe_every)
        sizes = self._rows_an_update([part for _, part in self.loss.objective.parts()])
        needs = {need for part in self.loss.parts for need in part.needs}
        reference = None
        if needs & REFERENCE_NEEDS and self._reference is not None:
            reference = RowReference(self._reference, self.loss)
        self._reference = None  # the profiler lets go of it as well, where it can
        with (
            progress_bar(progress, f"unlearning, {self.loss.objective}", training.steps) as show,
            only_weights_change(self.model),
        ):
            try:
                trainer = UnlearnTrainer(
                    self.model,
                    training_arguments(training, folder or ".", str(self.device)),
                    loss=self.loss,
                    draws=Draws(
                        {name: (len(self.sets[name]), count) for name, count in sizes.items()},
                        training.steps,
                        training.seed,
                    ),
                    reference=reference,
                    identity=self.identity,
                    callbacks=[
                        live,
                        Watch(
                            probe,
                            folder=folder,
                            save_every=training.save_every or training.probe_every,
                            keep=training.keep_checkpoints,
                            told=told or (lambda step, dataset: None),
                            tick=lambda step: show(completed=step),
                        ),
                    ],
                )
                trainer.create_optimizer_and_scheduler(training.steps)
            except GEffectError:
                raise
            except Exception as error:  # of many kinds, from transformers, torch and reporters
                raise refused(training, error) from error
            self._until_done(trainer, saved[max(saved)] if saved else None)
        assert live.result is not None
        return live.result.assign_attrs(self.attributes())

    def _check_steps(self, store: StepStore, checkpoint: Path, done: int) -> None:
        """Raise `InputError` where a step is lost that training would go on behind."""
        ends = [done] if done == self.training.steps else []
        for step in [*range(0, done + 1, self.training.probe_every), *ends]:
            store.check_free([step])
            if step not in store.steps:
                raise InputError(
                    f"{store.where}: step {step} is missing, and {checkpoint.name} is behind it; "
                    "put its file back, or remove that folder to train again"
                )

    def attributes(self) -> dict[str, Any]:
        """What a result says of its run."""
        return {
            "command": "unlearn",
            "probe_cost": self.rows.cost,
            "probe_rows": json.dumps({name: list(rows) for name, rows in self.rows.rows.items()}),
            "training": json.dumps(
                self.training.model_dump(mode="json", exclude={*SAME_NUMBERS, "probe_rows"})
            ),
        }

    def _until_done(self, trainer: Any, checkpoint: Path | None) -> None:
        """The Trainer's loop, with errors that say which step it was."""
        try:
            with quiet_transformers():
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except NonFiniteError as error:
            said = str(error)
            if said.startswith("step "):
                raise
            raise NonFiniteError(
                f"step {trainer.state.global_step}: {said.partition(';')[0]}; the training made it "
                "so: try a smaller --learning-rate, or --dtype float32"
            ) from error

    def _with_sizes(self, training: Training) -> Training:
        """The training with its batch size decided, and checked against the data."""
        n = len(self.sets["forget"])
        size = training.batch_size or max(min(ROWS_AN_UPDATE, n) // training.accumulation, 1)
        if size * training.accumulation > n:
            times = "" if training.accumulation == 1 else f" times {training.accumulation}"
            raise InputError(
                f"batch_size: {size}{times} is more than the {n} rows of forget; give fewer"
            )
        return training.model_copy(update={"batch_size": size})

    def _rows_an_update(self, trained: Sequence[Objective]) -> dict[str, int]:
        """How many rows of each data set an update reads."""
        training = self.training
        assert training.batch_size is not None
        rows = {"forget": training.batch_size * training.accumulation}
        if any(part.on == "retain" for part in trained):
            retain = training.retain_batch_size or training.batch_size
            rows["retain"] = retain * training.accumulation
        return rows


def _as_it_is(model: nn.Module, shares: bool) -> nn.Module:
    """A frozen copy of a model; with `shares` its parameters, which will not change, are shared."""
    memo = {id(p): p for p in model.parameters()} if shares else {}
    reference = copy.deepcopy(model, memo)
    return reference if shares else reference.requires_grad_(False)


@contextmanager
def only_weights_change(model: nn.Module) -> Iterator[None]:
    """Training that leaves the model's modes, config and forward as they were; in eval mode."""
    from accelerate.utils import extract_model_from_parallel

    config = getattr(model, "config", None)
    uses_cache = getattr(config, "use_cache", None)
    device = next(model.parameters()).device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        extract_model_from_parallel(model, keep_fp32_wrapper=False)  # autocast in its forward
        for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            if callable(getattr(model, name, None)):  # transformers 5 renamed it on its way
                getattr(model, name)()
                break
        if config is not None:
            config.use_cache = uses_cache
        model.eval()
