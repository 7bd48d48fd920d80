"""Effects at the original model as predictors of what unlearning changes: rows and sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.measure.against_effects import ORIGINAL
from geffect_fast.measure.rank_correlation import FEWEST
from geffect_fast.storage.csv_cells import write_csv

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

RUNS, CORRELATIONS = "runs.csv", "against_effects.csv"

EFFECTS = ("e_u", "e_r", "collateral")
"""Predictors that every run has; tables show them beside each change."""
EFFECTS_NOTE = (
    "e_u, e_r, collateral: at the original model, of the rows that the run probed, with 95 % "
    "intervals by the choice of these rows. Wanted: e_u strongly negative, e_r zero or positive."
)
RANKS_NOTE = (
    "Spearman's rank correlation over the runs of what is known at the original model with what "
    "changed, with its interval by drawing the runs anew. *: told from chance (p < 0.05, the "
    "interval leaves 0 out); the rest is within noise. u, r: on the forget and the retain risk."
)
_PREDICTORS = (
    ("cosine", "cosine: of the objective's gradient with the risk's."),
    ("update", "update: first-order change of the risk by the optimizer's own first updates."),
    ("sgd", "sgd: the same by plain gradient descent at the run's learning rate, −lr·e."),
)


def is_against_effects(dataset: xr.Dataset) -> bool:
    """Whether measures are those of `geffect_fast.against_effects`."""
    return {"effect", "change"} <= set(dataset.data_vars)


def predictor_notes(dataset: xr.Dataset) -> list[str]:
    """Lines that explain the predictors other than effects and collateral, where there are any."""
    there = {name.partition("_")[0] for name in dataset["predictor"].values.tolist()}
    return [line for word, line in _PREDICTORS if word in there]


def measured_pairs(dataset: xr.Dataset) -> list[tuple[str, str]]:
    """Pairs of a metric and a set for which some run has a change."""
    there = dataset["change"].notnull().any("run")
    return [
        (metric, name)
        for metric in dataset["metric"].values.tolist()
        for name in dataset["set"].values.tolist()
        if bool(there.sel(metric=metric, set=name))
    ]


def original_values(dataset: xr.Dataset) -> list[float]:
    """The original model's number for every pair of `measured_pairs`."""
    of = dataset["value"].sel(model=ORIGINAL)
    return [float(of.sel(metric=metric, set=name)) for metric, name in measured_pairs(dataset)]


def prediction_sentence(dataset: xr.Dataset) -> str:
    """Sentences on the rank correlations: how many are told from chance, and the strongest."""
    n = dataset.sizes["run"]
    known = dataset["spearman"].notnull()
    if not bool(known.any()):
        most = int(dataset["n_runs"].max())
        if n < FEWEST or most < FEWEST:
            return f"Rank correlations need {FEWEST} runs or more; these are {min(n, most)}."
        return "No rank correlations: nothing differs between the runs."
    pairs, beyond = int(known.sum()), int(dataset["beyond_noise"].sum())
    said = (
        f"Of {pairs} rank correlations over {n} runs {beyond} are told from chance; of numbers "
        f"that have nothing to do with each other about {max(round(0.05 * pairs), 1)} would be."
    )
    return " ".join([said, *filter(None, (_strongest(dataset, s) for s in ("forget", "retain")))])


def _strongest(dataset: xr.Dataset, name: str) -> str:
    """The sentence on the predictor that tells most metrics of a set; empty if it has none."""
    if name not in dataset["set"].values:
        return ""
    of = dataset.sel(set=name)
    sizes = abs(of["spearman"]).where(of["beyond_noise"])
    told = of["beyond_noise"].sum("metric")
    n = int(of["spearman"].notnull().any("predictor").sum())
    if not bool(sizes.notnull().any()):
        return f"On {name} nothing tells any of {n} metrics." if n else ""
    # Of those that tell most metrics, the strongest on average.
    order = sorted(
        of["predictor"].values.tolist(),
        key=lambda p: (int(told.sel(predictor=p)), float(sizes.sel(predictor=p).mean())),
    )
    best = order[-1]
    return (
        f"On {name} {best} tells {int(told.sel(predictor=best))} of {n} metrics, by a ρ of size "
        f"{float(sizes.sel(predictor=best).mean()):.2f} on average over these."
    )


def run_rows(dataset: xr.Dataset) -> pd.DataFrame:
    """A table with a row a run: predictors with bounds, and every metric's value and change."""
    import pandas as pd

    rows = []
    for run in dataset["run"].values.tolist():
        of = dataset.sel(run=run)
        row = {"run": run, "objective": str(of["objective"].item())}
        for predictor in dataset["predictor"].values.tolist():
            for side in ("", "_low", "_high"):
                value = float(of[f"effect{side}"].sel(predictor=predictor))
                row[f"{predictor}{side}"] = value
        for metric, name in measured_pairs(dataset):
            at = {"metric": metric, "set": name}
            row[f"{metric} {name}"] = float(of["value"].sel(model=run, **at))
            row[f"change of {metric} {name}"] = float(of["change"].sel(**at))
        rows.append(row)
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def correlation_rows(dataset: xr.Dataset) -> pd.DataFrame:
    """A table with a row a predictor, metric and set: both coefficients, bounds and p-values."""
    names = ["n_runs", "beyond_noise"]
    for kind, p_value in (("spearman", "p_value"), ("kendall", "kendall_p_value")):
        names += [kind, f"{kind}_low", f"{kind}_high", p_value]
    table = dataset[names].to_dataframe(dim_order=["predictor", "metric", "set"]).reset_index()
    pairs = measured_pairs(dataset)
    kept = [pair in pairs for pair in zip(table["metric"], table["set"], strict=True)]
    return table[kept][["predictor", "metric", "set", *names]]


def write_predictors(dataset: xr.Dataset, folder: Path) -> None:
    """Write `runs.csv` and `against_effects.csv` into a folder."""
    write_csv(run_rows(dataset), folder / RUNS)
    write_csv(correlation_rows(dataset), folder / CORRELATIONS)
