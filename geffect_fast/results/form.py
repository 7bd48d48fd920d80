"""The form of a result, on which its readers rely, and checks of files and Datasets against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError
from geffect_fast.results.risks import UNLEARN

if TYPE_CHECKING:
    import xarray as xr

RESULT_AXES = ("step", "objective", "risk", "parameter", "group", "sample", "position", "token")
RISKS = (UNLEARN, "retain")
HYPER = "hyper_"
"""Prefix of the coordinates of swept parameters."""

_BESIDE = {
    "parameter": ("block", "kind", "group"),
    "sample": ("set", "question"),
}
"""Further coordinates along an axis, beside the one of its own name."""

_OF_TOKENS = ("token_id", "sequence")
"""Further coordinates of the axis `token`, where the result has an axis `sample`."""

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
"""Attributes of every result, with their types; lists and dicts are JSON."""

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
"""Variables and coordinates, and attributes, that tables read beside the numbers themselves, by
kind of measures or of compared runs."""

REFERENCE_IS_MODEL = (
    "the model itself, with which every log-ratio is 0: npo, dpo, tnpo, wtnpo are the same at any "
    "beta but for their scale, and the gradient of kl is 0; give the model as it was before "
    "unlearning (--reference) where that is another"
)
"""The meaning of a result's attribute `reference_is_model`, in words for the user."""

_LARGEST_RATIO = 1100
"""Largest ratio of a file's content to its size: deflate shrinks equal bytes a thousandfold."""


def check_size(file: Path) -> None:
    """Refuse a file that claims to hold more than it can, since reading it would fill the memory.

    Raises:
        InputError: the file claims more than its size allows.
        OSError: the file is torn, or is not HDF5.
    """
    import h5py

    held = 0

    def add(_name: str, item: Any) -> None:
        nonlocal held
        held += item.size * item.dtype.itemsize if isinstance(item, h5py.Dataset) else 0

    with h5py.File(file) as opened:
        opened.visititems(add)
    size = file.stat().st_size
    if held > _LARGEST_RATIO * size + 2**26:
        raise _changed(
            file, f"it claims to hold {held / 2**30:.1f} GiB, in a file of {size / 2**10:.0f} KiB"
        )


def check_form(dataset: xr.Dataset, file: Path) -> None:
    """Refuse a result that has not the form of a profile's result, before its numbers are read.

    Raises:
        InputError: the result has another form. The message names the first deviation.
    """
    problem = _wrong_form(dataset)
    if problem is not None:
        raise _changed(file, problem)


def check_complete(dataset: xr.Dataset, file: str | Path) -> None:
    """Refuse a result that lacks a risk, variable or attribute that tables and pages need.

    Raises:
        InputError: something is missing or of another kind. The message names it.
    """
    problem = _missing_for_pages(dataset)
    if problem is not None:
        raise _changed(file, problem)


def check_whole(dataset: xr.Dataset, what: str) -> None:
    """Refuse a result in memory that the user reduced too far for reports to be made from it.

    Args:
        dataset: a result with effects, with measures, or with runs that are compared.
        what: the beginning of messages.

    Raises:
        InputError: something is missing. The message names it.
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
    problem = f"it has no axis '{missing[0]}'" if missing else _missing_for_tables(dataset, name)
    if problem is None and not measured:
        problem = _missing_coordinate(dataset)
        if problem is None and not compared:
            problem = _missing_for_pages(dataset)
    if problem is not None:
        raise InputError(
            f"{what} is no whole result: {problem}; select by lists, as .sel(objective=['ga']) "
            "does, and keep variables and attributes"
        )


def _missing_for_tables(dataset: xr.Dataset, name: str) -> str | None:
    """The first variable or attribute that a result lacks and tables read beside `name`, in words.

    The value is None where nothing is missing.
    """
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


def _missing_coordinate(dataset: xr.Dataset) -> str | None:
    """The first coordinate that an axis of the effects lacks, in words; None if none is missing."""
    effect = dataset["g_effect"]
    for axis in map(str, effect.dims):
        beside = _BESIDE.get(axis, ())
        if axis == "token" and "sample" in effect.dims:
            beside = _OF_TOKENS
        for name in (axis, *beside):
            if name not in effect.coords:
                return f"it has no coordinate '{name}'"
    return None


def _missing_for_pages(dataset: xr.Dataset) -> str | None:
    """The first risk, variable or attribute for tables and pages that a result lacks, in words.

    The value is None where nothing is missing.
    """
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
    """The value of an attribute, read from JSON where `kind` is written as JSON."""
    if kind in (list, dict) and isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value


def _wrong_form(dataset: xr.Dataset) -> str | None:
    """The first deviation of a result from the form of a profile's result; None where it has it."""
    effect = dataset["g_effect"]
    if effect.dtype.kind != "f":
        return f"its g_effect holds {effect.dtype}, not floating-point numbers"
    for axis in map(str, effect.dims):
        if axis not in RESULT_AXES:
            return f"its g_effect has an axis '{axis}'"
        if not effect.sizes[axis]:
            return f"its axis '{axis}' is empty"
    if problem := _missing_coordinate(dataset):
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
        f"{file} is no result as profiles write it: {problem}",
        remedy="it was changed or damaged; repeat the run",
    )
