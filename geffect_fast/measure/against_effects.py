"""`against_effects`: effects at the original model beside the changes of all metrics by unlearning.

A run of `unlearn` is an objective with its hyper-parameters. Its *predictors* are numbers known at
the original model. Its *changes* are the differences of the metrics between the original and the
unlearned model. Rank correlations over the runs of a study say which predictor tells which change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.errors import InputError
from geffect_fast.measure.rank_correlation import FEWEST, RankCorrelation, rank_correlation
from geffect_fast.metrics.base import Measure
from geffect_fast.paths import is_there, short_names, user_path
from geffect_fast.registry import each_once
from geffect_fast.results.form import check_complete
from geffect_fast.results.intervals import collateral_of
from geffect_fast.results.same_data import check_same_data
from geffect_fast.storage.evaluation import open_evaluation
from geffect_fast.storage.run_folder import CONFIG, RESULTS, open_run
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr

ORIGINAL = "original"
"""Name of the model before unlearning, along the axis `model`."""

_SIGN = {"unlearn": "u", "retain": "r"}
_BOUNDS = ("_low", "_high")
_OF_ROWS = ("forget", "retain", "template", "data_format", "max_length", "date")
"""Fields that an evaluation takes from the config of its first run, where they are not given."""


def against_effects(
    runs: Sequence[str | Path | xr.Dataset] | Mapping[str, str | Path | xr.Dataset] | str | Path,
    measures: xr.Dataset | str | Path,
) -> xr.Dataset:
    """Correlate effects at the original model with the changes of every metric by unlearning.

    The effects of a run are read at its step 0, for the objective that the run was trained on:
    `e_u`, `e_r`, `collateral`, cosines, and any other effect by objective and risk. Where the next
    probe is of the same step in all runs, the changes that first order predicts of the updates up
    to that probe are read too: `update_u`, `<theta' - theta, grad R>`, which knows the optimizer,
    and, where learning rates differ, `sgd_u`, `-lr e_u`; likewise for every risk.

    Args:
        runs: at least two runs of `unlearn` from one model: folders or results, a mapping of names
            to them, or a folder that holds them.
        measures: a result of `evaluate` along `model`, with `original` and, under the runs' names,
            the runs' models; or the folder of such a result.

    Returns:
        The measures, and beside them

        `effect` (run, predictor) with `effect_low` and `effect_high`, by the choice of the rows;
        `change` (run, metric, set), the value of the unlearned model less the original's;
        `spearman` and `kendall` (predictor, metric, set) with `_low` and `_high`, bounds by drawing
        the runs anew, `p_value` and `kendall_p_value`, and `n_runs`, the number of runs behind each
        correlation; `beyond_noise`, whether `p_value` is below 0.05 and the bounds, where there are
        any, leave 0 out. With fewer than 5 runs all correlations are NaN and `beyond_noise` is
        False.

        Coordinates: `run`, with `objective`; `predictor`.

    Raises:
        InputError: there are fewer than two runs; a run has no steps, or was not trained on one
            objective; runs are of different data; the measures lack a model.

    Examples:
        >>> found = gf.against_effects("study/", "measures/")
        >>> found.spearman.sel(predictor="e_u", metric="probability", set="forget")
    """
    import xarray as xr

    given = measures if isinstance(measures, xr.Dataset) else open_evaluation(measures)
    effects = effects_of(runs)
    if "model" not in given["value"].dims:
        raise InputError(
            "against_effects: the measures are of one model; give those of the original and of "
            "every run's, along `model`"
        )
    missing = [
        name
        for name in (ORIGINAL, *effects["run"].values.tolist())
        if name not in given["model"].values
    ]
    if missing:
        raise InputError(
            f"against_effects: the measures lack model {missing[0]}; give those of the original "
            "and of every run's, under their names"
        )
    of_runs = given["value"].sel(model=effects["run"].values)
    change = (of_runs - given["value"].sel(model=ORIGINAL)).drop_vars("model")
    change = change.rename(model="run")
    both = xr.merge([given, effects, change.to_dataset(name="change")], combine_attrs="override")
    return both.assign(_correlations(effects["effect"].values, change))


def _correlations(effects: np.ndarray, change: xr.DataArray) -> dict[str, Any]:
    """Rank correlations of every predictor with every change, as a result's variables by name.

    Args:
        effects: `(run, predictor)`.
        change: `(run, metric, set)`.
    """
    dims = ("predictor", "metric", "set")
    changes = change.transpose("run", "metric", "set").values
    found = [
        [[rank_correlation(x, y) for y in of_metric.T] for of_metric in changes.transpose(1, 0, 2)]
        for x in _without_rounding(effects).T
    ]
    pairs = {
        name: (dims, np.array([[[getattr(c, name) for c in b] for b in a] for a in found]))
        for name in asdict(RankCorrelation(0))
    }
    pairs["n_runs"] = pairs.pop("n")
    low, high = (pairs[f"spearman{side}"][1] for side in _BOUNDS)
    with np.errstate(invalid="ignore"):
        known = np.isnan(low) | (low > 0) | (high < 0)
        beyond = (pairs["p_value"][1] < 0.05) & known
    return pairs | {"beyond_noise": (dims, beyond)}


def _without_rounding(effects: np.ndarray) -> np.ndarray:
    """Effects rounded to five digits, so that objectives with the same effects are tied.

    At the original model `ga` and `ga + kl` have the same effects, as has `npo` at any beta.
    Rounding errors alone would put them in an order.
    """
    return np.array([[float(f"{value:.4e}") for value in row] for row in effects])


def effects_of(
    runs: Sequence[str | Path | xr.Dataset] | Mapping[str, str | Path | xr.Dataset] | str | Path,
) -> xr.Dataset:
    """The variables `effect` (run, predictor), `effect_low` and `effect_high` of `against_effects`.

    Raises:
        InputError: as `against_effects` raises it for the runs.
    """
    import xarray as xr

    opened = _opened(runs)
    if len(opened) < 2:
        raise InputError(
            f"against_effects: got {len(opened)} run; give two or more, and {FEWEST} or more for "
            "rank correlations"
        )
    (first, one), *others = opened.items()
    for name, dataset in others:
        check_same_data(first, one, name, dataset, "against_effects")
    later = _later_predictions(opened)
    found = {
        name: _at_the_start(name, dataset) | later.get(name, {}) for name, dataset in opened.items()
    }
    shared = [name for name in found[first] if all(name in of for of in found.values())]
    table = np.array([[astuple(of[name]) for name in shared] for of in found.values()])
    return xr.Dataset(
        {
            f"effect{side}": (("run", "predictor"), table[..., i])
            for i, side in enumerate(("", *_BOUNDS))
        },
        {
            "run": list(opened),
            "predictor": shared,
            "objective": (
                "run",
                [str(each.attrs["trained_objective"]) for each in opened.values()],
            ),
        },
    )


def _opened(
    runs: Sequence[str | Path | xr.Dataset] | Mapping[str, str | Path | xr.Dataset] | str | Path,
) -> dict[str, xr.Dataset]:
    """Results by step of all runs, by the runs' names.

    Raises:
        InputError: a result is not of a training on one objective, or does not begin at step 0.
    """
    import xarray as xr

    if isinstance(runs, Mapping):
        named = {str(name): run for name, run in runs.items()}
    else:
        folders = [runs] if isinstance(runs, str | Path) else list(runs)
        results = {f"result {i + 1}": r for i, r in enumerate(folders) if isinstance(r, xr.Dataset)}
        study = study_runs([run for run in folders if isinstance(run, str | Path)])
        named = {**short_names(study), **results}
    found = {}
    for name, run in named.items():
        if isinstance(run, xr.Dataset):
            dataset = run
        else:
            dataset = open_run(run)
            check_complete(dataset, run)
        trained = dataset.attrs.get("trained_objective")
        if "step" not in dataset["g_effect"].dims or trained not in dataset["objective"].values:
            raise InputError(
                f"against_effects: {name} is not the result of a training on one objective; give "
                "runs of unlearn"
            )
        if int(dataset["step"].values[0]) != 0:
            raise InputError(
                f"against_effects: {name} begins at step {dataset['step'].values[0]}; give runs "
                "that were probed at the original model, step 0"
            )
        found[name] = dataset
    return found


def study_runs(folders: Sequence[str | Path]) -> list[str]:
    """Run folders. A folder that is no run itself is replaced by the runs in it, sorted by name.

    Raises:
        InputError: a folder holds no run, or a run is listed twice.
    """
    found: list[str] = []
    for given in map(str, folders):
        place = user_path(given)
        if not place.is_dir() or is_there(place / RESULTS) or is_there(place / CONFIG):
            found.append(given.rstrip("/"))
            continue
        inside = sorted(path.parent for path in place.glob(f"*/{RESULTS}"))
        if not inside:
            raise InputError(
                f"against_effects: {given} is not a run and holds no runs; give folders of unlearn"
            )
        found += map(str, inside)
    return list(each_once("against_effects", found))


def models_of_runs(runs: Sequence[str]) -> tuple[dict[str | int, str], str, UnlearnConfig]:
    """The models by name, original first, the place of the tokenizer, and the first run's config.

    Raises:
        InputError: a folder is no run of `unlearn` or has no model, the runs begin from several
            models, or a run is named as the original.
    """
    begun = {}
    for run in runs:
        folder = user_path(run)
        config = load_config(folder / CONFIG) if is_there(folder / CONFIG) else None
        if not isinstance(config, UnlearnConfig):
            raise InputError(
                f"against_effects: {run} is not a run of geffect-fast unlearn; give its folders"
            )
        if not is_there(folder / "model"):
            raise InputError(
                f"against_effects: {run} holds no model, so it is not complete; go on with it "
                "(unlearn --resume)"
            )
        begun[run] = config
    first = begun[runs[0]]
    for run, config in begun.items():
        if config.model != first.model:
            raise InputError(
                f"against_effects: {run} began from {config.model}, {runs[0]} from {first.model}; "
                "give runs from one model"
            )
    names = short_names(runs)
    if ORIGINAL in names:
        raise InputError(
            f"against_effects: run {names[ORIGINAL]} has the name of the model before unlearning, "
            f"'{ORIGINAL}'; rename its folder"
        )
    models: dict[str | int, str] = {ORIGINAL: first.model}
    models |= {name: f"{run}/model" for name, run in names.items()}
    return models, first.tokenizer or first.model, first


def with_runs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an evaluation with its runs listed, and with the first run's data as defaults.

    Raises:
        InputError: as `study_runs` and `models_of_runs` raise it.
    """
    given = values["against_effects"]
    runs = study_runs([given] if isinstance(given, str) else given)
    begun = models_of_runs(runs)[2]
    return {
        **{name: getattr(begun, name) for name in _OF_ROWS},
        **values,
        "against_effects": runs,
    }


def _at_the_start(name: str, dataset: xr.Dataset) -> dict[str, Measure]:
    """Values and bounds at step 0 of a run, for the objective that it was trained on, by predictor.

    Raises:
        InputError: `e_u` or `e_r` is not finite.
    """
    first = dataset.isel(step=0).sel(objective=dataset.attrs["trained_objective"])
    found: dict[str, Measure] = {}
    for variable, of_all in dataset.data_vars.items():
        kind = str(variable)
        by_objective_and_risk = {"objective", "risk"} <= set(of_all.dims)
        if not by_objective_and_risk or kind.endswith(_BOUNDS) or kind.startswith("parameter_"):
            continue
        of = first[kind]
        of = of.sum([dim for dim in of.dims if dim != "risk"], skipna=False)
        called = "e" if kind == "g_effect" else kind
        for risk in of["risk"].values.tolist():
            low, high = (_value_of(first.sel(risk=risk), f"{kind}{side}") for side in _BOUNDS)
            predictor = f"{called}_{_SIGN.get(risk, risk)}"
            found[predictor] = Measure(float(of.sel(risk=risk)), low, high)
        if kind == "g_effect":
            low, high = (_value_of(first, f"collateral{side}") for side in _BOUNDS)
            found["collateral"] = Measure(float(collateral_of(of.values)), low, high)
    if not np.isfinite([found["e_u"].value, found["e_r"].value]).all():
        raise InputError(f"against_effects: the effects of {name} are not finite; leave it out")
    return found


def _value_of(dataset: xr.Dataset, name: str) -> float:
    """The number `name` of a result; NaN where the result has no such variable."""
    return float(dataset[name]) if name in dataset else np.nan


def _later_predictions(opened: Mapping[str, xr.Dataset]) -> dict[str, dict[str, Measure]]:
    """First-order changes by the updates up to the second probe, by run and predictor.

    There are none unless all runs have a second probe at the same step. The changes `-lr e` are
    left out where all runs have learned at one rate, since they rank as `e` does.
    """
    second = [each.isel(step=1) for each in opened.values() if each.sizes["step"] > 1]
    if len(second) < len(opened) or len({int(each["step"]) for each in second}) > 1:
        return {}
    called = {"predicted_update": "update"} | (
        {"predicted_sgd": "sgd"} if _rates_differ(second) else {}
    )
    return {
        name: {
            f"{word}_{_SIGN.get(risk, risk)}": Measure(
                float(each[kind].sel(risk=risk)), np.nan, np.nan
            )
            for kind, word in called.items()
            if kind in each
            for risk in each["risk"].values.tolist()
        }
        for name, each in zip(opened, second, strict=True)
    }


def _rates_differ(probes: Sequence[xr.Dataset]) -> bool:
    """Whether the learning rates of runs at a probe differ, by their values or their schedules."""
    rates = {float(each["learning_rate"]) for each in probes if "learning_rate" in each}
    return len(rates) > 1
