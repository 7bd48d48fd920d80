"""Probes: profiles of a model at steps of its training, with the change of risks between steps.

Between two probes the parameters move from `theta` to `theta'`, and a risk `R` changes, to first
order, by

    < theta' - theta, grad R(theta) >        for any update (Adam, clipping, decay)
    - sum(lr) * (e_P(theta) + ...)           if every update is like the optimizer's next step
    - sum(lr) * e(theta)                     if every update is plain gradient descent

A result holds these predictions beside the measured `R(theta') - R(theta)`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geffect_fast.data import SampleSet
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.measure.profiler import Profiler
from geffect_fast.measure.step_metric import StepMetric, step_objective, without_step
from geffect_fast.objectives import resolve
from geffect_fast.results.by_rows import sum_positions
from geffect_fast.results.rows_needed import rows_note
from geffect_fast.steps.at_rest import at_rest
from geffect_fast.steps.live_measures import LiveMeasures
from geffect_fast.storage.step_store import StepStore

if TYPE_CHECKING:
    import xarray as xr

SAME = 1e-3
"""Largest relative difference between a risk and its stored value at which the model counts as the
same; another machine's rounding is smaller."""

_CHUNK = 2**22
"""Elements of a parameter per product, so that no whole fp64 copy of a large one is made."""


@dataclass(frozen=True)
class _Before:
    """The state at a probe that the next prediction needs.

    Attributes:
        step: number of updates done.
        parameters: copies of the measured parameters, by name; only this rank's parts where ranks
            share the model.
        directions: gradients of the risks at these parameters, `(M, *shape)` by name, likewise in
            parts.
    """

    step: int
    parameters: dict[str, Tensor]
    directions: Mapping[str, Tensor]


class Probe:
    """A probe of a model in training, which keeps the result of each measured step in a store.

    Measuring leaves the model as it was, and so does not change the training. For files in the
    store's folder that are no steps of this run there is a `GEffectWarning`.

    Args:
        profiler: the profiler of the model in training.
        store: receives the results; steps that it holds already are not measured again.
        trained: the objective that is trained on, among those of the profiler; None where unknown.
        weights: whether the weights that objectives give to tokens (`token_weight`) are measured
            too; results by position have none.
        second_order: whether the curvature of the risks along the optimizer's step is measured too,
            for `predicted_second`.
        forget_rows: number of forget rows in the whole data, of which the profiler may measure a
            part; None where it measures all.
        measures: metrics that are measured beside effects; None for no metrics.

    Attributes:
        latest: the step and the result of the last call; None before the first.

    Raises:
        InputError: `trained` is not among the objectives.

    Examples:
        >>> profiler = Profiler.of(model, tokenizer, **data, objectives=["npo"])
        >>> probe = Probe(profiler, StepStore(None, run_identity(profiler)))
        >>> probe.measure_at(0)
        >>> ...  # ten updates
        >>> probe.measure_at(10)
        >>> probe.store.combined().g_effect.sum(["parameter", "sample"])
    """

    def __init__(
        self,
        profiler: Profiler,
        store: StepStore,
        *,
        trained: str | None = None,
        weights: bool = True,
        second_order: bool = False,
        forget_rows: int | None = None,
        measures: LiveMeasures | None = None,
    ) -> None:
        self.profiler = profiler
        self.store = store
        self.trained = None if trained is None else _label(trained, profiler)
        self.weights = weights
        self.second_order = second_order
        self.forget_rows = len(profiler.sets["forget"]) if forget_rows is None else forget_rows
        self.measures = measures
        self.latest: tuple[int, xr.Dataset] | None = None
        self._before: _Before | None = None

    def measure_at(
        self,
        step: int,
        *,
        learning_rates: Sequence[float] = (),
        last: bool = False,
        optimizer: Any = None,
    ) -> xr.Dataset:
        """Measure the model as it is after `step` updates, and keep the result.

        Args:
            step: number of updates done, more than at the last call.
            learning_rates: learning rates of the updates since the last call, for `learning_rate`,
                `predicted_step` and `predicted_sgd`.
            last: whether training ends here.
            optimizer: the optimizer that takes the next step, or the folder of a checkpoint with
                its state. Effects in the optimizer's metric, `step_effect` and the variables that
                belong to it, are then measured too. Where the metric is not known they are NaN, and
                `step_metric_note` says why. With None they are left out.

        Returns:
            The result of this step, read from the store where the step is there already.

        Raises:
            InputError, NonFiniteError, UnfinishedError: as in `Profiler.measure` and
                `StepStore.write`.
        """
        plan, first = self.profiler.plan, self._before is None
        for line in self.store.left_alone if self.latest is None else ():
            warnings.warn(line, GEffectWarning, stacklevel=2)
        with at_rest(plan.model, plan.at_rest.values()):
            if step in self.store.steps:
                self._before = None  # frees memory before more is needed
                result = self.store.read(step)
                values, directions = self.profiler.risk_gradients()
                if first:
                    self._check_same(step, result, values)
            else:
                changes = self._changes(step, learning_rates)
                self._before = None
                metric, why = self._metric(optimizer)
                self.profiler.ranks.check_same({"optimizer": why})
                # Rounding is measured at the first step only: the whole run has its attributes.
                measured = self.profiler.measure(
                    weights=self.weights,
                    rounding=not self.store.steps,
                    step=metric,
                    second_order=self.second_order and metric is not None,
                )
                directions, dataset = measured.directions, measured.dataset
                if why is not None:
                    dataset = without_step(dataset, self.second_order).assign_attrs(
                        step_metric_note=why
                    )
                result = self._assembled(step, dataset, learning_rates, changes)
                if self.measures is not None:
                    before = self._last_before(step)
                    earlier = None if before is None else self._result_of(before)
                    result = self.measures.beside(result, earlier, plan.model, step, last)
                self.store.write(step, result)
            copies = {name: p.detach().clone() for name, p in plan.held.items()}
            self._before = _Before(step, copies, directions)
        self.latest = step, result
        return result

    def release(self) -> None:
        """Free the memory that the next prediction would need."""
        self._before = None

    def _metric(self, optimizer: Any) -> tuple[StepMetric | None, str | None]:
        """The metric of the optimizer's next step, or None and the reason why it is not known.

        Without an optimizer both are None.
        """
        if optimizer is None:
            return None, None
        plan, objectives = self.profiler.plan, self.profiler.objectives
        trained = next((o for o in objectives if str(o) == self.trained), None)
        try:
            metric = (
                StepMetric.saved(optimizer, plan.model, plan.at_rest)
                if isinstance(optimizer, Path)
                else StepMetric.live(optimizer, plan.at_rest)
            )
            return step_objective(metric, trained, objectives), None
        except InputError as error:  # effects along the gradient need no metric
            return None, str(error)

    def _changes(self, step: int, learning_rates: Sequence[float]) -> dict[str, Any]:
        """First-order predictions of the risks' changes since the last probe, by variable."""
        before, risks = self._before, self.profiler.risk_names
        unknown = torch.full((len(risks),), math.nan, dtype=torch.float64)
        update, sgd, taken, second = unknown, unknown, unknown, unknown
        if before is not None and before.step == self._last_before(step):
            update = inner_with_update(
                self.profiler.plan.held, before.parameters, before.directions
            )
            if self.profiler.plan.shards is not None:
                self.profiler.plan.shards.add_up([update])
            if self.trained is not None:
                last, rate = self._result_of(before.step), sum(learning_rates)
                effect = total_effect(last).sel(objective=self.trained)
                sgd = -rate * torch.from_numpy(effect.values)
                if "step_total" in last:
                    whole = last["step_total"].sel(objective=self.trained)
                    taken = -rate * torch.from_numpy(whole.values)
                if "step_curvature" in last:
                    curvature = last["step_curvature"].sel(objective=self.trained)
                    second = taken + rate**2 / 2 * torch.from_numpy(curvature.values)
        more = {"predicted_second": ("risk", second.numpy())} if self.second_order else {}
        return {
            "predicted_update": ("risk", update.numpy()),
            "predicted_step": ("risk", taken.numpy()),
            "predicted_sgd": ("risk", sgd.numpy()),
            **more,
        }

    def _assembled(
        self,
        step: int,
        dataset: xr.Dataset,
        learning_rates: Sequence[float],
        changes: Mapping[str, Any],
    ) -> xr.Dataset:
        """The result of a step: its profile with the variables and attributes of a step added."""
        last = self._last_before(step)
        now = dataset["risk_value"]
        before = math.nan if last is None else self._result_of(last)["risk_value"]
        attributes: dict[str, Any] = {"forget_rows": self.forget_rows}
        if self.trained is not None:
            attributes["trained_objective"] = self.trained
        result = dataset.assign(
            {
                "learning_rate": learning_rates[-1] if learning_rates else math.nan,
                "measured_change": now - before,
                **changes,
            }
        ).assign_attrs(attributes)
        # Only at the first step, since the whole run has its attributes.
        few = rows_note(result.assign_coords(step=step)) if last is None else ""
        return result.assign_attrs({"rows_note": few} if few else {})

    def _result_of(self, step: int) -> xr.Dataset:
        """The result of an earlier step, from memory if it is the latest, else from the store."""
        if self.latest is not None and self.latest[0] == step:
            return self.latest[1]
        return self.store.read(step)

    def _check_same(self, step: int, stored: xr.Dataset, values: Tensor) -> None:
        """Raise `InputError` where a step in the store was measured of another model."""
        for name, now in zip(self.profiler.risk_names, values.tolist(), strict=True):
            then = float(stored["risk_value"].sel(risk=name))
            if abs(now - then) > SAME * max(abs(then), 1e-3):
                raise InputError(
                    f"{self.store.where}: step {step} was measured of another model: risk '{name}' "
                    f"is {then:.4g} there and {now:.4g} now; choose another folder, or remove it"
                )

    def _last_before(self, step: int) -> int | None:
        return max((s for s in self.store.steps if s < step), default=None)


def inner_with_update(
    parameters: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
) -> Tensor:
    """`< theta' - theta, V_m >` for every direction, `(M,)` fp64 on the CPU.

    Args:
        parameters: the parameters now, `theta'`, by name.
        before: the parameters before, `theta`, by name.
        directions: `(M, *shape)` by name, on any device.
    """
    n = len(next(iter(directions.values())))
    total = torch.zeros(n, dtype=torch.float64)
    for name, p in parameters.items():
        v = directions[name].flatten(1)
        now, then = p.detach().flatten(), before[name].flatten()
        for at in range(0, len(now), _CHUNK):
            piece = slice(at, at + _CHUNK)
            moved = now[piece].double() - then[piece].double()
            total += (v[:, piece].double() @ moved.to(v.device)).cpu()
    return total


def run_identity(
    profiler: Profiler, sets: Mapping[str, SampleSet] | None = None, **more: Any
) -> str:
    """The identity of a run, which marks its step files: a hash of what decides its numbers.

    The weights themselves are not in the hash.

    Args:
        profiler: gives data, objectives, settings, and the names and shapes of parameters.
        sets: the whole data, where the profiler measures a part of it.
        more: anything else that decides the numbers, such as a config, in values that JSON can
            hold.
    """
    found = hashlib.sha256()
    # Left out: a choice by free memory, a reason in words, the date, a hash of rows hashed below.
    chosen = ("token_budget", "engine_reason", "date", "digests")
    plain = {
        "settings": {k: v for k, v in profiler.attributes.items() if k not in chosen},
        "risks": profiler.risk_names,
        "parameters": {name: list(p.shape) for name, p in profiler.plan.parameters.items()},
        "more": more,
    }
    found.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, sample_set in (sets or profiler.sets).items():
        found.update(name.encode())
        for sample in sample_set.samples:
            for sequence in (sample.answer, *sample.alternatives):
                for tensor in (sequence.input_ids, sequence.labels, sequence.weights):
                    if tensor is not None:
                        found.update(tensor.numpy().tobytes() + b";")
    return found.hexdigest()[:32]


def total_effect(dataset: xr.Dataset) -> xr.DataArray:
    """The effects of each objective on each risk, at each step, summed over all other axes."""
    effect = sum_positions(dataset)["g_effect"]
    return effect.sum([dim for dim in effect.dims if dim not in ("step", "objective", "risk")])


def _label(trained: str, profiler: Profiler) -> str:
    """The name of the trained objective on the result's axis.

    Raises:
        InputError: the objective is not measured.
    """
    for objective in profiler.objectives:
        if objective == resolve(trained):
            return str(objective)
    listed = ", ".join(map(str, profiler.objectives))
    raise InputError(f"trained: '{trained}' is not among the objectives measured: {listed}; add it")
