"""The reverse engine: effects per parameter and sample from activation gradients.

At a linear layer with inputs `a_t` and output gradients `g_t`,

    < grad_W L_i, V > = sum_{t in sample i}  g_t^T V a_t

so a backward that forms no weight gradient is enough, and `V a_t` is shared by all objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from geffect_fast.capture import Factor, Plan, Recorder
from geffect_fast.capture.products import in_working_precision, inner
from geffect_fast.engines.direction import Tick, add_gradients, new_gradients
from geffect_fast.engines.forward_pass import model_outputs, sample_axis
from geffect_fast.engines.tasks import Reference, Task


@dataclass(frozen=True)
class Effects:
    """What one pass over the objectives' data gives.

    Attributes:
        values: `(K,)` fp64, the objectives' values.
        effects: `(K, M, P, N)` fp64: objective, direction, parameter, sample.
        gradients: `(K, *shape)` by parameter, the objectives' whole gradients; None where not
            asked for.
    """

    values: Tensor
    effects: Tensor
    gradients: dict[str, Tensor] | None


def reverse_effects(
    plan: Plan,
    tasks: Sequence[Task],
    directions: Mapping[str, Tensor],
    n_objectives: int,
    n_samples: int,
    reference: Reference,
    *,
    norms: bool,
    tick: Tick,
) -> Effects:
    """`effects[k, m, p, i] = <grad_p L_k of sample i, V_m>`, exact, for every trainable parameter.

    Args:
        plan: of the model.
        tasks: which objectives read which batches.
        directions: `(M, *shape)` for every trainable parameter.
        n_objectives: K.
        n_samples: N, rows of all data sets together.
        reference: what the objectives compare with.
        norms: also form the objectives' whole gradients (one more forward unit an objective).
        tick: progress.
    """
    position = {name: p for p, name in enumerate(plan.parameters)}
    n_directions = next(iter(directions.values())).shape[0]
    directions = {
        name: in_working_precision(v, plan.parameters[name]) for name, v in directions.items()
    }
    effects = torch.zeros(n_objectives, n_directions, len(position), n_samples, dtype=torch.float64)
    values = torch.zeros(n_objectives, dtype=torch.float64)
    gradients = new_gradients(plan, n_objectives) if norms else None
    parameters = list(plan.parameters.values())

    for task in tasks:
        for batch in task.batches:
            rows = torch.tensor(batch.rows) + task.offset
            current = 0

            def add(name: str, factors: list[Factor], kept: list[Tensor | None]) -> None:
                score = sum(
                    inner(f, directions[name], z) for f, z in zip(factors, kept, strict=True)
                )
                effects[current, :, position[name], rows] += torch.as_tensor(score).cpu()  # noqa: B023

            moved = batch.to(parameters[0].device)
            shared = directions if len(task.parts) > 1 else None
            axis = sample_axis(plan.model, moved)
            with (
                nullcontext() if norms else plan.frozen(),
                Recorder(plan, add, axis, directions=shared) as recorder,
            ):
                outputs = model_outputs(plan.model, moved, task.needs)
                other = reference.outputs(task, batch, moved, outputs)
                roots = recorder.roots_of(outputs.token_logprob)
                sources = roots + (parameters if norms else [])
                for k, index in enumerate(task.parts):
                    current = index
                    loss, value = task.loss(index, outputs, moved, other)
                    values[index] += value
                    grads = torch.autograd.grad(
                        loss, sources, retain_graph=k + 1 < len(task.parts), allow_unused=True
                    )
                    recorder.finish()
                    if gradients is not None:
                        add_gradients(plan, gradients, index, grads[len(roots) :])
            tick(batch.total_tokens)
    return Effects(values, effects, gradients)
