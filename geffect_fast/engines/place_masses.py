"""Sizes of the objectives' gradients place by place, and of what of them opposes another gradient.

The gradient of what a module does at one place, one token of one row, is what the reverse engine
takes effects by position from. Sizes are not linear: those of a sum of objectives are not sums of
its parts' sizes, so the backward is of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from geffect_fast.capture import Plan, Recorder, Recording
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
        objectives: the K.
        passes: which parts read which batches.
        mixture: `(K, n_parts)`, how often each part counts in each objective.

    Raises:
        InputError: naming the objective.
    """
    for objective, counts in zip(objectives, mixture, strict=True):
        read: dict[tuple[str, str], DataPass] = {}
        for data_pass in passes:
            for index, part in data_pass.parts.items():
                for role in part.roles if counts[index] else ():
                    if read.setdefault((data_pass.on, role), data_pass) is not data_pass:
                        raise InputError(
                            f"conflicts: of objective '{objective}' some parts read a "
                            f"{data_pass.on} row's {role} alone and others with more of the row, "
                            "so its gradient cannot be told apart by place; give the parts as "
                            "objectives of their own, or resolve without 'position'"
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
    """Sizes of gradients by objective, part of the model and place.

    One forward a batch, and for each objective a backward that forms no weight gradient. A module
    of the generic rule takes one backward of its own a place.

    Args:
        plan: of the model.
        passes: which parts of objectives read which batches; see `check_places_apart`.
        mixture: `(K, n_parts)`, how often each part counts in each objective.
        other: the gradient that objectives' may oppose, of each parameter's shape.
        reference: what objectives compare with, prepared.
        collect: receives each batch's sizes, and those of what opposes, `(K, 2, C, n)` fp64 with
            its `n` tokens, such as `EffectArray.place`; what it is given for one batch adds up.
        columns: for each parameter the column its sizes are added to.
        tick: progress.

    Raises:
        UnsupportedModelError: a module whose rows cannot be told apart by position; it is named.
    """
    column, n_columns = dict(zip(plan.parameters, columns, strict=True)), max(columns) + 1
    with_zeros = {name for name, of in other.items() if bool((of == 0).any())}

    def run(data_pass: DataPass, attempt: Attempt, masses: Tensor) -> None:
        parts = data_pass.parts
        wanted = [
            k for k, of in enumerate(mixture) if of[list(parts)].any() and k not in attempt.done
        ]
        if not wanted:
            return
        found = masses.new_zeros(masses.shape[1:], device=plan.device)

        def measure(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
            p = plan.parameters[name]
            signs = in_working_precision(on_device(other[name].sign(), p.device), p)
            sizes = opposed_masses(factors, signs, name in with_zeros)
            found[:, column[name]] += sizes.to(found.device)

        moved = attempt.batch.to(plan.device)
        axis = sample_axis(plan.model, moved, per_token=True)
        recording = Recording(joined=True, one_backward=len(wanted) == 1)
        recorder = Recorder(plan, measure, axis, recording)
        with packed_attention(plan.model, moved), plan.frozen(), recorder:
            outputs = model_outputs(plan.model, moved, data_pass.needs)
            compared = reference.outputs(data_pass, attempt.batch, moved, outputs)
            roots = recorder.roots_of(outputs.token_logprob)
            for k in wanted:
                counts = [(float(mixture[k, index]), part) for index, part in parts.items()]
                terms = [
                    count * part.token_terms(outputs, moved, compared).sum()
                    for count, part in counts
                    if count
                ]
                loss = torch.stack(terms).sum()
                found.zero_()
                if loss.requires_grad:  # else it reads a layer below all that can be trained
                    torch.autograd.grad(
                        loss, roots, retain_graph=k != wanted[-1], allow_unused=True
                    )
                    recorder.finish()
                with attempt.finishing(k):
                    masses[k] = found.cpu()

    with gathered(passes, collect) as collect:
        for data_pass, attempt in each_batch(passes, tick):
            n = attempt.batch.total_tokens
            masses = torch.zeros(len(mixture), 2, n_columns, n, dtype=torch.float64)
            with attempt:
                run(data_pass, attempt, masses)
            collect(data_pass, attempt.batch, masses)
