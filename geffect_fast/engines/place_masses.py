"""Masses of objectives' gradients by place, in all and where they oppose another gradient.

A place is one token of one row, and a mass is a sum of absolute values. The gradient of what a
module does at a place is the one that the reverse engine takes effects by position from. Masses are
not linear: the mass of a sum of objectives is not the sum of its parts' masses, so one backward is
run for the whole sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from geffect_fast.capture import Plan, Recorder, Recording
from geffect_fast.capture.exchange import Gathered, one_ahead
from geffect_fast.capture.factors import Factor
from geffect_fast.capture.masses import opposed_masses
from geffect_fast.capture.products import in_working_precision
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import Attempt, DataPass, Tick, each_batch
from geffect_fast.engines.gathering import gathered
from geffect_fast.engines.model_outputs import model_outputs, packed_attention, sample_axis
from geffect_fast.engines.reference import Reference
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective
from geffect_fast.transfer import on_device


def check_places_apart(
    objectives: Sequence[Objective], passes: Sequence[DataPass], mixture: Tensor
) -> None:
    """Refuse an objective whose gradient at one place comes from two passes over its row.

    Args:
        objectives: the K objectives.
        passes: the batches, with the parts that read them.
        mixture: `(K, n_parts)`, the coefficient of each part in each objective.

    Raises:
        InputError: there is such an objective; the message names it.
    """
    for objective, counts in zip(objectives, mixture, strict=True):
        read: dict[tuple[str, str], DataPass] = {}
        for data_pass in passes:
            for index, part in data_pass.parts.items():
                for role in part.roles if counts[index] else ():
                    if read.setdefault((data_pass.on, role), data_pass) is not data_pass:
                        raise InputError(
                            f"conflicts: the parts of objective '{objective}' read a "
                            f"{data_pass.on} row's {role} in different forwards, alone and with "
                            "more of the row, so its gradient cannot be resolved by position; "
                            "give the parts as objectives of their own, or resolve without "
                            "'position'"
                        )


def place_masses(
    plan: Plan,
    passes: Sequence[DataPass],
    mixture: Tensor,
    other: Mapping[str, Tensor],
    reference: Reference,
    collect: Callable[[DataPass, Batch, Tensor], None],
    *,
    columns: Sequence[int],
    tick: Tick,
) -> None:
    """Measure the masses of gradients by objective, column of parameters and place.

    Each batch takes one forward, and for each objective one backward that forms no weight gradient.
    A module of the generic rule takes one backward of its own for each place.

    Args:
        plan: the model's plan.
        passes: the batches, with the parts of objectives that read them; see `check_places_apart`.
        mixture: `(K, n_parts)`, the coefficient of each part in each objective.
        other: the gradient that the objectives' gradients may oppose, of each parameter's shape, or
            this rank's part of it.
        reference: the model that objectives compare with, prepared.
        collect: receives masses `(K, 2, C, n)` fp64 for the `n` tokens of each batch, first of all
            elements, then of those that oppose `other`; such as `EffectArray.add_mixed`. Masses
            that are given for one batch add up.
        columns: for each parameter the column its masses are added to.
        tick: told of progress.

    Raises:
        UnsupportedModelError: a module's rows cannot be told apart by position; it is named.
    """
    measured = _Masses(plan, other, columns)

    def run(data_pass: DataPass, attempt: Attempt, masses: Tensor) -> None:
        parts = data_pass.parts
        wanted = [
            k for k, of in enumerate(mixture) if of[list(parts)].any() and k not in attempt.done
        ]
        if not wanted:
            return
        measured.found = masses.new_zeros(masses.shape[1:], device=plan.device)
        batch = attempt.batch.to(plan.device)
        axis = sample_axis(plan.model, batch, per_token=True)
        recording = Recording(joined=True, one_backward=len(wanted) == 1)
        recorder = Recorder(plan, measured, axis, recording)
        with packed_attention(plan.model, batch), plan.frozen(), recorder:
            outputs = model_outputs(plan.model, batch, data_pass.needs)
            compared = reference.outputs(data_pass, batch, outputs)
            roots = recorder.roots_of(outputs.token_logprob)
            for k in wanted:
                counts = [(float(mixture[k, index]), part) for index, part in parts.items()]
                terms = [
                    count * part.token_terms(outputs, batch, compared).sum()
                    for count, part in counts
                    if count
                ]
                loss = torch.stack(terms).sum()
                measured.found.zero_()
                if loss.requires_grad:  # else it reads a layer below all trainable ones
                    torch.autograd.grad(
                        loss, roots, retain_graph=k != wanted[-1], allow_unused=True
                    )
                    recorder.finish()
                with attempt.finishing(k):
                    masses[k] = measured.found.cpu()

    with gathered(passes, collect) as collect:
        for data_pass, attempt in each_batch(passes, tick):
            n = attempt.batch.total_tokens
            masses = torch.zeros(len(mixture), 2, max(columns) + 1, n, dtype=torch.float64)
            with attempt:
                run(data_pass, attempt, masses)
            if not attempt.idle:
                collect(data_pass, attempt.batch, masses)


class _Masses:
    """A receiver of a recorder's factors that adds up masses, of all and of opposing elements.

    Where ranks share out the model, the signs of the other gradient are brought together when the
    backward is over, one parameter after the other and in the same order on every rank.

    Args:
        plan: the model's plan.
        other: as `place_masses` takes it.
        columns: as `place_masses` takes them.

    Attributes:
        found: `(2, C, n)` fp64, masses of all and of opposing elements at the tokens of one batch.
    """

    def __init__(self, plan: Plan, other: Mapping[str, Tensor], columns: Sequence[int]) -> None:
        self._plan, self._other = plan, other
        self._column = dict(zip(plan.parameters, columns, strict=True))
        self._with_zeros = {name for name, of in other.items() if bool((of == 0).any())}
        if plan.shards is not None:
            self._with_zeros = set[str]().union(*plan.shards.ranks.meet(self._with_zeros))
        self._waiting: dict[str, list[Factor]] = {}
        self.found = torch.zeros(0)

    def __call__(self, name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        if self._plan.shards is None:
            self._add(name, factors, self._signs(name))
        else:
            self._waiting.setdefault(name, []).extend(factors)

    def finish(self) -> None:
        """Measure the factors that waited; called after every backward, on all ranks."""
        shards = self._plan.shards
        if shards is None:
            return
        coming = (
            (name, Gathered(self._signs(name).to(torch.int8)[None], shards.own(whole)))
            for name, whole in self._plan.parameters.items()
        )
        for name, signs in one_ahead(coming):
            factors, arrived = self._waiting.pop(name, None), signs.arrived()[0]
            if factors is not None:
                self._add(name, factors, arrived.to(self._other[name].dtype))

    def _signs(self, name: str) -> Tensor:
        return on_device(self._other[name].sign(), self._plan.parameters[name].device)

    def _add(self, name: str, factors: list[Factor], signs: Tensor) -> None:
        signs = in_working_precision(signs, self._plan.parameters[name])
        masses = opposed_masses(factors, signs, name in self._with_zeros)
        self.found[:, self._column[name]] += masses.to(self.found.device)
