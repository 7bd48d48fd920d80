"""`sweep`: objectives at every value of their hyper-parameters, and which of them are best."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from geffect_fast.errors import InputError
from geffect_fast.measure.profile import profile
from geffect_fast.objectives import Objective
from geffect_fast.objectives.ranges import Sweep, expand_list
from geffect_fast.registry import each_once
from geffect_fast.results.form import HYPER
from geffect_fast.results.told_apart import effect_errors, effect_spreads, told_apart

if TYPE_CHECKING:
    import xarray as xr

SAME = 1e-6
"""Largest distance, relative to their size, of effects that differ only in the order of sums."""
_AT_ONCE = 64


def sweep(
    model: nn.Module,
    tokenizer: Any,
    *,
    objectives: Sequence[str | Objective] | str,
    out: str | Path | None = None,
    **arguments: Any,
) -> xr.Dataset:
    """The G-effect of objectives at many values of their hyper-parameters, from one profile.

    The arguments are those of `profile`, with ranges in objective strings: `wga(alpha=0.1:7:30)` is
    30 evenly spaced values, `npo(beta=0.01:4:30,log)` as many evenly spaced in the logarithm, `ga +
    0.1:2:5*kl` five coefficients; several ranges in one objective make a grid. Values are rounded
    to 6 significant digits before they are used, so that they are what their labels say.

    Args:
        model, tokenizer: as `profile` takes them.
        objectives: strings with or without ranges, or objects; at most 10,000 objectives in all.
            An objective that several ranges hold is profiled once, and belongs to the first of
            them.
        out: None; the result of a sweep is held in memory.
        arguments: as `profile` takes them, by default with `resolve=("sample",)`.

    Returns:
        The Dataset of `profile` with every objective, and these along `objective`:

        - coordinate `sweep`: the string that the objective is from, with its ranges as written; the
          objective's own string where there is no range;
        - coordinates `hyper_<name>`, fp64: the values of every swept parameter, such as
          `hyper_alpha`; NaN where the objective's string has no range for it. Where a string has
          ranges for several parameters of one name, the names are `hyper_npo_beta` and the like;
          those of coefficients are `hyper_kl_coefficient` and the like;
        - coordinate `same_as`: the first objective with the same effects on both risks, which may
          be the objective itself;
        - variable `pareto`, bool: `pareto_front` of the result.

        Attribute `sweeps`: as JSON, by string, the string's swept parameters and whether each is
        evenly spaced in the logarithm.

    Raises:
        InputError: as `profile` raises it, or a range is wrong; the line names the character.

    Examples:
        >>> result = gf.sweep(model, tokenizer, forget="forget.jsonl", retain="retain.jsonl",
        ...                   objectives=["wga(alpha=0.1:7:30)", "npo(beta=0.01:4:30,log)"])
        >>> result.g_effect.sum("sample").sel(risk="unlearn").set_index(objective="hyper_alpha")
    """
    if out is not None:
        raise InputError("out: the result of a sweep is held in memory; leave it out")
    families = expanded(objectives)
    members = _members(families)
    measured = [member.objective for member in members]
    result = profile(model, tokenizer, objectives=measured, **{"resolve": ("sample",)} | arguments)
    coords: dict[str, Any] = {"sweep": ("objective", [member.family.text for member in members])}
    for name in dict.fromkeys(name for family in families for name in family.names):
        values = [member.values.get(name, math.nan) for member in members]
        coords[f"{HYPER}{name}"] = ("objective", np.array(values, dtype=float))
    result = result.assign_coords(coords)
    result.attrs["sweeps"] = json.dumps(
        {family.text: dict(zip(family.names, family.log, strict=True)) for family in families}
    )
    result = result.assign_coords(same_as=("objective", same_effects(result).values))
    return result.assign(pareto=pareto_front(result))


def _as_profile() -> inspect.Signature:
    """The signature of `profile`, with a sweep's default for `resolve`."""
    signature = inspect.signature(profile)
    shown = signature.parameters.values()
    return signature.replace(
        parameters=[p.replace(default=("sample",)) if p.name == "resolve" else p for p in shown]
    )


vars(sweep)["__signature__"] = _as_profile()


def pareto_front(result: xr.Dataset) -> xr.DataArray:
    """Whether each objective is on the Pareto front: no other one beats its removal and its harm.

    Another objective beats one where its `e_u` is no higher and its `e_r` no lower, and one of the
    two differs by more than the choice of the rows, and in 16 bits `precision_error`, can explain.
    Of objectives with the same effects, such as `npo` at any beta without a reference model, only
    the first is on the front, for all of them. `e_u` and `e_r` are totals, effects of a descent
    step of the same size. Between objectives of different scales, such as means over tokens and
    over samples, the front depends on these scales.

    Args:
        result: of `profile` or `sweep`, with the risks `unlearn` and `retain`.

    Returns:
        bool (objective); False where an effect is not finite.

    Examples:
        >>> result.objective[gf.pareto_front(result)]
    """
    result = result.sel(risk=["unlearn", "retain"])
    e_u, e_r = _totals(result)
    off_u, off_r = effect_errors(result).T
    by_row = effect_spreads(result)
    front = np.isfinite(e_u) & np.isfinite(e_r)
    finite = front.copy()
    front &= same_effects(result).values == result["objective"].values
    for i in np.flatnonzero(front):
        better = np.flatnonzero(finite & (e_u <= e_u[i]) & (e_r >= e_r[i]))
        for first in range(0, len(better), _AT_ONCE):  # the first few nearly always suffice
            j = better[first : first + _AT_ONCE]
            different = told_apart(e_u[i], e_u[j], off_u[i], off_u[j], by_row[i, 0], by_row[j, 0])
            different |= told_apart(e_r[i], e_r[j], off_r[i], off_r[j], by_row[i, 1], by_row[j, 1])
            if different.any():
                front[i] = False
                break
    return result["objective"].copy(data=front).rename("pareto")


def same_effects(result: xr.Dataset) -> xr.DataArray:
    """For each objective, the first objective with the same effects on forget and retain data.

    Args:
        result: of `profile` or `sweep`, with the risks `unlearn` and `retain`.

    Returns:
        Names of objectives (objective): an earlier objective's name, or the objective's own where
        no earlier one has the same effects.
    """
    import xarray as xr

    e_u, e_r = _totals(result.sel(risk=["unlearn", "retain"]))
    names = result["objective"].values.copy()
    size = np.hypot(e_u, e_r)
    firsts: list[int] = []
    for i in range(len(names)):
        j = np.array(firsts, dtype=int)
        near = np.hypot(e_u[j] - e_u[i], e_r[j] - e_r[i]) <= SAME * size[i]  # False for NaN
        if near.any():
            names[i] = names[j[near.argmax()]]
        else:
            firsts.append(i)
    return xr.DataArray(names, {"objective": result["objective"].values}, name="same_as")


def _totals(result: xr.Dataset) -> np.ndarray:
    """Effects of the whole forget data, `(risk, objective)`."""
    effect = result["g_effect"]
    rest = [d for d in effect.dims if d not in ("objective", "risk")]
    return effect.sum(rest, skipna=False).transpose("risk", "objective").values


def expanded(objectives: Iterable[str | Objective] | str) -> list[Sweep]:
    """The sweeps of a list or a string of objectives.

    Raises:
        InputError: there is none, or the same string is given twice.
    """
    if isinstance(objectives, Objective) or not isinstance(objectives, Iterable):
        raise InputError(f"objectives: got {objectives}; give a list, such as ['wga(alpha=1:2:3)']")
    sweeps = expand_list(objectives)
    if not sweeps:
        raise InputError("objectives: the list is empty; give at least one, such as 'ga'")
    each_once("objectives", (sweep.text for sweep in sweeps))
    return sweeps


class _Member(NamedTuple):
    objective: Objective
    family: Sweep
    values: dict[str, float]


def _members(families: list[Sweep]) -> list[_Member]:
    """Every objective once, in the first string with a range that holds it, else in its own."""
    found: dict[Objective, _Member] = {}
    for family in families:
        for values, objective in family.members:
            earlier = found.get(objective)
            if earlier is None or (family.names and not earlier.family.names):
                named = dict(zip(family.names, map(float, values), strict=True))
                found[objective] = _Member(objective, family, named)
    return list(found.values())
