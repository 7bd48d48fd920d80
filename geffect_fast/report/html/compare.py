"""Page sections on several step results beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from geffect_fast.report.figures.compare import comparison_figures
from geffect_fast.report.figures.layer_maps import layer_maps
from geffect_fast.report.figures.prediction import prediction_figure
from geffect_fast.report.format import interval_line, number, number_with_interval, risk_words
from geffect_fast.report.html.blocks import Block, Items, Table, Text, drawn_blocks, notes_of
from geffect_fast.report.html.profile import scatters
from geffect_fast.report.html.steps import COST_NOTE, full_table, prediction_table
from geffect_fast.report.summary.effects import by_sample, labels
from geffect_fast.report.summary.findings import where_sentence
from geffect_fast.report.summary.run_findings import comparison_finding
from geffect_fast.report.summary.runs import comparison_intervals, comparison_rows
from geffect_fast.report.summary.step_findings import (
    outcome_sentence,
    trust_sentences,
    turning_sentence,
)
from geffect_fast.report.summary.steps import Steps, lead_objective
from geffect_fast.steps.compare import compare

if TYPE_CHECKING:
    import xarray as xr


def sections(
    runs: Mapping[str, xr.Dataset], models: Mapping[str, xr.Dataset]
) -> dict[str, list[Block]]:
    """The sections of a page on several step results, by id.

    Args:
        runs: the results by name.
        models: each result at its last step, without positions or tokens, by name.
    """
    both = compare(runs, what="report")
    figures = comparison_figures(both)
    blocks: dict[str, list[Block]] = {
        "answer": answer(runs, models, both),
        "verdicts": verdicts(both),
        "curves": drawn_blocks(figures, ("effects", "risks", "trade_off")),
        "layers": drawn_blocks(figures, ("groups",)),
        "cosines": drawn_blocks(figures, ("cosines",)),
        "prediction": [],
        "table": [],
    }
    scattered: dict[str, xr.DataArray] = {}
    for i, (name, dataset) in enumerate(runs.items()):
        lead, effect = lead_objective(dataset), by_sample(models[name])
        if effect is not None:
            at_last = f"{name}, at step {dataset['step'].values[-1]}"
            scattered[at_last] = effect.sel(objective=lead)
        own = {"layers": layer_maps(dataset, [lead]), "prediction": prediction_figure(dataset)}
        layers, predicted = (drawn_blocks(own, (drawn,), f"r{i}-") for drawn in own)
        for id, found in (
            ("layers", layers),
            ("prediction", prediction_table(dataset) + predicted),
            ("table", full_table(dataset)),
        ):
            if found:
                blocks[id] += [Text(name, "label"), *found]
    blocks["instances"] = scatters(scattered, len(runs), "runs")
    if lines := "; ".join(both.attrs["left_out"]):
        blocks["curves"] += notes_of([f"Not all runs have these, which are left out: {lines}."])
    return blocks


def verdicts(both: xr.Dataset) -> list[Block]:
    """A table of the outcome of each run, over the steps that all runs share."""
    rows, intervals = comparison_rows(both), comparison_intervals(both)
    steps, risks = both["step"].values, labels(both, "risk")
    equal = number(rows[0]["equal_removal"], ".2g")
    columns = {"harm_at_equal_removal": (f"harm at {equal}", ".3g")}
    columns |= {f"rise_{risk}": (f"rise of the {risk_words(risk)}", "+.3g") for risk in risks}
    table = Table(
        f"What was measured from step {steps[0]} to step {steps[-1]}",
        [*("run", "verdict", "cost", "trained on"), *(head for head, _ in columns.values())],
        [
            [
                row["run"],
                row["verdict"],
                number_with_interval(row["cost"], of.get("cost"), ".3g"),
                row["objective"] if trained else "checkpoints",
                *(
                    number_with_interval(row[name], of.get(name), spec)
                    for name, (_, spec) in columns.items()
                ),
            ]
            for row, of, trained in zip(rows, intervals, both["trained"].values, strict=True)
        ],
        frozenset([0, 1, 3]),
    )
    note = (
        f"{COST_NOTE} Harm at {equal}: rise of the worst other risk when the forget risk first had "
        "risen so far, the most that all runs reach."
    )
    return [table, *notes_of([note, interval_line(both.attrs)])]


def answer(
    runs: Mapping[str, xr.Dataset], models: Mapping[str, xr.Dataset], both: xr.Dataset
) -> list[Block]:
    """Sentences on the runs that removed most and at the least cost, and each run's outcome.

    Args:
        runs: the results by name.
        models: each result at its last step, without positions or tokens, by name.
        both: the comparison of the runs, of `geffect_fast.compare`.
    """
    blocks: list[Block] = [Text(comparison_finding(both), "lead")]
    for name, dataset in runs.items():
        where = where_sentence(models[name].sel(objective=[lead_objective(dataset)]))
        said = [
            outcome_sentence(dataset),
            turning_sentence(Steps.of(dataset)),
            f"At the last step: {where}",
            *trust_sentences(dataset)[:1],
        ]
        blocks += [Text(name, "label"), Items(said)]
    return blocks
