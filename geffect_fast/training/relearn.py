"""`relearn`: a brief training on a few forget rows, and what comes back of them and the others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from transformers import TrainerCallback

from geffect_fast.arguments import checked_config, with_settings
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import check_is_model
from geffect_fast.data import SampleSet, read_rows
from geffect_fast.engines.layout import choose_layout
from geffect_fast.errors import GEffectError, InputError, NonFiniteError, UnsupportedModelError
from geffect_fast.evaluation_settings import Evaluating
from geffect_fast.measure.evaluate import Evaluator, Model
from geffect_fast.measure.models import check_finite, load_model, quiet_transformers
from geffect_fast.objectives import resolve
from geffect_fast.relearn_settings import Relearning
from geffect_fast.settings import Training
from geffect_fast.terminal import progress_bar
from geffect_fast.training.run import only_weights_change
from geffect_fast.training.trainer import Draws, Loss, UnlearnTrainer
from geffect_fast.training.trainer_arguments import refused, training_arguments

if TYPE_CHECKING:
    import xarray as xr

FORGET = "forget"

LEARNING = resolve("-ga")
"""The mean loss of the forget rows' answers: what unlearning by ascent climbs is descended."""


@with_settings(Relearning)
def relearn(
    model: Model,
    tokenizer: Any,
    *,
    forget: Any,
    original: Model | None = None,
    retrained: Model | None = None,
    progress: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """What comes back of unlearned rows when a model is trained briefly on a few of them.

    A copy of each model is trained by transformers' `Trainer` on the mean loss of the answers'
    tokens, with the same rows in the same order, and measured at steps on the way. What a model
    has only hidden comes back sooner than what one learns that never saw it (`retrained`), and
    also of rows that are not trained on.

    Args:
        model: the unlearned one, a module or the folder of one; it is left as it is. Of an adapter
            what it adds is trained.
        tokenizer: as `geffect_fast.evaluate` takes it.
        forget: what was to go, likewise; `n_rows` of them are trained on.
        original: the model before unlearning, to be trained beside it.
        retrained: one trained without the forget rows, likewise.
        progress: show a bar.
        settings:

    Returns:
        A Dataset as `geffect_fast.evaluate` returns it, along `model` (`unlearned`, and `original`
        and `retrained` where given) and `step` (updates done): `value`, `value_low`, `value_high`
        (model, step, metric, set) and `sample_value` (model, step, metric, sample). The sets are
        `relearned`, the rows trained on, and `others`, the forget rows that are not, where there
        are any; `sample` is the row's number in the forget data.

    Raises:
        InputError, UnsupportedModelError: unusable data, models or settings, in one line.
        NonFiniteError: a weight, or on the way the loss, is not finite; the step is named.

    Example:
        >>> result = gf.relearn(model, tokenizer, forget="forget.jsonl", retrained="retrained",
        ...                     n_rows=5, steps=20, learning_rate=1e-5)
        >>> result.value.sel(metric="extraction_strength", set="others")
    """
    checked = checked_config(Relearning, settings)
    given = {"unlearned": model, "original": original, "retrained": retrained}
    named = {name: each for name, each in given.items() if each is not None}
    trusted = checked.trust_remote_code

    def load(name: str, source: Any) -> nn.Module:
        if isinstance(source, str | Path):
            return load_model(source, what=f"{name} model", trust_remote_code=trusted)
        check_is_model(source, name)
        return copy.deepcopy(source)

    return Relearner(tokenizer, checked, forget).of(named, load, progress=progress)


class Relearner:
    """The rows that are trained on, and the others: the same for all models.

    Args:
        tokenizer, forget: as for `relearn`.
        settings: how it is trained.

    Attributes:
        rows: digests of the tokenised rows, by set, once a model has been measured.
        token_budget: tokens a batch, likewise.
    """

    def __init__(self, tokenizer: Any, settings: Relearning, forget: Any) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        given = forget if isinstance(forget, SampleSet) else read_rows(forget, name=FORGET)
        n = len(given)
        if settings.n_rows > n:
            raise InputError(
                f"n_rows: {settings.n_rows} is more than the {n} rows of forget; give at most as "
                "many (--rows)"
            )
        chosen = np.random.default_rng(settings.seed).permutation(n)[: settings.n_rows]
        parts = {"relearned": sorted(map(int, chosen))}
        if others := sorted(set(range(n)) - set(parts["relearned"])):
            parts["others"] = others
        self._numbers: dict[str, list[int]] = parts
        self._parts = {
            name: given.part(rows) if isinstance(given, SampleSet) else [given[i] for i in rows]
            for name, rows in parts.items()
        }
        self.rows: dict[str, str] = {}
        self.token_budget = 0

    def of(
        self,
        models: Mapping[str, Any],
        load: Callable[[str, Any], nn.Module],
        *,
        progress: bool = False,
    ) -> xr.Dataset:
        """The result of `relearn`.

        Args:
            models: what is trained, or where it lies, by name.
            load: makes a module, which is trained, of a name and what stands there.
            progress: show a bar.
        """
        import xarray as xr

        found = [self._trained(name, load(name, each), progress) for name, each in models.items()]
        along = xr.DataArray(list(models), dims="model", name="model")
        training = self._settings.model_dump(
            mode="json", include={*Relearning.model_fields} - {*Evaluating.model_fields}
        )
        return xr.concat(found, along, combine_attrs="override").assign_attrs(
            command="relearn",
            relearned_rows=json.dumps(self._numbers["relearned"]),
            training=json.dumps(training),
            n_rows=json.dumps({name: len(rows) for name, rows in self._numbers.items()}),
            digests=json.dumps(self.rows),
        )

    def _trained(self, name: str, model: nn.Module, progress: bool) -> xr.Dataset:
        """One model's measures along `step`."""
        import xarray as xr

        settings, what = self._settings, f"{name} model"
        check_finite(model, what)
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(f"{what}: none of its parameters can be trained (requires_grad)")
        model.eval()
        device = next(model.parameters()).device
        training = Training(
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            optimizer=settings.optimizer,
            seed=settings.seed,
        )
        arguments = training_arguments(training, ".", str(device))
        evaluators = {part: self._evaluator(model, rows) for part, rows in self._parts.items()}
        self.rows = {part: each.rows[FORGET] for part, each in evaluators.items()}
        answers = evaluators["relearned"].sets[FORGET].answers
        budgets = [each.token_budget for each in evaluators.values()]
        self.token_budget = min([*budgets, *([self.token_budget] if self.token_budget else [])])
        try:
            layout = choose_layout(Plan.of(model), answers)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{what}: {error}") from error
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
            progress_bar(progress, f"relearning, {what}", settings.steps) as show,
            only_weights_change(model),
            quiet_transformers(),
        ):
            try:
                trainer = UnlearnTrainer(
                    model,
                    arguments,
                    loss=loss,
                    draws=Draws(sizes, settings.steps, settings.seed),
                    reference=None,
                    callbacks=[_Looks(look)],
                )
                trainer.create_optimizer_and_scheduler(settings.steps)
            except GEffectError:
                raise
            except Exception as error:  # of many kinds, from transformers and torch
                raise refused(training, error) from error
            try:
                trainer.train()
            except NonFiniteError as error:
                said = str(error).partition(";")[0]
                if not said.startswith("step "):
                    said = f"step {trainer.state.global_step}: {said}"
                raise NonFiniteError(
                    f"{what}, {said}; try a smaller --learning-rate, or --dtype float32"
                ) from error
        along = xr.DataArray(list(measures), dims="step", name="step")
        return xr.concat(list(measures.values()), along, combine_attrs="override")

    def _evaluator(self, model: nn.Module, rows: Any) -> Evaluator:
        """Of rows as those of the forget data, as which they are scored."""
        values = Evaluating(**self._settings.fields(Evaluating))
        evaluator = Evaluator(model, self._tokenizer, values, {FORGET: rows})
        for metric in evaluator.metrics:
            if not metric.reads(FORGET):
                raise InputError(f"metric {metric}: it does not read the forget data; leave it out")
        return evaluator

    def _measures(
        self, evaluators: Mapping[str, Evaluator], model: nn.Module, what: str
    ) -> xr.Dataset:
        """The measures of all parts at a step, side by side."""
        import xarray as xr

        found = []
        for part, evaluator in evaluators.items():
            each = evaluator.measure(model, what=what).sel(set=[FORGET])
            numbers = self._numbers[part]
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


class _Looks(TrainerCallback):
    """Measures before the first update, and after each that is its turn."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self._look = look

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before training."""
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an update."""
        self._look(state.global_step)
