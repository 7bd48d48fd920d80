"""Run folders of evaluations: `evaluation.nc` and `run.yaml`, both or neither, then a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError, in_one_line
from geffect_fast.paths import is_there, user_path
from geffect_fast.results.form import check_size
from geffect_fast.storage.lock import locked, restored
from geffect_fast.storage.manifest import Sums, check_file
from geffect_fast.storage.run_folder import (
    EVALUATION,
    plain_attrs,
    staged_run,
    write_config,
    write_dataset,
)
from geffect_fast.storage.run_yaml import AnyConfig
from geffect_fast.storage.save_run import add_report

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter


def save_evaluation(
    folder: str | Path,
    dataset: xr.Dataset,
    config: AnyConfig,
    overwrite: bool = False,
    report: Reporter | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    sums: Mapping[str, Sums] | None = None,
) -> None:
    """Write measures and the config that replays them into a run folder, then add a report.

    Args:
        folder: made where it does not exist; other files in it stay.
        dataset: result of `geffect_fast.evaluate` for one or several models, of
            `geffect_fast.control` or of `geffect_fast.relearn`.
        config: the settings that replay the run.
        overwrite: whether to replace a run that is there.
        report: writes tables, plots and a page.
        inputs: as in `staged_run`.
        sums: checksums of the files that the run was made from, by option.

    Raises:
        InputError: as in `staged_run`, or the disk refuses.
        UnfinishedError: the report fails; the numbers are written.
    """
    with locked(folder) as path:
        with staged_run(folder, overwrite, inputs, lambda: sums or {}) as staging:
            write_dataset(dataset, staging / EVALUATION)
            write_config(config, staging)
        add_report(path, dataset, report)


def table_of(dataset: xr.Dataset) -> pd.DataFrame:
    """The measures as a table: one row a number, with its model or step, metric, set and bounds.

    For a control a row also holds the same number of the original model and of the unlearned model
    as it is, the chosen share of the unlearned model (`alpha_chosen`), the smallest measured share
    beyond it that fails (`alpha_lost`), and the retention at the chosen share.
    """
    import pandas as pd

    axes = list(dataset["value"].dims)
    columns = ["value", "value_low", "value_high"]
    if "alpha_chosen" in dataset:
        at_share = dataset["retention"].sel(alpha=dataset["alpha_chosen"]).reset_coords(drop=True)
        dataset = dataset.assign(retention=at_share)
        columns += ["original_value", "unlearned_value", "alpha_chosen", "alpha_lost", "retention"]
    numbers = dataset[columns].to_dataframe(dim_order=axes).reset_index()
    kept = numbers.dropna(subset=[name for name in columns if name.endswith("value")], how="all")
    kept = kept[[*axes, "statistic", *columns]]
    return pd.concat([kept, assessed(dataset)]) if "touched" in dataset else kept


def assessed(dataset: xr.Dataset) -> pd.DataFrame:
    """The numbers of the survey's assessment other than measures, in rows of the same form.

    Rows of relearning come first, then costs, then effects. For relearning, `statistic` names the
    number of updates. Effects are of the model before unlearning, so their rows name no model.
    """
    import pandas as pd

    axis = "model" if "model" in dataset["value"].dims else "step"
    relearned = dataset[["relearned", "relearned_low", "relearned_high"]].to_dataframe()
    relearned = relearned.reset_index().rename(
        columns={
            "relearned_metric": "metric",
            "relearned_set": "set",
            **{f"relearned{end}": f"value{end}" for end in ("", "_low", "_high")},
        }
    )
    relearned["statistic"] = "after " + relearned["relearned_step"].astype(str) + " updates"
    costs = [
        dataset[name].to_dataframe(name="value").reset_index().assign(metric=name)
        for name in ("seconds", "peak_memory", "touched")
    ]
    effects = []
    if "effect" in dataset:
        of = dataset[["effect", "effect_low", "effect_high"]].to_dataframe().reset_index()
        of = of.rename(columns=lambda name: name.replace("effect", "value"))
        effects = [of.assign(metric=of["risk"] + " of " + of["objective"].astype(str))]
    columns = [axis, "metric", "set", "statistic", "value", "value_low", "value_high"]
    rows = pd.concat([relearned, *costs, *effects]).reindex(columns=columns)
    return rows.dropna(subset=["value"])


def holds_evaluation(folder: str | Path) -> bool:
    """Whether a run folder, or a file, was written by `evaluate`."""
    path = user_path(folder)
    try:
        return path.name == EVALUATION or is_there(path / EVALUATION)
    except OSError:  # the code that reads the path reports the error
        return False


def open_evaluation(folder: str | Path) -> xr.Dataset:
    """The measures in a run folder of `evaluate`, loaded into memory with the file closed again.

    Args:
        folder: a run folder, or an `evaluation.nc` itself.

    Raises:
        InputError: the folder holds no measures, or the file is damaged.
    """
    from geffect_fast.storage.netcdf import read_dataset

    path = user_path(folder)
    try:
        restored(path)
        file = path / EVALUATION if path.is_dir() else path
        if not is_there(file):
            raise InputError(f"{folder} holds no {EVALUATION}; give a folder made by evaluate")
        if file.name == EVALUATION:
            check_file(file.parent, EVALUATION, "run evaluate again")
        check_size(file)
        with read_dataset(file) as dataset:
            loaded = dataset.load()
        loaded.attrs = plain_attrs(loaded.attrs)
    except InputError:
        raise
    except Exception as error:  # a torn file fails in many ways, deep in HDF5
        raise InputError(
            f"{folder} is torn or not NetCDF ({in_one_line(error, 120)}); run evaluate again"
        ) from error
    if not {"value", "sample_value"} <= set(loaded.data_vars):
        raise InputError(f"{folder} holds no measures; give a folder made by evaluate")
    return loaded
