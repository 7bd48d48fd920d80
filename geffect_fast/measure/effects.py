"""The effects of all parts of objectives, found by the engine that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from geffect_fast.capture import Plan
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import Collect, DataPass, Tick
from geffect_fast.engines.choice import Engine
from geffect_fast.engines.directions import accumulate_gradients, place_beside
from geffect_fast.engines.forward import ParameterPass, forward_effects
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.measure.step_metric import NextStep
from geffect_fast.objectives import Objective
from geffect_fast.results.axes import EffectArray, Resolution
from geffect_fast.results.dataset import (
    check_coverage,
    check_effects,
    check_norms,
    gram_matrices,
)


@dataclass(frozen=True)
class Effects:
    """The sums over samples that an engine found. Effects by sample are in the result's array.

    Attributes:
        values: `(n_parts,)` fp64, the values of the objectives' parts.
        summed: `(n_parts, M, C)` fp64, effects of the parts along the M directions.
        places: names of the C places: parameters, or groups of them.
        gram: `(P, M + n_parts, M + n_parts)` fp64, Gram matrices of the gradients of risks and
            parts by parameter; `(P, M, M)` from the forward engine; None where not formed.
        gradients: of the parts, whole, `(n_parts, *shape)` by parameter; None where not formed.
    """

    values: Tensor
    summed: Tensor
    places: Sequence[str]
    gram: Tensor | None
    gradients: Mapping[str, Tensor] | None = None

    def checked_gram(
        self,
        plan: Plan,
        mixture: Tensor,
        risk_names: Sequence[str],
        parts: Sequence[Objective],
        objectives: Sequence[Objective],
    ) -> Tensor | None:
        """`gram` with objectives in place of their parts, all numbers checked; None: not formed.

        Args:
            plan: of the model.
            mixture: as `find_effects` takes it.
            risk_names, parts, objectives: the M risks, the parts, and the objectives that are
                weighted sums of the parts.

        Raises:
            NonFiniteError: an effect, a value or a norm is not finite.
            UnsupportedModelError: the samples' shares miss a gradient.
        """
        check_effects(self.summed, self.values, parts, self.places)
        mixed = torch.tensordot(mixture, self.summed, dims=1)
        check_effects(mixed, mixture @ self.values, objectives, self.places)
        gram, m = self.gram, len(risk_names)
        if gram is None:
            return None
        if gram.shape[1] > m:
            check_coverage(plan, self.summed, gram, m)
            onto = torch.block_diag(torch.eye(m, dtype=torch.float64), mixture)
            gram = onto @ gram @ onto.T
        check_norms(gram, [*risk_names, *objectives])
        return gram


def find_effects(
    engine: Engine,
    plan: Plan,
    passes: Sequence[DataPass],
    directions: Mapping[str, Tensor],
    reference: Reference,
    mixture: Tensor,
    resolution: Resolution,
    array: Any,
    *,
    parameter_passes: Sequence[ParameterPass],
    norms: bool,
    tick: Tick,
    step: NextStep | None = None,
) -> Effects:
    """Run the engine over the objectives' data.

    Args:
        engine: `forward` or `reverse`.
        plan: of the model.
        passes: which parts read which batches.
        directions: `(M, *shape)` for every trainable parameter, already multiplied with `P` where
            effects are in a step's metric.
        reference: what objectives compare with, prepared.
        mixture: `(K, n_parts)`, how often each part counts in each objective.
        resolution: the axes.
        array: effects of `resolution.shape`, added to in place; None: another rank holds the array.
        parameter_passes: of the forward engine.
        norms: whether the reverse engine forms whole gradients too.
        tick: progress.
        step: the step in whose metric effects and Gram matrices are; None: they are plain.
    """
    form = gram_matrices if step is None else step.gram
    grams = partial(whole_grams, plan, form)
    labels, columns = resolution.columns()
    n_parts = mixture.shape[1]
    names = list(plan.parameters)
    within = resolution.within is not None
    effects = EffectArray(mixture, array, resolution.indices_within if within else None)
    collect: Collect = _nowhere if array is None else effects.add
    if engine == "forward":
        values, summed = forward_effects(
            plan,
            passes,
            directions,
            n_parts,
            reference,
            collect,
            parameter_passes=parameter_passes,
            per_token=within,
            tick=tick,
        )
        places = [label or "the whole model" for label in labels]
        return Effects(values, summed, places, grams(directions))
    if resolution.per_sample:
        totals = reverse_effects(
            plan,
            passes,
            directions,
            n_parts,
            reference,
            collect,
            columns=columns,
            per_token=within,
            norms=norms,
            tick=tick,
        )
        whole = totals.gradients
        gram = None if whole is None else grams(directions, whole)
        return Effects(totals.values, totals.effects, names, gram, whole)
    kept_on = place_beside(directions)
    values, whole = accumulate_gradients(plan, passes, n_parts, reference, tick, kept_on)
    gram = grams(directions, whole)
    n_risks = gram.shape[1] - n_parts
    summed = gram[:, n_risks:, :n_risks].permute(1, 2, 0)
    effects.add_whole(columns, summed)
    return Effects(values, summed, names, gram, whole)


def _nowhere(_data_pass: DataPass, _batch: Batch, _effects: Tensor) -> None:
    """Drop effects of a batch, since another rank writes them to its file."""


def whole_grams(
    plan: Plan, form: Callable[..., Tensor], *gradients: Mapping[str, Tensor]
) -> Tensor:
    """Gram matrices of whole gradients, summed over ranks where each rank holds a part of them.

    Args:
        plan: of the model.
        form: `gram_matrices` or `NextStep.gram`, which forms the matrices of this rank's part.
        gradients: as `form` takes them.
    """
    grams = form(*gradients)
    if plan.shards is not None:
        plan.shards.add_up([grams])
    return grams


def mixed_gradients(mixture: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of objectives, `(K, *shape)` by parameter, from those of their parts.

    Args:
        mixture: `(K, n_parts)`, how often each part counts in each objective.
        gradients: `(n_parts, *shape)` by parameter.
    """
    return {
        name: torch.tensordot(mixture.to(of.device, of.dtype), of, dims=1)
        for name, of in gradients.items()
    }
