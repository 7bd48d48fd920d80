"""Page sections on a step result: the answer, verdicts, curves, predictions, every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures.steps import step_figures
from geffect_fast.report.format import interval_line, number, number_with_interval, risk_words
from geffect_fast.report.html import measures, profile
from geffect_fast.report.html.blocks import (
    MOST_ROWS,
    Block,
    Items,
    Table,
    Text,
    drawn_blocks,
    left_out,
    notes_of,
)
from geffect_fast.report.summary.effects import interval_at, labels, last_step, thinned
from geffect_fast.report.summary.findings import where_sentence
from geffect_fast.report.summary.measures import (
    live_measures,
    meanings,
    measure_findings,
    measure_notes,
)
from geffect_fast.report.summary.objectives import summarise
from geffect_fast.report.summary.step_findings import (
    outcome_sentence,
    trust_sentences,
    turning_sentence,
)
from geffect_fast.report.summary.steps import (
    PREDICTIONS,
    Outcome,
    Steps,
    agreements,
    lead_objective,
)
from geffect_fast.results.risks import effect_name, symbol
from geffect_fast.results.rows_needed import rows_note
from geffect_fast.results.told_apart import half_width, interval_of, risk_spreads

if TYPE_CHECKING:
    import xarray as xr


def sections(dataset: xr.Dataset, last: xr.Dataset) -> dict[str, list[Block]]:
    """The sections of a page on one step result, by id.

    Args:
        dataset: the result.
        last: the result at its last step, without positions or tokens.
    """
    figures = step_figures(dataset)

    def drawn(*names: str) -> list[Block]:
        return drawn_blocks(figures, names)

    step = int(dataset["step"].values[-1])

    def at_last(blocks: list[Block]) -> list[Block]:
        return [Text(f"At the last step, {step}", "label"), *blocks] if blocks else []

    return {
        "answer": answer(dataset),
        "verdicts": verdicts(dataset),
        "curves": drawn("effects", "risks", "norms"),
        "measures": measured(dataset, drawn("measures")),
        "layers": drawn("layers", "groups") + at_last(profile.layers(last)),
        "instances": at_last(profile.instances(last)),
        "tokens": drawn("token_weights") + at_last(profile.tokens(last_step(dataset))),
        "cosines": drawn("cosines") + at_last(profile.cosines(last)),
        "prediction": prediction_table(dataset) + drawn("prediction"),
        "table": full_table(dataset),
    }


def measured(dataset: xr.Dataset, drawn: list[Block]) -> list[Block]:
    """The metrics that were measured at steps of the training: findings, figure and tables.

    Args:
        dataset: a step result.
        drawn: the block of the figure of measures, if there is one.
    """
    found = live_measures(dataset)
    if found is None:
        return []
    tables = measures.tables(found, "summary.csv and results.nc hold")
    said = [Items(measure_findings(found)), *drawn, *tables]
    return [*said, *notes_of([*measure_notes(found), *meanings(found)])]


def answer(dataset: xr.Dataset) -> list[Block]:
    """Sentences on the outcome of a run.

    They say what was removed and at what cost, from which step on a further step costs more than
    it removes, where the effect sits, and which predictions to trust.
    """
    read = Steps.of(dataset)
    lead = lead_objective(dataset)
    sentences = [turning_sentence(read)]
    ends = dict.fromkeys([0, len(read.steps) - 1])
    for place in ends:
        where = where_sentence(dataset.isel(step=place).sel(objective=[lead]))
        sentences.append(f"At step {read.steps[place]}: {where}")
    trust = trust_sentences(dataset) or [
        "No prediction can be compared with what was measured: there is but one step, or none is "
        "finite."
    ]
    few = rows_note(dataset.isel(step=0))
    return [
        Text(outcome_sentence(dataset), "lead"),
        *(Text(sentence) for sentence in [*([few] if few else []), *sentences, *trust]),
    ]


COST_NOTE = (
    "Cost: rise of the worst other risk for a unit rise of the forget risk; below 0 it fell. A "
    "dash: not defined."
)


def verdicts(dataset: xr.Dataset) -> list[Block]:
    """Tables of a run's outcome, and of every objective at the first and the last step."""
    read = Steps.of(dataset)
    spreads = risk_spreads(dataset)
    outcome = Outcome.of(read.values, read.risks, spreads)
    trained = dataset.attrs.get("trained_objective")
    rises = zip(outcome.change.values(), spreads[-1] - spreads[0], strict=True)
    measured = Table(
        "What was measured from the first step to the last",
        [
            *("trained on" if trained else "run", "verdict", "cost", "steps"),
            *(f"rise of the {risk_words(risk)}" for risk in outcome.change),
        ],
        [
            [
                str(trained or "checkpoints"),
                outcome.verdict,
                number_with_interval(outcome.cost, outcome.cost_interval, ".2g"),
                f"{read.steps[0]} to {read.steps[-1]}",
                *(number_with_interval(rise, interval_of(rise, moved)) for rise, moved in rises),
            ]
        ],
        frozenset([0, 1, 3]),
    )
    note = f"{COST_NOTE} Collateral: the cost of a further small step, to first order."
    return [measured, *_objectives(dataset), *notes_of([note, interval_line(dataset.attrs)])]


def _objectives(dataset: xr.Dataset) -> list[Block]:
    """A table of the objectives at the first and the last step."""
    steps, n = dataset["step"].values, dataset.sizes["objective"]
    ends = [*dict.fromkeys([0, len(steps) - 1])]
    kept = thinned(np.arange(n), MOST_ROWS // len(ends)).tolist()
    rows = []
    for place in ends:
        found = summarise(dataset.isel(step=place))
        rows += [
            [row.objective, str(steps[place]), row.verdict, *profile.effect_cells(row.numbers)]
            for row in (found[k] for k in kept)
        ]
    table = Table(
        "Objectives at the first and the last step",
        ["objective", "step", "verdict", "collateral", *map(effect_name, labels(dataset, "risk"))],
        rows,
        frozenset([0, 2]),
    )
    return [table, *left_out(n, "objectives", len(kept))]


def prediction_table(dataset: xr.Dataset) -> list[Block]:
    """A table of how far predictions agree with what was measured, and whether to trust them."""
    rows = [
        [
            f"{PREDICTIONS[name]}, {risk_words(risk)}",
            a.words,
            str(a.n),
            number(a.correlation, "+.3f"),
            number(100 * a.same_sign, ".0f"),
            number(100 * a.error, ".1f"),
        ]
        for name, by_risk in agreements(dataset).items()
        for risk, a in by_risk.items()
    ]
    if not rows:
        return []
    head = ["prediction", "reading", "changes", "correlation", "same sign, %", "typical error, %"]
    return [Table("How predictions hold, risk by risk", head, rows, frozenset([0, 1]))]


def full_table(dataset: xr.Dataset) -> list[Block]:
    """A table of every number at every step, for the lead objective."""
    read, spreads = Steps.of(dataset), risk_spreads(dataset)
    lead = dataset.sel(objective=read.objectives[0])
    moved = half_width(spreads - np.roll(spreads, 1, axis=0)) if spreads.shape[-1] else None
    columns: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    if "learning_rate" in dataset:
        columns["lr"] = dataset["learning_rate"].values, None
    words = {"cosine": "cos", "measured_change": "ΔR"}
    words |= {name: f"ΔR, {way}" for name, way in PREDICTIONS.items()}
    for m, risk in enumerate(read.risks):
        values, effects = read.value_bounds, read.effect_bounds
        of_value = None if values is None else values[:, :, m]
        of_effect = None if effects is None else effects[:, :, 0, m]
        columns[f"R_{symbol(risk)}"] = read.values[:, m], of_value
        columns[effect_name(risk)] = read.effects[:, 0, m], of_effect
        for name in (name for name in words if name in lead):
            found, bounds = lead[name].sel(risk=risk).values, None
            if name == "measured_change" and moved is not None:
                bounds = found + np.outer([-1, 1], moved[:, m])
            columns[f"{words[name]} ({symbol(risk)})"] = found, bounds
    for name, head in (("loss", "loss"), ("grad_norm", "|grad|")):
        if name in lead:
            columns[head] = lead[name].values, None
    kept = thinned(np.arange(len(read.steps)), MOST_ROWS).tolist()
    rows = [
        [
            str(read.steps[s]),
            *(
                number_with_interval(float(values[s]), interval_at(bounds, s), ".4g")
                for values, bounds in columns.values()
            ),
        ]
        for s in kept
    ]
    return [
        Table(f"Every step under {read.objectives[0]}", ["step", *columns], rows),
        *left_out(len(read.steps), "steps", len(kept)),
    ]
