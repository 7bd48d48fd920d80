"""The forward engine: effects of every objective, per predicted token, from one dual pass.

The effect is the derivative of the objective as the parameters move along a risk's gradient,

    < V, grad L(theta) >  =  d/d eps L(theta + eps V)  at 0,

so one forward pass that carries the tangents of its activations along `V` gives it for every
objective at once, term by term. M directions share the primal pass; nothing is kept for a backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geffect_fast.capture import Plan
from geffect_fast.data.batch import IGNORE, Batch
from geffect_fast.data.memory import free_memory
from geffect_fast.engines.batches import Collect, DataPass, Tick, each_batch, ranks_of
from geffect_fast.engines.dual.model import DualModel
from geffect_fast.engines.gathering import gathered
from geffect_fast.engines.objective_tangents import (
    no_derivative,
    term_tangents,
    terms_disagree,
)
from geffect_fast.engines.reference import Reference
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective
from geffect_fast.precision import precisions
from geffect_fast.transfer import OnItsWay, on_device


@dataclass(frozen=True)
class ParameterPass:
    """A pass over the data in which some parameters move, along some of the directions.

    Attributes:
        column: the place on the result's axis of parameters or groups where the effects are added.
        names: names of the parameters.
        risks: numbers of the directions.
    """

    column: int
    names: tuple[str, ...]
    risks: tuple[int, ...]


def parameter_passes_for(
    plan: Plan, columns: Sequence[int], n_directions: int, memory_bytes: int | None = None
) -> list[ParameterPass]:
    """The passes of a profile: one a column, or more where directions do not fit on the device.

    All directions of a pass share the primal pass, so directions are kept together as long as
    they fit. An effect is the sum of the effects of its parameters, so the parameters of one column
    are shared out over passes where even one direction does not fit.

    Args:
        plan: the model's plan.
        columns: for each parameter the number of its column.
        n_directions: M.
        memory_bytes: bytes that the directions of one pass may take; None: half of the free memory
            on a GPU, no limit on a CPU, where the directions lie already.
    """
    device = plan.device
    if memory_bytes is None:
        memory_bytes = free_memory(device) // 2 if device.type == "cuda" else 2**62
    of: list[list[str]] = [[] for _ in range(max(columns) + 1)]
    for name, column in zip(plan.parameters, columns, strict=True):
        of[column].append(name)
    sizes = [_n_bytes(plan, names) for names in of]
    if plan.shards is not None:  # all ranks make the same passes
        told = plan.shards.ranks.meet((memory_bytes, sizes))
        memory_bytes = min(memory for memory, _ in told)
        sizes = [max(each) for each in zip(*(own for _, own in told), strict=True)]
    passes = []
    for column, (names, size) in enumerate(zip(of, sizes, strict=True)):
        together = min(max(memory_bytes // max(size, 1), 1), n_directions)
        for first in range(0, n_directions, together):
            risks = tuple(range(first, min(first + together, n_directions)))
            # Shared-out parameters are whole block by block, and a block's weights take more space.
            pieces = _pieces(plan, names, memory_bytes) if plan.shards is None else [tuple(names)]
            for piece in pieces:
                passes.append(ParameterPass(column, piece, risks))
    return passes


def _pieces(plan: Plan, names: Sequence[str], memory_bytes: int) -> Iterator[tuple[str, ...]]:
    """Neighbouring parameters that together stay within the limit, or one that exceeds it alone."""
    piece: list[str] = []
    used = 0
    for name in names:
        size = _n_bytes(plan, [name])
        if piece and used + size > memory_bytes:
            yield tuple(piece)
            piece, used = [], 0
        piece.append(name)
        used += size
    yield tuple(piece)


def _n_bytes(plan: Plan, names: Sequence[str]) -> int:
    """Bytes that one direction of some parameters takes on a device.

    For parameters that are shared out, this rank's part, and the most that is whole at once.
    """
    whole = {
        name: plan.parameters[name].element_size() * plan.parameters[name].numel() for name in names
    }
    if plan.shards is None:
        return sum(whole.values())
    held = plan.held
    parts = sum(plan.parameters[n].element_size() * held[n].numel() for n in names)
    at_once = plan.shards.at_once([plan.parameters[name] for name in names])
    return parts + max(sum(p.element_size() * p.numel() for p in some) for some in at_once)


def forward_effects(
    plan: Plan,
    passes: Sequence[DataPass],
    directions: Mapping[str, Tensor],
    n_objectives: int,
    reference: Reference,
    collect: Collect,
    *,
    parameter_passes: Sequence[ParameterPass],
    per_token: bool = False,
    tick: Tick,
) -> tuple[Tensor, Tensor]:
    """Compute `effects[k, m, c, t]`: the derivative of term `t` of `L_k` along `V_m` in column `c`.

    Args:
        plan: the model's plan.
        passes: the batches, with the objectives that read them.
        directions: `(M, *shape)` for every trainable parameter, or a rank's part of it, on any
            device.
        n_objectives: K.
        reference: the model that the objectives compare with.
        collect: receives each batch's effects, such as `EffectArray.add`.
        parameter_passes: the passes over the data; together they move every parameter once along
            every direction.
        per_token: resolve by the token that is predicted, not by sample.
        tick: told of progress, once for every pass over a batch.

    Returns:
        The objectives' values `(K,)`, and effects summed over samples `(K, M, C)`, both fp64.
    """
    n_directions = next(iter(directions.values())).shape[0]
    n_columns = 1 + max(each.column for each in parameter_passes)
    compared: set[tuple[int, type]] = set()
    values = torch.zeros(n_objectives, dtype=torch.float64)
    totals = torch.zeros(n_objectives, n_directions, n_columns, dtype=torch.float64)
    model = DualModel(plan)
    with gathered(passes, collect) as collect:
        for number, parameter_pass in enumerate(parameter_passes):
            along, scale = _scaled_directions(plan, directions, parameter_pass)
            for data_pass, attempt in each_batch(passes, tick):
                batch = attempt.batch
                with attempt:
                    change, found = _changes(
                        model, data_pass, batch, along, reference, compared, first=number == 0
                    )
                if attempt.failed or attempt.idle:
                    continue
                change = change * scale[:, None, None]
                n = batch.total_tokens if per_token else batch.n_samples
                effects = totals.new_zeros(len(data_pass.parts), n_directions, n_columns, n)
                summed = (
                    _by_token(data_pass, batch, change) if per_token else _by_sample(batch, change)
                )
                risks, column = list(parameter_pass.risks), parameter_pass.column
                effects[:, risks, column] = summed.transpose(0, 1)
                for k, index in enumerate(data_pass.parts):
                    totals[index] += effects[k].sum(-1)
                if number == 0:
                    values[list(data_pass.parts)] += found
                collect(data_pass, batch, effects)
    ranks_of(passes).add_up([values, totals])
    return values, totals


def _changes(
    model: DualModel,
    data_pass: DataPass,
    batch: Batch,
    along: Mapping[str, Tensor],
    reference: Reference,
    compared: set[tuple[int, type]],
    *,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Derivatives of a data pass's terms on a batch; in the first parameter pass values too.

    Derivatives are `(M, K, total_tokens)` and values of parts `(K,)`, fp64 on the CPU. All numbers
    are brought over at once, at the end; until then nothing waits for the device.

    Args:
        model: the dual model of the plan.
        data_pass: the pass with the parts.
        batch: the batch, on the CPU.
        along: as `DualModel.outputs` takes directions.
        reference: the model that the objectives compare with.
        compared: classes of objectives, by data pass, whose terms' derivatives were compared with
            the derivative of the terms' sum. Classes that are compared here are added.
        first: whether this is the first parameter pass, in which all classes not in `compared` are
            compared.

    Raises:
        InputError: the terms' derivatives do not add up to the derivative of their sum.
    """
    parts = data_pass.parts
    batch = batch.to(next(iter(along.values())).device)
    outputs, tangents = model.outputs(along, batch, data_pass.needs)
    other = reference.outputs(data_pass, batch, outputs)
    # One objective of each class is compared: hyper-parameters change no code.
    classes: dict[type, list[Objective]] = {}
    for part in parts.values() if first else ():
        if (id(data_pass), type(part)) not in compared:
            classes.setdefault(type(part), []).append(part)

    def disagree(objective: Objective) -> Tensor:
        return terms_disagree(objective, outputs, batch, other, tangents[0])

    wrong = [disagree(some[0]) for some in classes.values()]
    change = torch.stack(
        [term_tangents(o, outputs, batch, other, tangents) for o in parts.values()], dim=1
    )
    values = [data_pass.value(k, outputs, batch, other) for k in parts] if first else []
    numbers = [torch.as_tensor(x, dtype=torch.float64, device=change.device) for x in values]
    numbers += [x.double() for x in wrong]
    (found,) = OnItsWay(torch.cat([change.flatten(), *(x.flatten() for x in numbers)])).arrived()
    change, found = found[: change.numel()].view(change.shape), found[change.numel() :]
    for (kind, some), said in zip(classes.items(), found[len(values) :].view(-1, 2), strict=True):
        for objective in some:
            # the next of a class is compared, and waited for, where the first showed nothing
            is_wrong, nothing = (said if objective is some[0] else disagree(objective)).tolist()
            if is_wrong:
                raise no_derivative(objective)
            if not nothing:
                compared.add((id(data_pass), kind))
                break
    return change, found[: len(values)]


def _scaled_directions(
    plan: Plan, directions: Mapping[str, Tensor], parameter_pass: ParameterPass
) -> tuple[dict[str, Tensor], Tensor]:
    """A pass's directions on the parameters' devices in their dtypes, and a scale for each.

    Effects are to be multiplied by the scales. Where a model computes in fp16, directions are
    divided by them, to a length at which nothing underflows; otherwise the scales are 1.
    """
    numbers = parameter_pass.risks
    scale = torch.ones(len(numbers), dtype=torch.float64)
    risks = slice(numbers[0], numbers[-1] + 1)  # neighbours, so a slice and no copy
    chosen = {name: directions[name][risks] for name in parameter_pass.names}
    if torch.float16 in precisions(plan.model):
        squares = torch.stack(
            [v.double().flatten(1).square().sum(1).cpu() for v in chosen.values()]
        ).sum(0)
        if plan.shards is not None:
            plan.shards.add_up([squares])
        # a direction that is zero stays zero, also in fp32
        scale = squares.sqrt().clamp(min=2.0**-100).log2().round().exp2()
        inverse = on_device(1 / scale, next(iter(chosen.values())).device)
        chosen = {
            n: v * inverse.to(v.dtype).view(-1, *[1] * (v.dim() - 1)) for n, v in chosen.items()
        }
    places = {name: plan.parameters[name] for name in chosen}
    return {
        name: v.to(places[name].device, places[name].dtype) for name, v in chosen.items()
    }, scale


def _by_sample(batch: Batch, change: Tensor) -> Tensor:
    """Sums over the tokens of each sample: `(M, K, total_tokens)` to `(M, K, n_samples)`."""
    sample = batch.token_sample()
    return change.new_zeros(*change.shape[:2], batch.n_samples).index_add_(2, sample, change)


def _by_token(data_pass: DataPass, batch: Batch, change: Tensor) -> Tensor:
    """The terms' derivatives, each at the token that the term is about.

    A term at the position that predicts a token is shifted one place, to the token itself.

    Raises:
        InputError: a term is about a token that holds no label.
    """
    ahead = torch.tensor([part.term_at == "prediction" for part in data_pass.parts.values()])
    shifted = torch.cat([torch.zeros_like(change[..., :1]), change[..., :-1]], dim=-1)
    by_token = torch.where(ahead[:, None], shifted, change)
    elsewhere = (by_token[..., batch.labels == IGNORE] != 0).any(-1).any(0)
    if elsewhere.any():
        part = list(data_pass.parts.values())[int(elsewhere.nonzero()[0])]
        raise InputError(
            f"objective {part}: token_terms has a term at a position that predicts no label, so it "
            "belongs to no token of an answer; resolve without 'token', or set its `term_at`"
        )
    return by_token
