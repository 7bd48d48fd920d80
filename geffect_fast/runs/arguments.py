"""What `profile` and `check` are called with, checked before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geffect_fast.capture import Plan
from geffect_fast.capture.given import check_is_model, mixing_module
from geffect_fast.data import (
    REDUCTIONS,
    SampleSet,
    check_vocabulary,
    read_refusals,
    read_rows,
    tokenize_rows,
)
from geffect_fast.data.memory import free_memory
from geffect_fast.data.qa import row_place
from geffect_fast.data.tokenize import check_positions
from geffect_fast.engines.choice import ENGINES
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.objectives import Objective, parse_list
from geffect_fast.objectives import resolve as resolve_objective
from geffect_fast.objectives.base import REFERENCE_NEEDS, WEIGHTS, Need, required
from geffect_fast.runs.models import check_finite, load_model


def resolved_list(specs: Sequence[str | Objective] | str) -> list[Objective]:
    """The objectives that are meant; raise `InputError` where there is none, or one twice."""
    if isinstance(specs, Objective) or not isinstance(specs, Iterable):
        raise InputError(f"objectives: got {specs}; give a list, such as ['ga', 'npo(beta=0.1)']")
    listed = parse_list(specs) if isinstance(specs, str) else [resolve_objective(s) for s in specs]
    if not listed:
        raise InputError("objectives: the list is empty; give at least one, such as 'ga'")
    seen: dict[Objective, Objective] = {}
    for objective in listed:
        first = seen.get(objective)
        if first is not None:
            raise InputError(f"objectives: '{objective}' is the same as '{first}'; give it once")
        seen[objective] = objective
    return listed


def check_needs_no_refusals(objectives: Sequence[Objective]) -> None:
    """Raise `InputError` naming the first objective that needs refusals: there are none."""
    for objective in objectives:
        if any("alternative" in part.roles for _, part in objective.parts()):
            raise InputError(
                f"objective '{objective}' needs refusals: give a file, one a line, as `refusals` "
                "(--refusals FILE), or an `alternative` in every forget row"
            )


def check_needs_no_weights(objectives: Sequence[Objective]) -> None:
    """Raise `InputError` naming the first objective that needs weights: the data holds none."""
    for objective in objectives:
        if any("weights" in part.needs for _, part in objective.parts()):
            required(objective, None, WEIGHTS)


def resolved_risk(spec: str | Objective) -> Objective:
    """The objective used as the risk; raise `InputError` where it cannot be one."""
    parts = resolve_objective(spec).parts()
    if len(parts) != 1 or parts[0][0] != 1.0 or parts[0][1].needs & REFERENCE_NEEDS:
        raise InputError(
            f"risk: '{spec}' must be one objective that needs no reference, such as nll"
        )
    return parts[0][1]


def check_arguments(engine: str, reduction: str, **at_least_one: int | None) -> None:
    """Raise `InputError` at an unknown engine or reduction, and at a count below 1."""
    if engine not in ENGINES:
        raise InputError(f"engine: unknown '{engine}'; choose from {', '.join(ENGINES)}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: unknown '{reduction}'; choose from {', '.join(REDUCTIONS)}")
    check_counts(**at_least_one)


def check_counts(**counts: int | None) -> None:
    """Raise `InputError` at an argument that is neither None nor a whole number of at least 1."""
    for name, count in counts.items():
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise InputError(f"{name}: must be a whole number of at least 1, got {count!r}")


def read_sets(
    tokenizer: Any,
    forget: Any,
    retain: Any,
    probes: Mapping[str, Any] | None,
    refusals: Any,
    alternatives: bool,
    template: str,
    max_length: int | None,
    date: str,
    model: nn.Module,
) -> dict[str, SampleSet]:
    """The data sets, tokenised for a model: forget, retain and every probe by its name.

    A source that is a `SampleSet` is one already.
    """
    if not isinstance(probes, Mapping | None):
        raise InputError(f"probes: got {type(probes).__name__}; give a dict of data sets by name")
    sources = {"forget": forget, "retain": retain}
    for name, source in (probes or {}).items():
        if name in (*sources, "unlearn"):
            raise InputError(f"probes: the name '{name}' is taken; choose another")
        sources[name] = source
    replacements = read_refusals(refusals) if refusals is not None and alternatives else None
    return {
        name: source
        if isinstance(source, SampleSet)
        else tokenize_rows(
            read_rows(source, name=name),
            tokenizer,
            name=name,
            refusals=replacements if name == "forget" else None,
            template=template,
            max_length=max_length,
            date=date,
            n_positions=table_of_positions(model),
        )
        for name, source in sources.items()
    }


def check_model(model: nn.Module, sets: Mapping[str, SampleSet], what: str = "model") -> None:
    """Raise where a model is none, no decoder alone, holds NaN, or is too small for the data sets.

    Too small are vocabularies that lack a token, and tables of positions that samples run out of.
    """
    check_is_model(model, what)
    check_finite(model, what)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) is True:
        raise InputError(
            f"{what}: {type(model).__name__} reads the question by an encoder and the answer by a "
            "decoder; give a causal language model, which reads both as one text"
        )
    config = getattr(config, "get_text_config", lambda: config)()
    vocab_size = getattr(config, "vocab_size", None)
    for sample_set in sets.values():
        if isinstance(vocab_size, int):
            check_vocabulary(sample_set, vocab_size, what)
    n_positions, table = _positions(config), table_of_positions(model)
    if table is not None:
        for sample_set in sets.values():
            check_positions(sample_set, table, what)
    elif n_positions is not None:
        _tell_of_long_rows(sets, n_positions, what)


def _tell_of_long_rows(sets: Mapping[str, SampleSet], n_positions: int, what: str) -> None:
    """A warning that names the first row beyond the positions that a model was made for."""
    for sample_set in sets.values():
        for sample in sample_set.samples:
            longest = max(len(q) for qs in sample.sequences().values() for q in qs)
            if longest > n_positions:
                warnings.warn(
                    f"{row_place(sample_set.name, sample.data_row)} has {longest} tokens, and the "
                    f"{what} was made for {n_positions} positions; what it computes beyond them "
                    "may mean little",
                    GEffectWarning,
                    stacklevel=2,
                )
                return


def _positions(config: Any) -> int | None:
    """The positions that a config speaks of; XLNet's -1 are as many as one likes."""
    n_positions = getattr(config, "max_position_embeddings", None)
    return n_positions if isinstance(n_positions, int) and n_positions > 0 else None


def table_of_positions(model: nn.Module) -> int | None:
    """Rows of a model's table of positions, which some make a few longer; None without one."""
    config = getattr(model, "config", None)
    n_positions = _positions(getattr(config, "get_text_config", lambda: config)())
    if n_positions is None or not isinstance(model, nn.Module):
        return None
    tokens = getattr(model, "get_input_embeddings", lambda: None)()
    found = any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and 0 <= module.num_embeddings - n_positions < 8
        for module in model.modules()
    )
    return n_positions if found else None


def check_memory(
    plan: Plan, n_gradients: int, shape: tuple[int, ...], out: str | Path | None
) -> None:
    """Raise `InputError` where whole gradients, or the result itself, do not fit."""
    device = next(iter(plan.parameters.values())).device
    needed = 4 * n_gradients * sum(p.numel() for p in plan.parameters.values())
    free = free_memory(device)
    if needed > free:
        raise InputError(
            f"objectives: the whole gradients of {n_gradients} take {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; profile fewer at once, or resolve by sample with "
            "norms=False (--no-norms)"
        )
    needed, free = 8 * prod(shape), free_memory(torch.device("cpu"))
    if out is None and needed > free:
        raise InputError(
            f"resolve: the result takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free; resolve by 'group' in place of 'parameter', profile fewer objectives, or give "
            "out=FILE with 'sample' and 'position' or 'token' (a run folder is written that way)"
        )


def reference_for(
    source: nn.Module | str | Path | None,
    needs: set[Need],
    model: nn.Module,
    sets: Mapping[str, SampleSet],
    trust_remote_code: bool,
) -> nn.Module | None:
    """The reference model, loaded where a folder is given; None where the model itself serves."""
    if not needs & REFERENCE_NEEDS or source is None or source is model:
        return None
    if isinstance(source, nn.Module):
        why = mixing_module(source)
        if why is not None:
            raise InputError(f"reference_model: {why}")
        reference = source
    else:
        first = next(model.parameters())
        dtype, device = str(first.dtype).removeprefix("torch."), str(first.device)
        reference = load_model(
            source, dtype, device, "reference", trust_remote_code=trust_remote_code
        )
    check_model(reference, sets, "reference_model")
    return reference
