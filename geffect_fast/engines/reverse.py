"""The reverse engine: effects per parameter and sample, or position, from activation gradients.

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
from geffect_fast.engines.attempts import Attempt
from geffect_fast.engines.direction import Tick, add_gradients, new_gradients
from geffect_fast.engines.effect_array import Collect
from geffect_fast.engines.forward_pass import model_outputs, sample_axis
from geffect_fast.engines.packed_attention import packed_attention
from geffect_fast.engines.tasks import Reference, Task


@dataclass(frozen=True)
class Totals:
    """What one pass over the objectives' data gives, summed over samples.

    Attributes:
        values: `(K,)` fp64, the objectives' values.
        effects: `(K, M, P)` fp64: objective, direction, parameter.
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
    reference: Reference,
    collect: Collect,
    *,
    columns: Sequence[int] | None = None,
    per_token: bool = False,
    norms: bool,
    tick: Tick,
) -> Totals:
    """`effects[k, m, p, i] = <grad_p L_k of sample i, V_m>`, exact, for every trainable parameter.

    Args:
        plan: of the model.
        tasks: which objectives read which batches.
        directions: `(M, *shape)` for every trainable parameter.
        n_objectives: K.
        reference: what the objectives compare with.
        collect: receives each batch's effects, such as `EffectArray.add`.
        columns: for each parameter the column its effects are added to there, such as the number of
            its group; None: each its own.
        per_token: resolve by the token at whose position a module is used, not by sample: the
            summands `g_t^T V a_t`. A module of the generic rule is used where its output is.
        norms: also form the objectives' whole gradients (one more forward unit an objective).
        tick: progress.
    """
    number = {name: p for p, name in enumerate(plan.parameters)}
    columns = range(len(number)) if columns is None else columns
    n_columns = max(columns) + 1
    n_directions = next(iter(directions.values())).shape[0]
    directions = {
        name: in_working_precision(v, plan.parameters[name]) for name, v in directions.items()
    }
    totals = torch.zeros(n_objectives, n_directions, len(number), dtype=torch.float64)
    values = torch.zeros(n_objectives, dtype=torch.float64)
    gradients = new_gradients(plan, n_objectives) if norms else None
    parameters = list(plan.parameters.values())

    def add_batch(task: Task, attempt: Attempt, effects: Tensor) -> None:
        """Fill `effects`, of objectives that are not done yet, and add the batch to the sums."""
        batch, current = attempt.batch, 0
        own = list(task.parts)
        summed = totals.new_zeros(len(own), *totals.shape[1:])

        def add(name: str, factors: list[Factor], kept: list[Tensor | None]) -> None:
            score = sum(inner(f, directions[name], z) for f, z in zip(factors, kept, strict=True))
            score = torch.as_tensor(score).cpu()
            p = number[name]
            effects[current, :, columns[p]] += score
            summed[current, :, p] += score.sum(1)

        moved = batch.to(parameters[0].device)
        shared = directions if len(own) > 1 else None
        axis = sample_axis(plan.model, moved, per_token)
        with (
            packed_attention(plan.model, moved),
            nullcontext() if norms else plan.frozen(),
            Recorder(plan, add, axis, directions=shared) as recorder,
        ):
            outputs = model_outputs(plan.model, moved, task.needs)
            other = reference.outputs(task, batch, moved, outputs)
            roots = recorder.roots_of(outputs.token_logprob)
            sources = roots + (parameters if norms else [])
            wanted = [k for k, index in enumerate(own) if index not in attempt.done]
            for current in wanted:
                index = own[current]
                terms, value = task.terms(index, outputs, moved, other)
                loss = terms.sum()
                grads: Sequence[Tensor | None] = [None] * len(sources)
                if loss.requires_grad:  # else it reads a layer below all that can be trained
                    grads = torch.autograd.grad(
                        loss, sources, retain_graph=current != wanted[-1], allow_unused=True
                    )
                    recorder.finish()
                with attempt.finishing(index):
                    values[index] += value
                    totals[index] += summed[current]
                    if gradients is not None:
                        add_gradients(plan, gradients, index, grads[len(roots) :])

    for task in tasks:
        for attempt in task.attempts():
            batch, before = attempt.batch, attempt.done
            n = batch.total_tokens if per_token else batch.n_samples
            effects = totals.new_zeros(len(task.parts), n_directions, n_columns, n)
            with attempt:
                add_batch(task, attempt, effects)
                tick(batch.total_tokens)
            # Where memory ran out, what is not done has effects that are not whole.
            done = torch.tensor([index in attempt.done - before for index in task.parts])
            effects[~done] = 0
            collect(task, batch, effects)
    return Totals(values, totals, gradients)
