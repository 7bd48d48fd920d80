"""`relearn`: a brief training on a few forget rows, and measures of what returns of all rows."""

from __future__ import annotations

import copy
import gc
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from transformers import TrainerCallback

from geffect_fast.arguments import checked_config, with_settings
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import (
    check_finite,
    check_is_model,
    is_sharded,
    table_of_positions,
)
from geffect_fast.capture.parts import mesh_of
from geffect_fast.capture.shards import at_work
from geffect_fast.data import SampleSet, read_rows, tokenize_rows
from geffect_fast.data.row_kinds import row_kind
from geffect_fast.engines.known_models import choose_layout
from geffect_fast.errors import (
    GEffectError,
    GEffectWarning,
    InputError,
    NonFiniteError,
    UnsupportedModelError,
)
from geffect_fast.evaluation_settings import Evaluating
from geffect_fast.measure.evaluator import Evaluator, Model
from geffect_fast.measure.models import load_model, load_parts, quiet_transformers
from geffect_fast.measure.shared_out import put_back
from geffect_fast.metrics.base import FORGET, HOLDOUT, Metric
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.objectives import resolve
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.relearn_settings import Relearning
from geffect_fast.storage.recorded_rows import check_recorded
from geffect_fast.terminal import progress_bar
from geffect_fast.training.loss import Draws, Loss
from geffect_fast.training.run import TRAINING_TENSORS, check_steps_parts, only_weights_change
from geffect_fast.training.single_process import single_process
from geffect_fast.training.trainer import UnlearnTrainer
from geffect_fast.training.trainer_arguments import refused, training_arguments
from geffect_fast.unlearn_settings import Training

if TYPE_CHECKING:
    import xarray as xr

LEARNING = resolve("-ga")
"""The objective of relearning: descent on the mean loss of the forget rows' answers."""


@with_settings(Relearning)
@on_all_ranks
def relearn(
    model: Model,
    tokenizer: Any,
    *,
    forget: Any,
    original: Model | None = None,
    retrained: Model | None = None,
    holdout: Any = None,
    progress: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """Train a model briefly on a few unlearned rows, and measure how much of all rows returns.

    A copy of each model is trained by transformers' `Trainer` on the mean loss of the answers'
    tokens, with the same rows in the same order, and measured at steps on the way. Knowledge that a
    model only hides returns sooner than a model that never saw the rows (`retrained`) learns it,
    and returns also for rows that are not trained on. The ranks of a process group share out the
    rows, and each rank returns the whole result. A model that `fully_shard` wraps cannot be copied:
    the model itself is trained, and its weights are put back afterwards. Models that are given as
    folders beside a wrapped model are shared out in the same way.

    Args:
        model: the unlearned model, a module or the folder of one; it is left as it is. Of an
            adapter, the adapter's own weights are trained.
        tokenizer: as `geffect_fast.evaluate` takes it.
        forget: the forget rows, as `geffect_fast.evaluate` takes them; `n_rows` of them are trained
            on. Windows of a long text are rows.
        original: the model before unlearning; it is trained and measured as well.
        retrained: a model trained without the forget rows; it is trained and measured as well. The
            metrics `forget_quality` and `privleak` compare with this model as it is given, before
            its relearning.
        holdout: rows that no model was trained on, for membership, as `geffect_fast.evaluate` takes
            them.
        progress: show a bar.
        settings:

    Returns:
        A Dataset as `geffect_fast.evaluate` returns it, along `model` (`unlearned`, and `original`
        and `retrained` where given) and `step` (updates done): `value`, `value_low`, `value_high`
        (model, step, metric, set) and `sample_value` (model, step, metric, sample). The sets are
        `relearned`, the rows trained on, and `others`, the remaining forget rows, where there are
        any; `sample` is the row's number in the forget data, where windows of texts count as rows.
        A suite's metrics that read other data, or data that is not given, are left out with a
        warning. The attribute `training` is JSON of all settings of the training.

    Raises:
        InputError, UnsupportedModelError: unusable data, models or settings, in one line.
        NonFiniteError: a weight is not finite, or the loss becomes so; the step is named.

    Examples:
        >>> result = gf.relearn(model, tokenizer, forget="forget.jsonl", retrained="retrained",
        ...                     n_rows=5, steps=20, learning_rate=1e-5)
        >>> result.value.sel(metric="extraction_strength", set="others")
    """
    checked = checked_config(Relearning, settings)
    given = {"unlearned": model, "original": original, "retrained": retrained}
    named = {name: each for name, each in given.items() if each is not None}
    trusted = checked.trust_remote_code

    in_parts = [m for m in named.values() if isinstance(m, nn.Module) and is_sharded(m)]

    def load(name: str, source: Any) -> nn.Module:
        what = f"{name} model"
        if isinstance(source, str | Path):
            if not in_parts:
                return load_model(source, what=what, trust_remote_code=trusted)
            place = next(in_parts[0].parameters()).device
            return load_parts(source, "auto", place, what, trusted, mesh=mesh_of(in_parts[0]))
        check_is_model(source, name)
        return source if is_sharded(source) else copy.deepcopy(source)

    relearner = Relearner(tokenizer, checked, forget, holdout, retrained)
    return relearner.run(named, load, progress=progress)


@dataclass(frozen=True)
class _Part:
    """A part of the forget data: rows or samples, and their numbers in the whole data."""

    rows: SampleSet | Sequence[Mapping[str, Any]]
    numbers: list[int]


class Relearner:
    """A relearning of any number of models, with the same rows for all of them.

    Args:
        tokenizer, forget, holdout, retrained: as for `relearn`.
        settings: settings of the training.

    Attributes:
        rows: digests of the tokenised rows, by set; empty until a model is measured.
        token_budget: the most tokens of a batch; 0 until a model is measured.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: Relearning,
        forget: Any,
        holdout: Any = None,
        retrained: Model | None = None,
    ) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._forget = self._read(forget, FORGET)
        self._holdout = None if holdout is None else self._read(holdout, HOLDOUT)
        self._retrained = retrained
        self._metrics = self._measurable()
        self._parts: dict[str, _Part] = {}
        self.rows: dict[str, str] = {}
        self.token_budget = 0

    def _read(self, source: Any, name: str) -> SampleSet | Sequence[Mapping[str, Any]]:
        if isinstance(source, SampleSet):
            return source
        return read_rows(source, name=name, data_format=self._settings.data_format)

    def _measurable(self) -> list[Metric]:
        """The metrics that can be measured here.

        A metric of the suite that cannot be measured is left out with a warning.

        Raises:
            InputError: a metric that the settings name cannot be measured.
        """
        settings = self._settings
        every = resolved_metrics(settings.metrics, settings.suite)
        of_suite = [] if settings.suite is None else resolved_metrics((), settings.suite)
        lacking = {metric: lack for metric in every if (lack := self._lack(metric))}
        for metric, lack in lacking.items():
            if metric not in of_suite:
                raise InputError(f"metric {metric} {lack}")
        if lacking:
            said = ", ".join(f"{metric} ({lack})" for metric, lack in lacking.items())
            warnings.warn(
                f"suite {settings.suite}: left out are {said}", GEffectWarning, stacklevel=3
            )
        return [metric for metric in every if metric not in lacking]

    def _lack(self, metric: Metric) -> str:
        """The reason why a metric cannot be measured; empty where it can."""
        if not metric.reads(FORGET):
            return "does not read the forget data alone; leave it out"
        if "reference" in metric.wants():
            return "needs a reference model, which is not read here; leave it out"
        if HOLDOUT in metric.wants() and self._holdout is None:
            return "needs hold-out data (--holdout); give rows that no model was trained on"
        if "retain_model" in metric.wants() and self._retrained is None:
            return "needs a model trained without the forget rows (--retrained); give one"
        return ""

    def _drawn(self, model: nn.Module) -> dict[str, _Part]:
        """Draw the rows that are trained on; the others are the second part.

        Rows of a text are its windows, whose length follows from the model's positions.
        """
        settings = self._settings
        given: SampleSet | Sequence[Mapping[str, Any]] = self._forget
        if not isinstance(given, SampleSet) and row_kind(given[0]) == "text":
            given = tokenize_rows(
                given,
                self._tokenizer,
                name=FORGET,
                template=settings.template,
                max_length=settings.max_length,
                date=settings.date,
                n_positions=table_of_positions(model),
            )
        n = len(given)
        count = n if settings.n_rows == "all" else settings.n_rows
        for option, most in (("n_rows", count), ("batch_size", settings.batch_size or 0)):
            if most > n:
                raise InputError(
                    f"{option}: {most} is more than the {n} rows of forget; give at most as many "
                    f"(--{option.removeprefix('n_').replace('_', '-')})"
                )
        chosen = np.random.default_rng(settings.seed).permutation(n)[:count]
        parts = {"relearned": sorted(map(int, chosen))}
        if others := sorted(set(range(n)) - set(parts["relearned"])):
            parts["others"] = others
        if isinstance(given, SampleSet):
            sets = {name: given.part(rows) for name, rows in parts.items()}
            return {
                name: _Part(part, [s.data_row for s in part.samples]) for name, part in sets.items()
            }
        return {name: _Part([given[i] for i in rows], rows) for name, rows in parts.items()}

    def run(
        self,
        models: Mapping[str, Any],
        load: Callable[[str, Any], nn.Module],
        *,
        recorded: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> xr.Dataset:
        """The result of `relearn`.

        Args:
            models: the models, or their folders, by name.
            load: returns the module to train for a name and its entry of `models`. Where this is
                the entry itself, its weights are put back afterwards.
            recorded: digests of the rows of an earlier run; where the rows differ from these,
                the difference is told before any training.
            progress: show a bar.
        """
        import xarray as xr

        def relearned(name: str, each: Any) -> xr.Dataset:
            """The measures of one model, which is freed at the end of this call."""
            model = load(name, each)
            with put_back(model) if model is each else nullcontext():
                return self._trained(name, model, recorded or {}, progress)

        found = []
        for name, each in models.items():
            found.append(relearned(name, each))
            if here().size > 1:
                gc.collect()  # FSDP's modules hold each other
        along = xr.DataArray(list(models), dims="model", name="model")
        own = {*Relearning.model_fields} - {*Evaluating.model_fields} | {"max_length"}
        training = self._settings.model_dump(mode="json", include=own)
        numbers = {name: part.numbers for name, part in self._parts.items()}
        return xr.concat(found, along, combine_attrs="override").assign_attrs(
            command="relearn",
            suite=self._settings.suite or "",
            relearned_rows=json.dumps(numbers["relearned"]),
            training=json.dumps(training),
            n_rows=json.dumps({name: len(rows) for name, rows in numbers.items()}),
            digests=json.dumps(self.rows),
        )

    def beside(self, model: nn.Module) -> int:
        """Bytes that a relearning takes beside a model; the larger of two needs.

        Before the training this is the retrained model, where a metric compares with that. In the
        training this is the gradients and Adam's two states.
        """
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        compared = self._retrained is not None and any(
            metric.name == "privleak" or "retain_model" in metric.wants()
            for metric in self._metrics
        )
        whole = sum(p.nbytes for p in model.parameters())
        return max(TRAINING_TENSORS * trained, compared * whole)

    def _trained(
        self, name: str, model: nn.Module, recorded: Mapping[str, str], progress: bool
    ) -> xr.Dataset:
        """Train one model, and return its measures along `step`."""
        import xarray as xr

        settings, what = self._settings, f"{name} model"
        check_finite(model, what)
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(f"{what}: none of its parameters can be trained (requires_grad)")
        model.eval()
        device = next(model.parameters()).device
        training = _training(settings)
        with single_process(device):
            training_arguments(training, ".", device)  # only to check them
        in_parts = is_sharded(model)
        if in_parts:
            check_steps_parts(training.optimizer)
        self._parts = self._parts or self._drawn(model)
        evaluators = {part: self._evaluator(model, of.rows) for part, of in self._parts.items()}
        first = not self.rows
        self.rows = {part: each.rows[FORGET] for part, each in evaluators.items()}
        if self._holdout is not None:
            self.rows[HOLDOUT] = evaluators["relearned"].rows[HOLDOUT]
        if first:
            check_recorded(recorded, self.rows)
        answers = evaluators["relearned"].sets[FORGET].answers
        budgets = [each.token_budget for each in evaluators.values()]
        self.token_budget = min([*budgets, *([self.token_budget] if self.token_budget else [])])
        ranks = evaluators["relearned"].ranks
        try:
            with ranks.in_step(in_parts), at_work(model):
                plan = Plan.of(model, may_be_sharded=True)
                layout = choose_layout(plan, answers)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{what}: {error}") from error
        ranks.check_same({"layout": layout})
        loss = Loss(
            LEARNING,
            {FORGET: answers},
            self.token_budget,
            layout,
            "token",
        )
        measures: dict[int, xr.Dataset] = {}
        sizes = {FORGET: (len(answers), settings.batch_size or len(answers))}

        def look(step: int) -> None:
            if step % settings.measure_every == 0 or step == settings.steps:
                measures[step] = self._measures(evaluators, model, what)
            show(completed=step)

        with (
            progress_bar(progress and ranks.first, f"relearning, {what}", settings.steps) as show,
            single_process(device),
            ranks.in_step(in_parts),
            at_work(model),
            only_weights_change(model),
            quiet_transformers(),
        ):
            try:
                trainer = UnlearnTrainer(
                    model,
                    training_arguments(training, ".", device),
                    loss=loss,
                    draws=Draws(sizes, settings.steps, settings.seed),
                    reference=None,
                    callbacks=[_StepCallback(look)],
                    ranks=ranks,
                    shards=plan.shards,
                )
                trainer.create_optimizer_and_scheduler(settings.steps)
            except GEffectError:
                raise
            except Exception as error:  # of many kinds, from transformers and torch
                raise refused(training, error) from error
            try:
                trainer.train()
            except NonFiniteError as error:
                if error.told:
                    raise
                step = trainer.state.global_step if error.step is None else error.step
                raise NonFiniteError(
                    f"{what}, step {step}: {error.problem}",
                    remedy="try a smaller --learning-rate, or --dtype float32",
                ) from error
        along = xr.DataArray(list(measures), dims="step", name="step")
        return xr.concat(list(measures.values()), along, combine_attrs="override")

    def _evaluator(self, model: nn.Module, rows: Any) -> Evaluator:
        """An evaluator that scores `rows` as the forget data."""
        values = self._settings.fields(Evaluating) | {"metrics": self._metrics, "suite": None}
        sources = {FORGET: rows, HOLDOUT: self._holdout}
        return Evaluator(
            model,
            self._tokenizer,
            Evaluating(**values),
            sources,
            retain_model=self._retrained,
        )

    def _measures(
        self, evaluators: Mapping[str, Evaluator], model: nn.Module, what: str
    ) -> xr.Dataset:
        """The measures of all parts at a step, side by side."""
        import xarray as xr

        found = []
        for part, evaluator in evaluators.items():
            each = evaluator.measure(model, what=what).sel(set=[FORGET])
            each = each.isel(sample=each["sample_set"].values == FORGET)
            numbers = self._parts[part].numbers
            found.append(
                each.assign_coords(
                    set=[part],
                    sample=numbers,
                    sample_set=("sample", [part] * len(numbers)),
                )
            )
        values = xr.concat(
            [each[["value", "value_low", "value_high"]] for each in found], "set"
        ).drop_vars(["sample", "sample_set", "question"], errors="ignore")
        rows = xr.concat([each[["sample_value"]] for each in found], "sample")
        return xr.merge([values, rows]).assign_attrs(found[0].attrs)


def _training(settings: Relearning) -> Training:
    """The settings of the Trainer for a relearning."""
    warm = settings.lr_schedule == "constant" and settings.warmup_steps
    return Training(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        # The schedule `constant` of transformers has no warm-up.
        scheduler="constant_with_warmup" if warm else settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        optimizer=settings.optimizer,
        seed=settings.seed,
        trainer={
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm or 0.0,
        },
    )


class _StepCallback(TrainerCallback):
    """A callback that calls `look` before the first update and after every update."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self._look = look

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `look` for step 0."""
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `look` for the update that is done."""
        self._look(state.global_step)
