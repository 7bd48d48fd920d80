"""What stands beside effects: those of the step that is taken, conflicts, second derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.errors import InputError
from geffect_fast.measure.rounding import HALF
from geffect_fast.measure.step_metric import StepMetric
from geffect_fast.objectives import Objective
from geffect_fast.results.axes import Resolution
from geffect_fast.results.dataset import check_effects


def effects_beside(
    metric: StepMetric,
    parameters: Mapping[str, nn.Parameter],
    directions: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    mixture: Tensor,
    objectives: Sequence[Objective],
    resolution: Resolution,
) -> dict[str, Any]:
    """`step_effect` (objective, risk, part of the model), and what goes with it, by name.

    They are products of whole gradients, and rows are not run again for them.

    Args:
        metric: of the step.
        parameters: the trainable ones, by name.
        directions: gradients of the risks, `(M, *shape)` by parameter.
        gradients: of the objectives or their parts, `(n, *shape)`.
        mixture: `(K, n)`, how often each of them counts in each objective's.
        objectives: K.
        resolution: says the parts of the model.

    Raises:
        NonFiniteError: an effect is not finite.
    """
    effects, *beside = metric.products(
        parameters, directions, gradients, mixture, metric.formed_of(objectives)
    )
    values = torch.zeros(len(objectives), dtype=torch.float64)  # which were checked
    check_effects(effects, values, objectives, list(directions))
    variables = metric.variables(resolution, effects.sum(-1), beside)
    labels, columns = resolution.columns()
    placed = effects.new_zeros(*effects.shape[:2], len(labels))
    placed.index_add_(2, torch.tensor(columns), effects)
    by = resolution.by_place
    if by is None:
        return variables | {"step_effect": (("objective", "risk"), placed[..., 0].numpy())}
    return variables | {"step_effect": (("objective", "risk", by), placed.numpy())}


def gradient_masses(
    gradients: Mapping[str, Tensor], retain: Mapping[str, Tensor], resolution: Resolution
) -> Tensor:
    """Sizes of gradients, and of what of them opposes the retain risk's, by part of the model.

    Args:
        gradients: the objectives', `(K, *shape)` by parameter.
        retain: the retain risk's, of the parameter's shape.
        resolution: says the parts.

    Returns:
        `(n_parts, 2, K)` fp64: sums of absolute entries, and of those whose sign is another.
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


def conflict_variables(masses: Tensor, traces: Tensor, resolution: Resolution) -> dict[str, Any]:
    """`gradient_mass`, `conflict_share` and `fisher_trace` by name.

    Args:
        masses: as `gradient_masses` gives them.
        traces: of the risks' Fisher matrices, `(M, P)` fp64 by parameter.
        resolution: says the parts of the model.
    """
    labels, columns = resolution.columns()
    of_parts = traces.new_zeros(len(traces), len(labels))
    of_parts.index_add_(1, torch.tensor(columns), traces)
    found = {
        "gradient_mass": ("objective", masses[:, 0]),
        "conflict_share": ("objective", masses[:, 1] / masses[:, 0]),
        "fisher_trace": ("risk", of_parts.T),
    }
    by = resolution.by_place
    return {
        name: ((dim,), of[0].numpy()) if by is None else ((by, dim), of.numpy())
        for name, (dim, of) in found.items()
    }


def check_second_order(risk: str, plan: Plan) -> None:
    """Raise `InputError` where second derivatives would be of another risk, or of rounding."""
    if risk != "nll":
        raise InputError(
            f"second_order: risk is '{risk}', which may hold weights as constant; use nll"
        )
    if any(p.dtype in HALF for p in plan.model.parameters()):
        raise InputError(
            "second_order: weights of 16 bits round second derivatives away; load the model "
            "with dtype float32"
        )


def second_order_variables(
    slopes: Tensor, curvatures: Tensor, learning_rate: float | None
) -> dict[str, Any]:
    """`step_curvature`, and `predicted_change_second` where the size of a step is known.

    Args:
        slopes, curvatures: of the risks along a step of each objective, `(K, M)`.
        learning_rate: of the step.
    """
    dims = ("objective", "risk")
    variables = {"step_curvature": (dims, curvatures.numpy())}
    if learning_rate is not None:
        change = -learning_rate * slopes + learning_rate**2 / 2 * curvatures
        variables["predicted_change_second"] = (dims, change.numpy())
    return variables
