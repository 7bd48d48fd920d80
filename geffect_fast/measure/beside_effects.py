"""Numbers beside effects: effects of the step that is taken, conflicts, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.capture import Plan
from geffect_fast.engines.batches import Tick
from geffect_fast.engines.directions import fisher_traces
from geffect_fast.engines.place_masses import place_masses
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.second_order import check_twice_differentiable, curvature_along
from geffect_fast.errors import InputError
from geffect_fast.measure.effects import Effects
from geffect_fast.measure.prepare import Schedule
from geffect_fast.measure.rounding import HALF
from geffect_fast.measure.step_metric import NextStep, StepMetric
from geffect_fast.results.axes import EffectArray, Resolution
from geffect_fast.results.dataset import check_effects


class TakenStep:
    """The step that is taken next. Its effects replace the gradient's, or stand beside them.

    Args:
        schedule: of the profile.
        metric: of the step.
        gradients: function that finds the objectives' gradients, `(K, *shape)` by parameter.

    Attributes:
        metric: as given.
    """

    def __init__(
        self,
        schedule: Schedule,
        metric: StepMetric,
        gradients: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self.metric, self._schedule, self._gradients = metric, schedule, gradients
        self._added: Sequence[Tensor] = ()

    @cached_property
    def whole(self) -> NextStep:
        """The step itself, formed at the first access."""
        metric, read = self.metric, None
        if metric.reads != "none":
            chosen = metric.formed_of(self._schedule.objectives)
            read = {name: of[chosen] for name, of in self._gradients().items()}
        return metric.formed(self._schedule.plan.held, read)

    @property
    def in_place(self) -> NextStep | None:
        """The step in whose metric effects are measured; None: effects are plain."""
        return None if self.metric.beside else self.whole

    def scale(self, directions: Mapping[str, Tensor]) -> None:
        """Multiply the risks' gradients `(M, *shape)` with `P`, in place, unless effects are plain.

        The effects that momentum and weight decay add are found first, for `variables`.
        """
        if self.in_place is not None:
            self._added = self.in_place.beside_gradient(directions)
            self._schedule.add_up_parts(self._added)
            self.in_place.scale(directions)

    def variables(self, directions: Mapping[str, Tensor], found: Effects) -> dict[str, Any]:
        """The variables of a result about the step, beside `g_effect`, by name.

        Args:
            directions: the risks' gradients, after `scale`.
            found: the engine's results along `directions`.

        Raises:
            NonFiniteError: an effect is not finite.
        """
        schedule, metric = self._schedule, self.metric
        if not metric.beside:
            total = schedule.mixture @ found.summed.sum(-1)
            return metric.variables(schedule.resolution, total, self._added)
        gradients, mixture = found.gradients, schedule.mixture
        if gradients is None:
            gradients, mixture = self._gradients(), torch.eye(len(mixture), dtype=mixture.dtype)
        return effects_beside(schedule, metric, directions, gradients, mixture)


def effects_beside(
    schedule: Schedule,
    metric: StepMetric,
    directions: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    mixture: Tensor,
) -> dict[str, Any]:
    """The variables of a step beside plain effects, by name.

    These are `step_effect` (objective, risk, and parameter or group where that is an axis) and the
    variables of `StepMetric.variables`. They are products of whole gradients, so no row is run
    again for them.

    Args:
        schedule: of the profile.
        metric: of the step.
        directions: gradients of the risks, `(M, *shape)` by parameter.
        gradients: of the objectives or their parts, `(n, *shape)` by parameter.
        mixture: `(K, n)`, how often each of `gradients` counts in each objective's gradient.

    Raises:
        NonFiniteError: an effect is not finite.
    """
    objectives, resolution = schedule.objectives, schedule.resolution
    effects, *beside = metric.products(
        schedule.plan.held, directions, gradients, mixture, metric.formed_of(objectives)
    )
    schedule.add_up_parts([effects, *beside])
    values = torch.zeros(len(objectives), dtype=torch.float64)  # the real values were checked
    check_effects(effects, values, objectives, list(directions))
    variables = metric.variables(resolution, effects.sum(-1), beside)
    labels, columns = resolution.columns()
    placed = effects.new_zeros(*effects.shape[:2], len(labels))
    placed.index_add_(2, torch.tensor(columns), effects)
    by = resolution.by_parameter_or_group
    if by is None:
        return variables | {"step_effect": (("objective", "risk"), placed[..., 0].numpy())}
    return variables | {"step_effect": (("objective", "risk", by), placed.numpy())}


def conflicts_of(
    schedule: Schedule,
    directions: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    reference: Reference,
    tick: Tick,
) -> dict[str, Any]:
    """The variables `gradient_mass`, `conflict_share` and `fisher_trace`, by name.

    Args:
        schedule: of the profile; the risks' rows are run once more.
        directions: gradients of the risks, `(M, *shape)` by parameter.
        gradients: of the objectives, `(K, *shape)`.
        reference: what the risks compare with.
        tick: progress.
    """
    resolution, risks = schedule.resolution, schedule.risk_names
    retain = {name: of[risks.index("retain")] for name, of in directions.items()}
    masses = gradient_masses(gradients, retain, resolution)
    schedule.add_up_parts([masses])
    traces = fisher_traces(schedule.plan, schedule.risk_passes, len(risks), reference, tick)
    labels, columns = resolution.columns()
    placed = traces.new_zeros(len(traces), len(labels))
    placed.index_add_(1, torch.tensor(columns), traces)
    found = {
        "gradient_mass": ("objective", masses[:, 0]),
        "conflict_share": ("objective", masses[:, 1] / masses[:, 0]),
        "fisher_trace": ("risk", placed.T),
    }
    by = resolution.by_parameter_or_group
    return {
        name: ((dim,), of[0].numpy()) if by is None else ((by, dim), of.numpy())
        for name, (dim, of) in found.items()
    }


def place_conflicts_of(
    schedule: Schedule, directions: Mapping[str, Tensor], reference: Reference, tick: Tick
) -> dict[str, Any]:
    """The variables `place_mass` and `place_conflict_share`, by name: conflicts place by place.

    Args:
        schedule: of the profile by position; the objectives' rows are run once more.
        directions: gradients of the risks, `(M, *shape)` by parameter.
        reference: what objectives compare with, prepared.
        tick: progress.
    """
    resolution, mixture = schedule.resolution, schedule.mixture
    at = schedule.risk_names.index("retain")
    masses = np.zeros(resolution.shape(len(mixture), 2))
    place_masses(
        schedule.plan,
        schedule.passes,
        mixture,
        {name: of[at] for name, of in directions.items()},
        reference,
        EffectArray(mixture, masses, resolution.indices_within).add_mixed,
        columns=resolution.columns()[1],
        tick=tick,
    )
    mass, opposed = resolution.kept(masses).swapaxes(0, 1)
    with np.errstate(invalid="ignore"):  # beyond a row's end there is nothing to divide
        share = opposed / mass
    dims = ("objective", *resolution.axes)
    return {"place_mass": (dims, mass), "place_conflict_share": (dims, share)}


def gradient_masses(
    gradients: Mapping[str, Tensor], retain: Mapping[str, Tensor], resolution: Resolution
) -> Tensor:
    """Masses of gradients, in all and of the entries that oppose the retain risk's gradient.

    Args:
        gradients: of the objectives, `(K, *shape)` by parameter.
        retain: of the retain risk, of each parameter's shape.
        resolution: says whether places are parameters, groups, or the whole model.

    Returns:
        `(n_places, 2, K)` fp64: sums of absolute entries, over all entries and over those whose
        sign is opposite to the retain risk's.
    """
    labels, columns = resolution.columns()
    n_objectives = len(next(iter(gradients.values())))
    masses = torch.zeros(len(labels), 2, n_objectives, dtype=torch.float64)
    for column, (name, of) in zip(columns, gradients.items(), strict=True):
        size = of.abs().flatten(1)
        against = (of * retain[name].to(of.device)).flatten(1) < 0
        masses[column, 0] += size.sum(1, dtype=torch.float64).cpu()
        masses[column, 1] += (size * against).sum(1, dtype=torch.float64).cpu()
    return masses


def check_second_order(risk: str, plan: Plan) -> None:
    """Raise `InputError` where second derivatives would not be the risk's, or only rounding.

    A risk other than `nll` may hold weights as constant. Weights of 16 bits round second
    derivatives away.
    """
    if risk != "nll":
        raise InputError(
            f"second_order: risk is '{risk}', which may hold weights as constant; use nll"
        )
    if any(p.dtype in HALF for p in plan.model.parameters()):
        raise InputError(
            "second_order: weights of 16 bits round second derivatives away; load the model "
            "with dtype float32"
        )


def curvature_of(
    schedule: Schedule, step: TakenStep | None, gradients: Mapping[str, Tensor], tick: Tick
) -> dict[str, Any]:
    """The variable `step_curvature`, and with a known learning rate `predicted_change_second`.

    Args:
        schedule: of the profile; the risks' rows are run once for each objective.
        step: that is taken with an objective's gradient; None: the gradient itself is the step.
        gradients: of the objectives, `(K, *shape)` by parameter.
        tick: progress.

    Raises:
        UnsupportedModelError: the model cannot be differentiated twice.
    """
    plan, n_risks = schedule.plan, len(schedule.risk_names)
    found = []
    for k in range(len(schedule.objectives)):
        own = {name: of[k] for name, of in gradients.items()}
        along = own if step is None else step.whole.taken(own)
        if k == 0:
            check_twice_differentiable(plan, schedule.first_risk_row, along)
        found.append(curvature_along(plan, schedule.risk_passes, n_risks, along, tick))
    slopes, curvatures = (torch.stack(each) for each in zip(*found, strict=True))
    dims = ("objective", "risk")
    variables = {"step_curvature": (dims, curvatures.numpy())}
    rate = None if step is None else step.metric.learning_rate
    if rate is not None:
        change = -rate * slopes + rate**2 / 2 * curvatures
        variables["predicted_change_second"] = (dims, change.numpy())
    return variables
