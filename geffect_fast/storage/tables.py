"""Tables of results: the long tables that `export` writes, and the summary of measures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from geffect_fast.results.by_rows import CELLS
from geffect_fast.storage.results_file import reading

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def effect_tables(dataset: xr.Dataset) -> Iterator[pd.DataFrame]:
    """The long table of effects that `export` writes, piece by piece: coordinates, then `g_effect`.

    Rows go objective by objective, then in the order of the other axes. With an axis of tokens or
    positions they go sample by sample within an objective, without the places beyond a sample's
    end.
    """
    whole = dataset["g_effect"]
    names = [str(name) for name in whole.dims]
    names += [str(name) for name in whole.coords if name not in whole.dims]
    by_token = "token_id" in whole.coords
    order = ["objective", *(["sample"] if by_token else [])]
    order += [str(name) for name in whole.dims if name not in order]
    for place in _pieces({name: whole.sizes[name] for name in order}):
        with reading(dataset.encoding.get("source", "the result")):
            table = whole.isel(place).to_dataframe(dim_order=order).reset_index()
        if by_token:
            table = table[table["token_id"] >= 0]
        yield table[[*names, "g_effect"]]


def _pieces(sizes: dict[str, int]) -> Iterator[dict[str, slice]]:
    """Slices that cut an array into pieces of at most `CELLS` cells, the last axis fastest.

    Args:
        sizes: lengths of the axes, by name.
    """
    steps: dict[str, int] = {}
    inner = 1
    for name, n in reversed(sizes.items()):
        steps[name] = max(1, min(n, CELLS // inner))
        inner *= n
    for starts in product(*(range(0, n, steps[name]) for name, n in sizes.items())):
        yield {
            name: slice(at, at + step)
            for (name, step), at in zip(reversed(steps.items()), starts, strict=True)
        }


def measure_tables(dataset: xr.Dataset) -> Iterator[pd.DataFrame]:
    """The long table of measures, one piece for each metric: of data sets, then of their rows.

    For a row of data `statistic` is `row`, and the bounds are empty; for a data set `sample` and
    `question` are empty. The survey's assessment follows as a last piece, where there is one.
    """
    import pandas as pd

    bounds = ["value_low", "value_high"]
    axes = [str(dim) for dim in dataset["value"].dims if dim in ("model", "step")]
    columns = [*axes, "metric", "set", "statistic", "sample", "question", "value", *bounds]
    for at in range(dataset.sizes["metric"]):
        of = dataset.isel(metric=at)
        sets = of[["value", *bounds]].to_dataframe().reset_index().dropna(subset=["value"])
        names = {"sample_set": "set", "sample_value": "value"}
        rows = of["sample_value"].to_dataframe().reset_index().rename(columns=names)
        rows = rows.dropna(subset=["value"]).assign(statistic="row")
        table = pd.concat([sets, rows]).reindex(columns=columns)
        yield table.astype({"sample": "Int64", "question": "string", "value_low": "float64"})
    if "touched" in dataset:
        table = assessment_rows(dataset).reindex(columns=columns)
        yield table.astype({"sample": "Int64", "question": "string"})


def measure_summary(dataset: xr.Dataset) -> pd.DataFrame:
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
    return pd.concat([kept, assessment_rows(dataset)]) if "touched" in dataset else kept


def assessment_rows(dataset: xr.Dataset) -> pd.DataFrame:
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
