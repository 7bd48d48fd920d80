"""The reverse engine: effects per parameter and sample, or position, from activation gradients.

At a linear layer with inputs `a_t` and output gradients `g_t`,

    < grad_W L_i, V > = sum_{t in sample i}  g_t^T V a_t

so a backward that forms no weight gradient is enough, and `V a_t` is shared by all objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geffect_fast.capture import Plan, Recorder, Recording
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import (
    Attempt,
    Collect,
    DataPass,
    Tick,
    each_batch,
    ranks_of,
)
from geffect_fast.engines.directions import (
    Directions,
    add_gradients,
    backwards,
    inner_products,
    new_gradients,
    place_beside,
    rows_of,
)
from geffect_fast.engines.gathering import gathered
from geffect_fast.engines.model_outputs import (
    model_outputs,
    nll_by_sample,
    packed_attention,
    sample_axis,
)
from geffect_fast.engines.reference import Reference
from geffect_fast.transfer import OnItsWay


@dataclass(frozen=True)
class EffectSums:
    """Sums over samples from one pass over the objectives' data.

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
    passes: Sequence[DataPass],
    directions: Mapping[str, Tensor],
    n_objectives: int,
    reference: Reference,
    collect: Collect,
    *,
    columns: Sequence[int] | None = None,
    per_token: bool = False,
    norms: bool,
    tick: Tick,
) -> EffectSums:
    """`effects[k, m, p, i] = <grad_p L_k of sample i, V_m>`, exact, for every trainable parameter.

    Args:
        plan: the model's plan.
        passes: the batches, with the objectives that read them.
        directions: `(M, *shape)` for every trainable parameter, on the parameters' devices or on
            the CPU. In the latter case whole gradients of objectives are kept on the CPU too.
        n_objectives: K.
        reference: the model that the objectives compare with.
        collect: receives each batch's effects, such as `EffectArray.add`.
        columns: for each parameter the column of its effects in what `collect` receives, such as
            the number of its group; None: a column of its own.
        per_token: resolve by the token at whose position a module is used, not by sample: the
            summands `g_t^T V a_t`. A module of the generic rule is used where its output is.
        norms: also form the objectives' whole gradients (one more forward unit an objective).
        tick: told of progress.
    """
    number = {name: p for p, name in enumerate(plan.parameters)}
    columns = range(len(number)) if columns is None else columns
    n_directions, kept_on = len(next(iter(directions.values()))), place_beside(directions)
    directions = Directions(plan, directions)
    totals = EffectSums(
        torch.zeros(n_objectives, dtype=torch.float64),
        torch.zeros(n_objectives, n_directions, len(number), dtype=torch.float64),
        new_gradients(plan, n_objectives, kept_on) if norms else None,
    )
    rows = [] if totals.gradients is None else rows_of(totals.gradients)
    parameters = list(plan.parameters.values())
    before: _Found | None = None

    def run(data_pass: DataPass, attempt: Attempt, found: _Found) -> None:
        """Run the batch for the objectives that are not done yet."""
        own = list(data_pass.parts)
        products = inner_products(plan, directions.__getitem__)
        batch = attempt.batch.to(parameters[0].device)
        shared = directions if len(own) > 1 and plan.shards is None else None
        axis = sample_axis(plan.model, batch, per_token)
        with (
            packed_attention(plan.model, batch),
            plan.summing() if norms else plan.frozen(),
            Recorder(plan, products, axis, Recording(directions=shared)) as recorder,
        ):
            outputs = model_outputs(plan.model, batch, data_pass.needs)
            other = reference.outputs(data_pass, batch, outputs)
            roots = recorder.roots_of(outputs.token_logprob)
            sources = roots + (parameters if norms else [])
            if recorder.to_be_shown():
                shown_by = roots + (plan.sources() if norms else [])
                recorder.show_rows(nll_by_sample(outputs, batch), shown_by)
            evaluated = plan, data_pass, attempt, outputs, batch, other
            for index, value, grads in backwards(*evaluated, sources, recorder):
                with attempt.finishing(index):
                    if not attempt.idle:
                        scores = [(number[name], score) for name, score in products.found]
                        found.add(own.index(index), value, scores)
                    if norms:
                        add_gradients(rows[index], grads[len(roots) :])
                products.found.clear()

    with gathered(passes, collect) as collect:
        for data_pass, attempt in each_batch(passes, tick):
            batch = attempt.batch
            found = _Found(data_pass, batch, batch.total_tokens if per_token else batch.n_samples)
            with attempt:
                run(data_pass, attempt, found)
            found.send()
            if before is not None:  # the device is busy with this batch meanwhile
                before.hand_over(totals, columns, collect)
            before = found
        if before is not None:
            before.hand_over(totals, columns, collect)
    sums = [totals.values, totals.effects]
    if totals.gradients is not None and plan.shards is None:
        sums += totals.gradients.values()
    ranks_of(passes).add_up(sums)
    return totals


class _Found:
    """The values and scores of one batch, gathered by objective and then copied to the host.

    Args:
        data_pass: the pass that the batch belongs to.
        batch: the batch.
        n: number of the batch's samples, or tokens.
    """

    def __init__(self, data_pass: DataPass, batch: Batch, n: int) -> None:
        self.data_pass = data_pass
        self.batch = batch
        self.n = n
        self._parts: list[int] = []
        self._values: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        """For every score the number of its objective in the pass, and of its parameter."""
        self._scores: list[Tensor] = []
        self._copy: OnItsWay | None = None

    def add(self, k: int, value: Tensor, scores: Sequence[tuple[int, Tensor]]) -> None:
        """Add the value of the pass's objective `k`, and its scores `(M, n)` by parameter."""
        self._parts.append(k)
        self._values.append(value)
        self._places += [(k, p) for p, _ in scores]
        self._scores += [score for _, score in scores]

    def send(self) -> None:
        """Start the copy to the host. Nothing may be added afterwards."""
        if self._values:
            lists = (self._values, self._scores)
            self._copy = OnItsWay(*(torch.stack(tensors) for tensors in lists if tensors))
        self._values, self._scores = [], []

    def hand_over(self, totals: EffectSums, columns: Sequence[int], collect: Collect) -> None:
        """Add the batch to the totals, and give its effects to `collect`."""
        if self._copy is None:
            return  # memory ran out before the first objective was done
        values, *scores = self._copy.arrived()
        parts = list(self.data_pass.parts)
        totals.values[[parts[k] for k in self._parts]] += values
        n_directions, n_columns = totals.effects.shape[1], max(columns) + 1
        effects = values.new_zeros(len(parts) * n_columns, n_directions, self.n)
        if scores:
            found, k, p = scores[0].double(), *torch.tensor(self._places).T
            effects.index_add_(0, k * n_columns + torch.tensor(columns)[p], found)
            summed = values.new_zeros(len(parts), totals.effects.shape[2], n_directions)
            summed.flatten(0, 1).index_add_(0, k * summed.shape[1] + p, found.sum(-1))
            totals.effects[parts] += summed.mT
        effects = effects.unflatten(0, (len(parts), n_columns)).movedim(1, 2)
        collect(self.data_pass, self.batch, effects)
