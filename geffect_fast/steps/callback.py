"""`GEffectCallback`: live measurement of the G-effect in any transformers `Trainer`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from geffect_fast.arguments import checked_config
from geffect_fast.capture.compat import is_sharded
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.measure.profiler import Profiler
from geffect_fast.measure.sources import check_count, needs_of, parts_of, resolved_list
from geffect_fast.objectives import Objective
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.ranks import ALONE, here
from geffect_fast.settings import LiveMetrics, Reading
from geffect_fast.steps.at_rest import at_rest
from geffect_fast.steps.live_measures import LiveMeasures, live_metrics
from geffect_fast.steps.probe import Probe, run_identity
from geffect_fast.steps.reporting import logged_values, report
from geffect_fast.steps.training_lock import TrainingLock
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import MANIFEST, Manifest, checksums
from geffect_fast.storage.results_file import save_result
from geffect_fast.storage.run_folder import RESULTS, STEPS, check_free, own_files
from geffect_fast.storage.step_store import StepStore

if TYPE_CHECKING:
    import xarray as xr

_NAME = "GEffectCallback"

_DECIDES = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "seed", "data_seed", "bf16", "fp16"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
)
"""Training arguments that decide the weights; steps under other arguments are of another run."""


class GEffectCallback(TrainerCallback):
    """A callback that measures the G-effect while a `Trainer` trains and leaves training unchanged.

    Effects, collateral and risks of every probe go to all reporters of the Trainer's `report_to`,
    such as TensorBoard and W&B, and to its `state.log_history`, as `geffect/e_u`, `geffect/e_r`,
    `geffect/collateral`, `geffect/risk_unlearn` ... (docs/concepts.md, over the steps).

    The processes of a Trainer on several GPUs measure together: they share the rows, each has the
    result, and the first process writes. Their weights may be whole on each process (DDP), or in
    parts (FSDP2).

    Args:
        probe_sets: data by name, as `geffect_fast.profile` takes data: `forget`, `retain`, and any
            others, each a risk of its own.
        every: updates between two probes. The first probe is before training, the last at its end.
        objectives: the objectives to measure, as in `geffect_fast.profile`.
        trained: the one of `objectives` that is trained on, for `predicted_step` and
            `predicted_sgd`; None where the loss is another one.
        out: a folder for one file a step, `steps/step-00000010.nc`, and in the end `results.nc`;
            None keeps results in memory. The folder is locked for one training at a time, until
            that training ends, also by an exception. A training that is resumed from a checkpoint
            adds to the steps in the folder.
        weights: whether `token_weight` is measured too.
        tokenizer: None for the Trainer's `processing_class`.
        reference_model: the reference of NPO-like objectives; None for a copy of the model before
            training, kept for as long as it is needed.
        holdout, retain_model: further inputs of metrics, as in `geffect_fast.evaluate`; the metric
            `reference` compares with `reference_model`.
        options: further arguments of `geffect_fast.profile`, such as `resolve` or `refusals`; and
            `metrics`, `suite`, `max_new_tokens`, `evaluate_every`, `evaluate_rows`, as in
            `geffect_fast.unlearn`, for metrics that are measured beside the effects.

    Attributes:
        result: after training, the result of all probes along a first axis `step`, described in
            `docs/concepts.md`; None before.

    Raises:
        InputError: an argument is unusable, here or when training begins.

    Examples:
        >>> probe = gf.integrations.GEffectCallback(
        ...     {"forget": "forget.jsonl", "retain": "retain.jsonl"}, every=10, objectives=["npo"])
        >>> Trainer(model, args, train_dataset=data, callbacks=[probe]).train()
        >>> probe.result.g_effect.sum(["parameter", "sample"])
    """

    def __init__(
        self,
        probe_sets: Mapping[str, Any],
        every: int = 10,
        *,
        objectives: Sequence[str | Objective] | str = ("ga",),
        trained: str | None = None,
        out: str | Path | None = None,
        weights: bool = True,
        tokenizer: Any = None,
        reference_model: nn.Module | str | Path | None = None,
        holdout: Any = None,
        retain_model: nn.Module | str | Path | None = None,
        **options: Any,
    ) -> None:
        check_count("every", every)
        live = {name: options.pop(name) for name in LiveMetrics.model_fields if name in options}
        self._live = live_metrics(every, **live)
        self._compared = {"holdout": holdout, "retain_model": retain_model}
        self.every = every
        self.out = None if out is None else check_free(out)
        self.result: xr.Dataset | None = None
        self._options = options | _sets(probe_sets) | {"reference_model": reference_model}
        self._options["objectives"] = resolved_list(objectives)
        self._tokenizer = tokenizer
        self._trained, self._weights = trained, weights
        self._probe: Probe | None = None
        self._rates: list[float] = []
        self._lock: TrainingLock | None = None
        self._ranks = ALONE

    @classmethod
    def of(cls, probe: Probe, every: int) -> GEffectCallback:
        """A callback for an existing probe, whose store may already hold measured steps."""
        self = cls({"forget": (), "retain": ()}, every)
        self._probe = probe
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the probe, and measure the model before its first update, if a probe is due.

        A resumed training begins with a probe where its checkpoint was saved at a probe's step.
        """
        self._ranks = here()
        try:
            with self._ranks.together(_NAME):
                if self.out is not None and self._ranks.first:
                    self._unlock()
                    self._lock = TrainingLock(self.out)
                self._begin(args, state, control, kwargs)
        except BaseException:
            self._unlock()
            raise

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        given: Mapping[str, Any],
    ) -> None:
        if self._probe is None:
            self._probe = self._prepared(args, state, given["model"], given["processing_class"])
        start, end = state.global_step, state.max_steps
        due = {*range(start + -start % self.every, end, self.every), end}
        self._probe.store.check_free(sorted(due - {*self._probe.store.steps}))
        self._rates = []
        if start % self.every == 0:
            found = self._probe.measure_at(
                start, last=start == end, optimizer=given.get("optimizer")
            )
            report(logged_values(found), args, state, control)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of the update, before a scheduler changes it."""
        optimizer = kwargs["optimizer"]
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        skipped = getattr(optimizer, "step_was_skipped", False)  # an overflow in fp16
        self._rates.append(0.0 if skipped else rates.pop() if len(rates) == 1 else float("nan"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the model, if a probe is due."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            last = state.global_step >= state.max_steps
            self._measure(args, state, control, kwargs.get("optimizer"), last=last)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the end of a training that was stopped early, and put all steps together."""
        if self._probe is None:
            return
        with self._ranks.together(_NAME):
            if state.global_step not in self._probe.store.steps:
                self._measure(args, state, control, kwargs.get("optimizer"), last=True)
            self.result = self._probe.store.combined()
            self._probe.release()
            if self.out is not None and self._ranks.first:
                with locked(self.out):
                    save_result(self.result, self.out / RESULTS)
                    names = [name for name in own_files(self.out) if name != MANIFEST]
                    Manifest(checksums(self.out, sorted(names))).write(self.out)
                self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any,
        *,
        last: bool,
    ) -> None:
        if self._probe is not None:
            with self._ranks.together(_NAME):
                found = self._probe.measure_at(
                    state.global_step, learning_rates=self._rates, last=last, optimizer=optimizer
                )
            self._rates = []
            report(logged_values(found), args, state, control)

    def _prepared(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, tokenizer: Any
    ) -> Probe:
        """The probe of a model that is about to be trained."""
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise UnsupportedModelError(
                "model: its parameters are spread over devices by ZeRO, and a probe needs them "
                "whole, or shared out by FSDP2; save checkpoints, and use "
                "geffect_fast.profile_checkpoints"
            )
        options, resumed = dict(self._options), state.global_step > 0
        with at_rest(model):
            compares = REFERENCE_NEEDS & needs_of(parts_of(options["objectives"]))
            if options["reference_model"] is None and compares:
                if resumed:
                    raise InputError(
                        "reference_model: is missing; give the folder of the model as it was "
                        "before training, which objectives are compared with"
                    )
                if is_sharded(model):
                    raise InputError(
                        "reference_model: is missing, and no copy is made of a model that FSDP "
                        "shares out; give the folder of the model as it is before training"
                    )
                # Frozen parameters do not change, so the copy shares them.
                frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
                options["reference_model"] = copy.deepcopy(model, frozen)
            tokenizer = tokenizer if self._tokenizer is None else self._tokenizer
            profiler = Profiler.of(model, tokenizer, **options)
            measures = self._measures(model, tokenizer, profiler.token_budget)
        decides = {name: getattr(args, name, None) for name in _DECIDES}
        if measures is not None:
            decides["measures"] = measures.identity
        folder = None if self.out is None else self.out / STEPS
        identity = run_identity(profiler, training=decides, every=self.every)
        store = StepStore(folder, identity, self._ranks)
        if store.steps and not resumed:
            raise InputError(
                f"out: {store.where} holds steps of an earlier run, and this training begins; "
                "choose another folder, or resume from a checkpoint"
            )
        return Probe(
            profiler, store, trained=self._trained, weights=self._weights, measures=measures
        )

    def _measures(self, model: nn.Module, tokenizer: Any, budget: int) -> LiveMeasures | None:
        """The metrics to measure beside effects; None where the user chose none."""
        if not self._live.evaluates:
            return None
        given = self._options
        reading = {name: given[name] for name in Reading.model_fields if name in given}
        return LiveMeasures(
            model,
            tokenizer,
            {name: given[name] for name in ("forget", "retain")} | given["probes"],
            self._live,
            checked_config(Reading, reading | {"token_budget": budget}),
            reference_model=given["reference_model"],
            **self._compared,
        )


def _sets(probe_sets: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Profiler.of` for data sets by name.

    Raises:
        InputError: `forget` or `retain` is missing, or `probe_sets` is no mapping.
    """
    if not isinstance(probe_sets, Mapping):
        raise InputError(
            f"probe_sets: got {type(probe_sets).__name__}; give a dict with forget and retain"
        )
    for name in ("forget", "retain"):
        if name not in probe_sets:
            close = difflib.get_close_matches(name, map(str, probe_sets), n=1)
            advice = f"did you mean that by '{close[0]}'?" if close else "give one of that name"
            raise InputError(f"probe_sets: there is no '{name}'; {advice}")
    more = {name: rows for name, rows in probe_sets.items() if name not in ("forget", "retain")}
    return {"forget": probe_sets["forget"], "retain": probe_sets["retain"], "probes": more}
