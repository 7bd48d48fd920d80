"""`profile`: from a model and two data sets to effects with names on every axis."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.data import estimate_token_budget, make_batches
from geffect_fast.data.batch import Batch, Reduction, Role
from geffect_fast.engines.choice import Choice, choose_engine
from geffect_fast.engines.direction import Tick, accumulate_gradients
from geffect_fast.engines.forward_check import forward_mode_problem
from geffect_fast.engines.forward_parts import parts_for, place_for_directions, product_shares
from geffect_fast.engines.layout import choose_layout
from geffect_fast.engines.tasks import Reference, Task, mixture_of, tasks_for
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.objectives import Objective
from geffect_fast.runs.arguments import (
    check_arguments,
    check_memory,
    check_model,
    check_needs_no_refusals,
    check_needs_no_weights,
    read_sets,
    reference_for,
    resolved_list,
    resolved_risk,
)
from geffect_fast.runs.axes import checked_blocks
from geffect_fast.runs.budget import within_budget
from geffect_fast.runs.coverage import Coverage
from geffect_fast.runs.dataset import (
    check_coverage,
    check_directions,
    check_effects,
    check_norms,
    dataset,
)
from geffect_fast.runs.effects import find_effects
from geffect_fast.runs.progress import progress_bar
from geffect_fast.runs.resolution import Resolution, checked_axes
from geffect_fast.runs.stream import EffectFile

if TYPE_CHECKING:
    import xarray as xr


def profile(
    model: nn.Module,
    tokenizer: Any,
    *,
    forget: Any,
    retain: Any,
    objectives: Sequence[str | Objective] | str,
    probes: Mapping[str, Any] | None = None,
    refusals: Any = None,
    reference_model: nn.Module | str | Path | None = None,
    resolve: Sequence[str] = ("parameter", "sample"),
    engine: str = "auto",
    reduction: Reduction = "token",
    risk: str | Objective = "nll",
    norms: bool | None = None,
    groups: Mapping[str, Any] | None = None,
    template: str = "auto",
    max_length: int | None = None,
    token_budget: int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """The G-effect of unlearning objectives on a model's risks: by parameter, sample, position.

        e = < grad R(D), grad L(D_u) >

    A descent step of size `lr` on `L` changes the risk `R(D)` by `-lr e` to first order. Wanted:
    `e` strongly negative for the risk on what must go (`unlearn`), zero or positive elsewhere
    (`retain`).

    Args:
        model: a causal language model of transformers in eval mode; trainable parameters are
            profiled, frozen ones skipped. It is left as it was.
        tokenizer: of transformers; None for samples that are tokenised already.
        forget: what must go: a path to JSON or JSON lines of `question` and `answer`, a hub id, a
            list of dicts, a torch Dataset, or tokenised samples (`input_ids`, unshifted `labels`).
        retain: what must stay, likewise.
        objectives: strings such as `npo(beta=0.1) + 1.0*kl`, or `geffect_fast.objectives` objects.
        probes: further data sets by name, each a risk of its own.
        refusals: answers that po, dpo and altpo put in place of the forget set's, where a row has
            no field `alternative`, one or a list, of its own.
        reference_model: what NPO-like objectives compare with, a model or the folder of one; None:
            `model` as it is.
        resolve: axes of the result; all others are summed. `parameter`, or `group` (embedding,
            thirds of the blocks by depth, final norm, output layer); `sample`; and within samples
            one of two, another thing though both add up: `token`, which predicted token drives the
            effect, or `position`, where in the sequence a layer is used, the summand `g_t^T V a_t`.
        engine: `reverse` resolves by parameter and position; `forward` by token, and any number of
            objectives costs the same; `auto` takes what `resolve` needs, or else costs less
            (`geffect_fast.engines.choice`). The attributes say which it was, and why.
        reduction: what means are taken over, in objectives and risks alike: all answer tokens
            (`token`), each sample's tokens and then samples (`sample`), or no mean (`sum`).
        risk: an objective used as the risk; its part on any data set is the risk on that set.
        norms: also gradient norms and cosines, and a check that the samples' shares add up to the
            whole gradient's, parameter by parameter. Costs one more forward unit an objective, and
            memory for its gradient. None: with the reverse engine; the forward engine forms no
            gradient of an objective.
        groups: groups of blocks by name, in place of thirds: `{"first": "0-3", "last": 7}`.
        template: `auto`, or a text with `{question}` and `{answer}`.
        max_length: refuse samples of more tokens.
        token_budget: tokens a batch; None: chosen from free memory.
        out: a NetCDF file that effects by sample and position or token are written to while they
            are computed, for results larger than memory; None: in memory.
        progress: show a bar.

    Returns:
        A Dataset with `g_effect` (objective, risk, parameter, sample), `risk_value` (risk), `loss`
        (objective), and with `norms` `grad_norm` (objective), `risk_grad_norm` (risk), `cosine`
        (objective, risk) of the whole gradients and the same per parameter under `parameter_*`, or
        per group under `group_*`. All fp64.

        Coordinates: `parameter` with `block`, `kind`, `group`; `sample` (row number) with `set` and
        `question`; `position` counts the tokens of a sample's answer and then of its alternatives,
        `token` those that have a label, with `token_id`, `token_text` and `sequence` (0: the
        answer) on (sample, position) or (sample, token). Beyond a sample's end effects are 0 and
        ids -1.

        Attributes say what is covered (`covered_parameters` of `trainable_parameters`, the same in
        elements, `frozen_*`, `tied`), and whether the shares were compared with whole gradients
        (`coverage_checked`). With `out` the Dataset reads from the file; close it after use.

    Raises:
        InputError: unusable data, objective or argument, in one line.
        NonFiniteError: a weight, gradient or effect is not finite; the first is named.
        UnsupportedModelError: a module's share cannot be attributed exactly, or has no derivative
            in the engine that is needed; it is named.

    Example:
        >>> result = gf.profile(model, tokenizer, forget="forget.jsonl", retain="retain.jsonl",
        ...                     objectives=["ga", "npo(beta=0.1)"])
        >>> result.g_effect.sum(["parameter", "sample"])
    """
    chosen = resolved_list(objectives)
    risk_part = resolved_risk(risk)
    axes = checked_axes(resolve)
    check_arguments(engine, reduction, token_budget=token_budget, max_length=max_length)
    if not {"parameter", "group"} & set(axes) and groups is not None:
        raise InputError("groups: goes with resolve by 'group' or 'parameter'; leave it out")
    # Effects are linear in the objective: a part that several objectives share is profiled once.
    parts = list(dict.fromkeys(part for objective in chosen for _, part in objective.parts()))
    needs = {need for part in parts for need in part.needs}
    roles = {role for part in parts for role in part.roles}
    sets = read_sets(
        tokenizer, forget, retain, probes, refusals, "alternative" in roles, template, max_length
    )
    if not sets["forget"].has_alternatives:
        check_needs_no_refusals(chosen)
    if not sets["forget"].has_weights:
        check_needs_no_weights(chosen)
    check_model(model, sets)
    plan = Plan.of(model)
    uses_retain = any(part.on == "retain" for part in parts)
    resolution = Resolution(
        axes,
        list(plan.parameters),
        {name: sets[name] for name in ("forget", "retain")[: 1 + uses_retain]},
        "alternative" in roles,
        checked_blocks(groups, list(plan.parameters)),
    )
    columns = resolution.columns()[1]
    risk_names = {"unlearn": "forget", "retain": "retain"} | {p: p for p in probes or {}}
    shape = resolution.shape(len(chosen), len(risk_names))
    if out is not None and not ("sample" in axes and resolution.within):
        raise InputError(
            "out: goes with resolve by 'sample' and 'position' or 'token'; leave it out"
        )
    choice = choose_engine(
        engine,
        axes,
        norms,
        n_risks=len(risk_names),
        n_parts=len(parts),
        shares=product_shares(plan, columns),
    )
    budget = token_budget or estimate_token_budget(model, n_directions=len(sets))
    try:
        with within_budget(budget, 1):
            layout = choose_layout(plan, sets["forget"])
    except UnsupportedModelError:
        # Whole gradients and forward passes need no shares of samples, only that samples do not
        # meet.
        if resolution.per_sample and choice.engine == "reverse":
            raise
        layout = "single"
    if choice.engine == "forward":
        problem = forward_mode_problem(plan, sets["forget"], layout)
        if problem is not None and (engine == "forward" or resolution.within is not None):
            raise UnsupportedModelError(
                f"engine forward: {problem}; use engine='reverse', without 'token'"
            )
        if problem is not None:
            choice = Choice("reverse", problem)
    norms = choice.engine == "reverse" if norms is None else norms
    check_memory(plan, len(parts) if norms or not resolution.per_sample else 0, shape, out)

    def batches_of(name: str, wanted: tuple[Role, ...]) -> list[Batch]:
        return make_batches(
            sets[name], wanted, token_budget=budget, reduction=reduction, layout=layout
        )

    n_forget, n_retain = len(sets["forget"]), len(sets["retain"])
    tasks = tasks_for(parts, batches_of, {"forget": 0, "retain": n_forget})
    risk_tasks = [
        Task(batches_of(source, risk_part.roles), {m: risk_part})
        for m, source in enumerate(risk_names.values())
    ]

    device = next(iter(plan.parameters.values())).device
    reference = Reference(reference_for(reference_model, needs, model, sets))
    with _ticking(progress, "gradients of the risks", risk_tasks, budget) as tick:
        forward = choice.engine == "forward"
        place = place_for_directions(plan, len(risk_names)) if forward else None
        risk_values, directions = accumulate_gradients(
            plan, risk_tasks, len(risk_names), reference, tick, place
        )
    for name, direction in directions.items():
        check_directions(direction, f"gradient of the risk on '{{}}' at {name}", list(risk_names))
    mixture = mixture_of(chosen, parts)
    m = len(risk_names)
    passes = parts_for(plan, columns, m) if choice.engine == "forward" else []
    with (
        nullcontext(np.zeros(shape)) if out is None else EffectFile(out, resolution.dims, shape)
    ) as array:
        n_passes = max(len(passes), 1)
        with _ticking(progress, "effects of the objectives", tasks, budget, n_passes) as tick:
            reference.prepare(tasks, device)
            found = find_effects(
                choice.engine,
                plan,
                tasks,
                directions,
                reference,
                mixture,
                resolution,
                array,
                passes=passes,
                norms=norms,
                tick=tick,
            )
        check_effects(found.summed, found.values, parts, found.places)
        mixed = torch.tensordot(mixture, found.summed, dims=1)
        check_effects(mixed, mixture @ found.values, chosen, found.places)
        gram, of_objectives = found.gram, choice.engine == "reverse"
        if resolution.per_sample and of_objectives and gram is not None:
            check_coverage(plan, found.summed, gram, m)
        if gram is not None:
            onto = torch.eye(m, dtype=torch.float64)
            onto = torch.block_diag(onto, mixture) if of_objectives else onto
            gram = onto @ gram @ onto.T
            check_norms(gram, [*risk_names, *chosen])
        settings = {
            "engine": choice.engine,
            "engine_reason": choice.reason,
            "layout": layout,
            "reduction": reduction,
            "risk": str(risk_part),
            "token_budget": budget,
            "dtype": str(next(iter(plan.parameters.values())).dtype).removeprefix("torch."),
            "n_forget": n_forget,
            "n_retain": n_retain,
            "objectives": json.dumps(
                [{"name": o.name, "parameters": o.parameters()} for o in chosen]
            ),
            **Coverage.of(model).attributes(),
            # NetCDF has no booleans
            "coverage_checked": int(of_objectives and gram is not None),
        }
        result = dataset(
            resolution,
            None if isinstance(array, EffectFile) else array,
            [str(o) for o in chosen],
            list(risk_names),
            risk_values,
            mixture @ found.values,
            gram if norms or not of_objectives else None,
            tokenizer,
            settings,
        )
        return array.finish(result) if isinstance(array, EffectFile) else result


@contextmanager
def _ticking(
    show: bool, what: str, tasks: Sequence[Task], token_budget: int, n_passes: int = 1
) -> Iterator[Tick]:
    """Yields a function that is told of tokens done, drawn as a bar; memory may run out."""
    largest = max((b for task in tasks for b in task.batches), key=lambda b: b.total_tokens)
    with (
        progress_bar(show, what, n_passes * sum(task.n_tokens for task in tasks)) as update,
        within_budget(token_budget, largest.n_samples),
    ):
        yield lambda n: update(advance=n)
