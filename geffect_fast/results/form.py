"""The form of a result: what its readers may rely on, wherever its file comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

AXES = ("step", "objective", "risk", "parameter", "group", "sample", "position", "token")
RISKS = ("unlearn", "retain")
HYPER = "hyper_"
"""What the coordinates of swept parameters begin with."""

_BESIDE = {
    "parameter": ("block", "kind", "group"),
    "sample": ("set", "question"),
}
"""Coordinates that an axis has beside its own."""

_OF_TOKENS = ("token_id", "sequence")
"""Those of the axis of tokens, where samples are told apart."""

_ATTRIBUTES: dict[str, type] = {
    "engine": str,
    "reduction": str,
    "risk": str,
    "objectives": list,
    "versions": dict,
    "n_forget": int,
    "n_retain": int,
    "covered_parameters": int,
    "covered_elements": int,
    "trainable_parameters": int,
    "trainable_elements": int,
    "frozen_parameters": int,
    "frozen_elements": int,
    "coverage_checked": int,
}
"""What every result says of itself; lists and dicts are JSON."""

_JSON_WHERE_THERE = {"digests": dict, "probe_rows": dict, "tied": list}

_READ: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "measures": (("value_low", "value_high", "statistic", "sample", "sample_set"), ()),
    "control": (
        (
            *("retention", "retention_low", "retention_high", "alpha", "alpha_lost", "monotone"),
            *("original_value", "unlearned_value", "on_grid"),
        ),
        ("control",),
    ),
    "relearning": ((), ("n_rows",)),
    "survey": (
        (
            *("relearned", "relearned_low", "relearned_high", "relearned_step"),
            *("relearned_metric", "relearned_set", "seconds", "peak_memory", "trained_on"),
        ),
        ("relearning", "survey_notes", "original_place"),
    ),
    "effects beside": (("effect_low", "effect_high", "objective"), ()),
    "ranks": (
        (
            *("run", "predictor", "spearman", "spearman_low", "spearman_high", "kendall"),
            *("n_runs", "beyond_noise"),
        ),
        (),
    ),
    "comparison": (("risk_value", "measured_change", "objective", "trained"), ("left_out", "risk")),
}
"""What tables read of kinds of measures, and of compared runs, beside their numbers: variables and
coordinates, and attributes."""

REFERENCE_IS_MODEL = (
    "the model itself, with which every log-ratio is 0: npo, dpo, tnpo, wtnpo are the same at any "
    "beta but for their scale, and the gradient of kl is 0; give the model as it was before "
    "unlearning (--reference) where that is another"
)
"""What `reference_is_model` of a result means, for people."""

_HELD = 1100
"""Times its size is what a file may hold: deflate makes a thousandth of equal bytes at best."""


def check_size(file: Path) -> None:
    """Refuse a file that says it holds more than it can: reading it would fill the memory.

    Raises:
        InputError: it does.
        OSError: it is torn, or no HDF5.
    """
    import h5py

    held = 0

    def add(_name: str, item: Any) -> None:
        nonlocal held
        held += item.size * item.dtype.itemsize if isinstance(item, h5py.Dataset) else 0

    with h5py.File(file) as opened:
        opened.visititems(add)
    size = file.stat().st_size
    if held > _HELD * size + 2**26:
        raise _changed(
            file, f"it claims to hold {held / 2**30:.1f} GiB, in a file of {size / 2**10:.0f} KiB"
        )


def check_form(dataset: xr.Dataset, file: Path) -> None:
    """Refuse a result that is not of the form that profiles write, before its numbers are read.

    Raises:
        InputError: naming what is odd.
    """
    problem = _odd(dataset)
    if problem is not None:
        raise _changed(file, problem)


def check_complete(dataset: xr.Dataset, file: str | Path) -> None:
    """Refuse a result that lacks what tables and pages are made from: risks and attributes.

    Raises:
        InputError: naming what is missing or of another kind.
    """
    problem = _lacking(dataset)
    if problem is not None:
        raise _changed(file, problem)


def check_whole(dataset: xr.Dataset, what: str) -> None:
    """Refuse a result in memory that was taken apart until reports cannot be made from it.

    Args:
        dataset: of effects, of measures, or of runs that are compared.
        what: messages begin with.

    Raises:
        InputError: naming what it lacks.
    """
    measured = "sample_value" in dataset
    name, axes = ("value", ("metric", "set")) if measured else ("g_effect", ("objective", "risk"))
    if name not in dataset:
        raise InputError(
            f"{what} is no result: it holds neither effects nor measures; give one of gf.profile, "
            "gf.open_run or the like"
        )
    compared = not measured and "run" in dataset[name].dims
    if compared:
        axes = ("run", "risk")  # every run has an objective of its own
    missing = [axis for axis in axes if axis not in dataset[name].dims]
    problem = f"it has no axis '{missing[0]}'" if missing else _unread(dataset, name)
    if problem is None and not measured:
        problem = _unnamed(dataset) or (None if compared else _lacking(dataset))
    if problem is not None:
        raise InputError(
            f"{what} is no whole result: {problem}; select by lists, as .sel(objective=['ga']) "
            "does, and keep variables and attributes"
        )


def _unread(dataset: xr.Dataset, name: str) -> str | None:
    """What tables read beside the numbers `name` that a result does not have."""
    dims = [str(dim) for dim in dataset[name].dims]
    measured = name == "value"
    kinds = {
        "measures": measured,
        "control": "alpha_chosen" in dataset,
        "relearning": measured and {"model", "step"} <= {*dims},
        "survey": "touched" in dataset,
        "effects beside": measured and "effect" in dataset,
        "ranks": {"effect", "change"} <= {*dataset.data_vars},
        "comparison": not measured and "run" in dims,
    }
    for kind in (kind for kind, is_one in kinds.items() if is_one):
        variables, attributes = _READ[kind]
        of_effects = map(str, dataset["effect"].dims if kind == "effects beside" else ())
        for variable in (*dims, *of_effects, *variables):
            if variable not in dataset.variables:
                return f"it has no variable '{variable}'"
        for attribute in attributes:
            if attribute not in dataset.attrs:
                return f"it has no attribute '{attribute}'"
    return None


def _unnamed(dataset: xr.Dataset) -> str | None:
    """The first coordinate along an axis of effects that a result does not have."""
    effect = dataset["g_effect"]
    for axis in map(str, effect.dims):
        beside = _BESIDE.get(axis, ())
        if axis == "token" and "sample" in effect.dims:
            beside = _OF_TOKENS
        for name in (axis, *beside):
            if name not in effect.coords:
                return f"it has no coordinate '{name}'"
    return None


def _lacking(dataset: xr.Dataset) -> str | None:
    """What tables and pages are made from that a result does not have."""
    present = [str(risk) for risk in dataset["risk"].values]
    for risk in RISKS:
        if risk not in present:
            return f"it has no risk '{risk}'"
    of_steps = ("measured_change",) if "step" in dataset["g_effect"].dims else ()
    for name in ("risk_value", "loss", *of_steps):
        if name not in dataset:
            return f"it has no variable '{name}'"
    for name, kind in (_ATTRIBUTES | _JSON_WHERE_THERE).items():
        value = dataset.attrs.get(name)
        if value is None and name in _JSON_WHERE_THERE:
            continue
        if not isinstance(_read(value, kind), kind):
            problem = "no" if value is None else "an odd"
            return f"it has {problem} attribute '{name}'"
    return None


def _read(value: Any, kind: type) -> Any:
    """The value of an attribute, out of JSON where that is how its kind is written."""
    if kind in (list, dict) and isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _odd(dataset: xr.Dataset) -> str | None:
    effect = dataset["g_effect"]
    if effect.dtype.kind != "f":
        return f"its g_effect holds {effect.dtype}, not numbers with a point"
    for axis in map(str, effect.dims):
        if axis not in AXES:
            return f"its g_effect has an axis '{axis}'"
        if not effect.sizes[axis]:
            return f"its axis '{axis}' is empty"
    if problem := _unnamed(dataset):
        return problem
    for axis in ("objective", "risk"):
        if effect[axis].dtype.kind not in "OUT":  # strings, of whatever kind
            return f"its coordinate '{axis}' holds no names"
    for axis in ("step", "objective", "risk", "parameter"):
        if axis in effect.dims and not effect.indexes[axis].is_unique:
            return f"its coordinate '{axis}' has a value twice"
    return None


def _changed(file: str | Path, problem: str) -> InputError:
    return InputError(
        f"{file} is no result as profiles write it: {problem}; it was changed or damaged: profile "
        "again"
    )
