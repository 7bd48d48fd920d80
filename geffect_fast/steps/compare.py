"""`compare`: step results of several runs side by side, on the steps and risks they share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.errors import InputError
from geffect_fast.paths import user_path
from geffect_fast.results.form import check_complete
from geffect_fast.results.groups import GROUPS
from geffect_fast.results.same_data import COUNTS, SETTINGS, check_same_data
from geffect_fast.results.told_apart import (
    half_width,
    precision_error,
    row_spreads,
    times_counted,
)
from geffect_fast.storage.run_folder import open_run
from geffect_fast.visible import one_line

if TYPE_CHECKING:
    import xarray as xr

BY_RISK = (
    *(
        "risk_value",
        "cosine",
        "measured_change",
        "predicted_update",
        "predicted_step",
        "predicted_sgd",
    ),
    *("g_effect_low", "g_effect_high", "risk_value_low", "risk_value_high", "risk_value_spread"),
)
BY_STEP = ("loss", "grad_norm")


@dataclass(frozen=True)
class _Curve:
    """A curve of a comparison: one objective of one run.

    Attributes:
        run: the run's name, or its folder as given.
        objective: the objective's name on the result's axis.
        trained: whether the run was trained on the objective.
        dataset: the run's whole result.
    """

    run: str
    objective: str
    trained: bool
    dataset: xr.Dataset


def compare(
    runs: Sequence[str | Path | xr.Dataset] | Mapping[str, str | Path | xr.Dataset],
    *,
    what: str = "compare",
) -> xr.Dataset:
    """Step results of several runs in one Dataset, on the steps and risks that all of them have.

    A run that was trained on an objective gives one curve, of that objective. A run of checkpoints
    gives a curve for each of its objectives. A curve is named by its objective, or, where several
    curves have the same objective, also by the run's folder.

    Args:
        runs: run folders, results or their files, with a step axis; or a mapping of names to them.
        what: the beginning of messages.

    Returns:
        A Dataset with these variables, where all runs have them. `g_effect`, `risk_value`,
        `measured_change`, `predicted_*`, `cosine` and the bounds `*_low` and `*_high` have the axes
        (run, step, risk). `risk_value_spread` (run, step, risk, risk_sample) is the change of the
        risks by each row. `loss` and `grad_norm` have the axes (run, step). `group_effect` (run,
        step, risk, group) is there where all runs resolve the same groups of parameters, with
        `group_effect_low` and `group_effect_high` where intervals are known. The coordinates
        `objective` and `trained` have the axis (run). Changes and predictions are since the run's
        own previous probe, whatever its step. `attrs["left_out"]` lists the steps and the risks
        that not all runs have, in a line each for every run.

    Raises:
        InputError: there are fewer than two runs, a run has no steps or is given twice, the runs
            have different data, or they share fewer than two steps.

    Examples:
        >>> both = gf.compare(["run-ga", "run-npo"])
        >>> both.risk_value.sel(risk="retain").isel(step=-1)
    """
    import xarray as xr

    given = _given(runs, what)
    curves = [curve for name, run in given.items() for curve in _curves(name, run)]
    for one, other in combinations({curve.run: curve for curve in curves}.values(), 2):
        check_same_data(one.run, one.dataset, other.run, other.dataset, what)
    steps = functools.reduce(np.intersect1d, [curve.dataset["step"].values for curve in curves])
    if len(steps) < 2:
        ranges = ", ".join(f"{curve.run} {_steps_of(curve)}" for curve in curves[:4])
        raise InputError(
            f"{what}: the runs share {len(steps)} steps ({ranges}); probe them at the same steps"
        )
    first = [str(risk) for risk in curves[0].dataset["risk"].values]
    risks = [risk for risk in first if all(risk in c.dataset["risk"].values for c in curves)]
    groups = [_groups(curve.dataset) for curve in curves]
    by_group = bool(groups[0]) and all(group == groups[0] for group in groups)
    there = {str(name) for name in curves[0].dataset}
    shared = there.intersection(*(map(str, curve.dataset) for curve in curves))
    names = _names(curves, isinstance(runs, Mapping))
    data = xr.concat(
        [
            _row(curve, shared, groups[0] if by_group else []).sel(step=steps, risk=risks)
            for curve in curves
        ],
        dim="run",
    )
    return data.assign_coords(
        run=names,
        objective=("run", [curve.objective for curve in curves]),
        trained=("run", [curve.trained for curve in curves]),
    ).assign_attrs(
        {name: curves[0].dataset.attrs.get(name, "") for name in SETTINGS}
        | _least_precise(curves)
        | _interval_attributes(curves, shared)
        | {"left_out": _left_out(curves, steps, risks)}
    )


def _given(
    runs: Sequence[str | Path | xr.Dataset] | Mapping[str, str | Path | xr.Dataset], what: str
) -> dict[str, xr.Dataset]:
    """Results by the names of their runs.

    Raises:
        InputError: there are fewer than two runs, or one is given twice, is no run or has no steps.
    """
    import xarray as xr

    if isinstance(runs, str | Path | xr.Dataset):
        raise InputError(f"{what}: got one run; give a list of two or more")
    if isinstance(runs, Mapping):
        pairs = [(str(name), run) for name, run in runs.items()]
    else:
        pairs = [
            (f"result {i + 1}" if isinstance(run, xr.Dataset) else str(run), run)
            for i, run in enumerate(runs)
        ]
    if len(pairs) < 2:
        raise InputError(f"{what}: got {len(pairs)} run; give two or more")
    found: dict[str, xr.Dataset] = {}
    places: dict[Path, str] = {}
    for name, run in pairs:
        if isinstance(run, str | Path):
            place = user_path(run).resolve()
            place = place.parent if place.name == "results.nc" else place
            if place in places:
                raise InputError(
                    f"{what}: {name} and {places[place]} are the same run; give it once"
                )
            places[place] = name
            dataset = open_run(run)
            check_complete(dataset, run)
        elif isinstance(run, xr.Dataset):
            dataset = run
        else:
            raise InputError(f"{what}: {run!r} is no run; give folders, or results of open_run")
        if "step" not in dataset["g_effect"].dims:
            raise InputError(
                f"{what}: {name} has no steps; give runs of unlearn or of profile --checkpoints"
            )
        twin = next((other for other, d in found.items() if _same(d, dataset)), None)
        if twin is not None:
            raise InputError(f"{what}: {name} holds the same result as {twin}; give it once")
        found[name] = dataset
    return found


def _same(a: xr.Dataset, b: xr.Dataset) -> bool:
    return a is b or (a.attrs == b.attrs and a.identical(b))


def _curves(name: str, dataset: xr.Dataset) -> list[_Curve]:
    """The curve of the objective that a run was trained on, or one for each of its objectives."""
    objectives = [str(objective) for objective in dataset["objective"].values]
    trained = str(dataset.attrs.get("trained_objective", ""))
    if trained in objectives:
        return [_Curve(name, trained, True, dataset)]
    return [_Curve(name, objective, False, dataset) for objective in objectives]


def _least_precise(curves: Sequence[_Curve]) -> dict[str, float]:
    """The attribute `precision_error`, the largest of the runs; empty where no run has any."""
    error = max(precision_error(curve.dataset.attrs) for curve in curves)
    return {"precision_error": error} if error else {}


def _interval_attributes(curves: Sequence[_Curve], shared: set[str]) -> dict[str, Any]:
    """The attributes that describe intervals; empty where not all runs have intervals."""
    if "g_effect_low" not in shared:
        return {}
    names = ("interval_level", *COUNTS)
    attrs = curves[0].dataset.attrs
    return {name: attrs[name] for name in names if name in attrs}


def _groups(dataset: xr.Dataset) -> list[str]:
    """Names of the result's groups, front to back; empty where the result sums over them."""
    if "group" not in dataset["g_effect"].coords:
        return []
    present = list(dict.fromkeys(map(str, dataset["group"].values)))
    known = all(group in GROUPS for group in present)
    return sorted(present, key=GROUPS.index) if known else present


def _row(curve: _Curve, shared: set[str], groups: list[str]) -> xr.Dataset:
    """The variables of one curve in a comparison, on all its steps and risks."""
    dataset = curve.dataset
    effect = dataset["g_effect"].sel(objective=curve.objective, drop=True)
    rest = [d for d in effect.dims if d not in ("step", "risk")]
    row = effect.sum(rest, skipna=False).transpose("step", "risk").to_dataset(name="g_effect")
    for name in BY_RISK + BY_STEP:
        if name in shared:
            values = dataset[name]
            if "objective" in values.dims:
                values = values.sel(objective=curve.objective, drop=True)
            row[name] = values
    if groups:
        axis = "group" if "group" in effect.dims else "parameter"
        summed = effect.sum([d for d in rest if d != axis], skipna=False)
        if axis == "parameter":
            summed = summed.groupby("group").sum(skipna=False)
        row["group_effect"] = summed.sel(group=groups).transpose("step", "risk", "group")
        if "g_effect_low" in shared:
            width = _group_widths(effect, axis, groups)
            row["group_effect_low"] = row["group_effect"] - width
            row["group_effect_high"] = row["group_effect"] + width
    return row


def _group_widths(effect: xr.DataArray, axis: str, groups: list[str]) -> xr.DataArray:
    """Half the widths of intervals of effects by group, from the rows that the objective reads.

    Args:
        effect: effects of one objective, by step, risk and sample, and by `axis` with a coordinate
            `group`.
        axis: `group` or `parameter`.
        groups: names of the groups, in order.
    """
    kept = ("step", "risk", "sample", axis)
    rows = effect.sum([d for d in effect.dims if d not in kept], skipna=False)
    if axis == "parameter":
        rows = rows.groupby("group").sum(skipna=False)
    rows = rows.sel(group=groups).transpose("step", "risk", "group", "sample")
    width = half_width(row_spreads(rows.values, effect["set"].values))
    width *= times_counted([str(risk) for risk in rows["risk"].values])[:, None]
    return rows.isel(sample=0, drop=True).copy(data=width)


def _names(curves: list[_Curve], given: bool) -> list[str]:
    """Names of curves: their objectives, with their runs where several have the same objective.

    Args:
        curves: the curves of all runs.
        given: whether the user named the runs; curves then have these names.
    """
    objectives = [curve.objective for curve in curves]
    per_run = {run: sum(curve.run == run for curve in curves) for run in {c.run for c in curves}}
    folders = {run: one_line(Path(run).name or run) for run in per_run}
    if given or len(set(folders.values())) < len(folders):
        folders = {run: run for run in folders}
    names = []
    for curve in curves:
        alone = per_run[curve.run] == 1
        if given:
            names.append(curve.run if alone else f"{curve.run}: {curve.objective}")
        elif objectives.count(curve.objective) == 1:
            names.append(curve.objective)
        else:
            names.append(f"{folders[curve.run]}: {curve.objective}")
    return names


def _steps_of(curve: _Curve) -> str:
    steps = curve.dataset["step"].values
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]} alone"


def _left_out(curves: list[_Curve], steps: np.ndarray, risks: list[str]) -> list[str]:
    """The steps and the risks of each run that not all runs have, in a line each."""
    lines = []
    for name, dataset in {curve.run: curve.dataset for curve in curves}.items():
        beyond = np.setdiff1d(dataset["step"].values, steps)
        if beyond.size:
            several = f"{beyond.size} steps from {beyond[0]} to {beyond[-1]}"
            lines.append(f"{name}: {several if beyond.size > 1 else f'step {beyond[0]}'}")
        others = [str(risk) for risk in dataset["risk"].values if str(risk) not in risks]
        if others:
            lines.append(f"{name}: the risk on {', '.join(others)}")
    return lines
