"""What a page says of step results: the answer, verdicts, curves, predictions, every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.families import thinned
from geffect_fast.report.findings import findings
from geffect_fast.report.page_blocks import (
    Block,
    Items,
    Table,
    Text,
    cell,
    effect_heads,
    figure_block,
)
from geffect_fast.report.page_profile import MOST_ROWS, left_out
from geffect_fast.report.steps import (
    PREDICTIONS,
    Outcome,
    Steps,
    agreements,
    lead_objective,
    outcome_sentence,
    risk_words,
    trust_sentences,
)
from geffect_fast.report.summary import MUCH_HARM, UNLEARN, collateral_of, summarise
from geffect_fast.report.svg import Colours
from geffect_fast.report.table import symbol

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


def answer(dataset: xr.Dataset) -> list[Block]:
    """What was removed at what cost, from when on it was not worth it, where, and what to trust."""
    read = Steps.of(dataset)
    lead = lead_objective(dataset)
    sentences = [turning_sentence(read)]
    ends = dict.fromkeys([0, len(read.steps) - 1])
    for place in ends:
        where = findings(dataset.isel(step=place).sel(objective=[lead]))[1]
        sentences.append(f"At step {read.steps[place]}: {where}")
    trust = trust_sentences(dataset) or [
        "No prediction can be compared with what was measured: there is but one step, or none is "
        "finite."
    ]
    return [
        Text(outcome_sentence(dataset), "lead"),
        *(Text(sentence) for sentence in [*sentences, *trust]),
    ]


def turning_sentence(read: Steps) -> str:
    """From which step on a further step of the lead objective costs more than it removes."""
    lead = read.objectives[0]
    costs = [
        collateral_of(dict(zip(read.risks, map(float, effect), strict=True)), 0.0)
        for effect in read.effects[:, 0]
    ]
    finite = np.isfinite(read.effects[:, 0]).all(axis=1)
    # NaN where the forget risk would not even rise
    bad = np.array([not cost <= MUCH_HARM for cost in costs])
    lost = int((~finite).sum())
    tail = f" At {lost} of {len(costs)} steps its effects are NaN or infinite." if lost else ""
    good = np.flatnonzero(~bad)
    if not bad.any():
        return (
            f"At every probed step a further small step on {lead} removes more than it costs any "
            f"other risk.{tail}"
        )
    if not good.size:
        return (
            f"At no probed step does a further small step on {lead} remove more than it costs."
            f"{tail}"
        )
    last = int(good[-1])
    if last == len(costs) - 1:
        return (
            f"At {int(bad.sum())} of {len(costs)} probed steps a further small step on {lead} "
            f"costs more than it removes, first at step {read.steps[int(bad.argmax())]}, but not "
            f"at the last.{tail}"
        )
    why = (
        "the forget risk would fall"
        if math.isnan(costs[last + 1])
        else (
            f"the worst other risk would rise by {cell(costs[last + 1], '.2g')} for a unit rise of "
            "the forget risk"
        )
    )
    return (
        f"From step {read.steps[last + 1]} on, a further small step on {lead} costs more than it "
        f"removes: there {why}.{tail}"
    )


def verdicts(runs: Mapping[str, xr.Dataset]) -> list[Block]:
    """What each run came to, and for one run every objective at its first and last step."""
    read = {name: Steps.of(dataset) for name, dataset in runs.items()}
    risks = list(dict.fromkeys(risk for each in read.values() for risk in each.risks))
    rows = []
    for name, each in read.items():
        outcome = Outcome.of(each.values, each.risks)
        trained = runs[name].attrs.get("trained_objective")
        rows.append(
            [
                name,
                str(trained or "checkpoints"),
                outcome.verdict,
                f"{each.steps[0]} to {each.steps[-1]}",
                *(cell(outcome.change.get(risk, math.nan)) for risk in risks),
                cell(outcome.cost, ".2g"),
            ]
        )
    heads = [f"rise of the {risk_words(risk)}" for risk in risks]
    blocks: list[Block] = [
        Table(
            "What was measured from the first step to the last",
            ["run", "trained on", "verdict", "steps", *heads, "cost"],
            rows,
            frozenset([0, 1, 2, 3]),
        )
    ]
    if len(runs) == 1:
        (dataset,) = runs.values()
        blocks.append(_objectives(dataset))
    note = (
        "Cost: rise of the worst other risk for a unit rise of the forget risk; below 0 it fell. "
        "Collateral: the same of a small step, to first order. A dash: not defined."
    )
    return [*blocks, Text(note, "note")]


def _objectives(dataset: xr.Dataset) -> Table:
    """Every objective at the first and the last step."""
    rows = []
    steps = dataset["step"].values
    for place in dict.fromkeys([0, len(steps) - 1]):
        for row in summarise(dataset.isel(step=place)):
            rows.append(
                [
                    row.objective,
                    row.verdict,
                    str(steps[place]),
                    *(cell(e) for e in row.effects.values()),
                    cell(row.collateral, ".2g"),
                ]
            )
    risks = [str(risk) for risk in dataset["risk"].values]
    return Table(
        "Objectives at the first and the last step",
        ["objective", "verdict", "step", *effect_heads(risks), "collateral"],
        rows[:MOST_ROWS],
        frozenset([0, 1]),
    )


def blocks_of(
    figures: Mapping[str, Figure], names: tuple[str, ...], colours: Colours, prefix: str
) -> list[Block]:
    """Those of the figures that there are, described by their labels."""
    return [
        figure_block(figures[name], f"{prefix}{name}", str(figures[name].get_label()), colours)
        for name in names
        if name in figures
    ]


def prediction_table(dataset: xr.Dataset) -> list[Block]:
    """How far predictions agree with what was measured, and what to make of it."""
    rows = [
        [
            f"{PREDICTIONS[name]}, {risk_words(risk)}",
            a.words,
            str(a.n),
            cell(a.correlation, "+.3f"),
            cell(100 * a.same_sign, ".0f"),
            cell(100 * a.error, ".1f"),
        ]
        for name, by_risk in agreements(dataset).items()
        for risk, a in by_risk.items()
    ]
    if not rows:
        return []
    head = ["prediction", "reading", "changes", "correlation", "same sign, %", "typical error, %"]
    return [Table("How predictions hold, risk by risk", head, rows, frozenset([0, 1]))]


def full_table(dataset: xr.Dataset) -> list[Block]:
    """Every number of every step, under the lead objective."""
    read = Steps.of(dataset)
    lead = dataset.sel(objective=read.objectives[0])
    kept = [int(s) for s in thinned(np.arange(len(read.steps)), MOST_ROWS)]
    columns: dict[str, np.ndarray] = {}
    if "learning_rate" in dataset:
        columns["lr"] = dataset["learning_rate"].values
    for m, risk in enumerate(read.risks):
        columns[f"R_{symbol(risk)}"] = read.values[:, m]
        columns[f"e_{symbol(risk)}"] = read.effects[:, 0, m]
        names = {"cosine": "cos", "measured_change": "ΔR"}
        names |= {name: f"ΔR, {words}" for name, words in PREDICTIONS.items()}
        for name, words in names.items():
            if name in lead:
                columns[f"{words} ({symbol(risk)})"] = lead[name].sel(risk=risk).values
    for name, words in (("loss", "loss"), ("grad_norm", "|grad|")):
        if name in lead:
            columns[words] = lead[name].values
    rows = [
        [str(read.steps[s]), *(cell(float(values[s]), ".4g") for values in columns.values())]
        for s in kept
    ]
    return [
        Table(f"Every step under {read.objectives[0]}", ["step", *columns], rows),
        *left_out(len(read.steps), "steps", len(kept)),
    ]


def compared(runs: Mapping[str, xr.Dataset]) -> list[Block]:
    """Which of several runs removed most, and which at the least cost."""
    outcomes = {}
    for name, dataset in runs.items():
        read = Steps.of(dataset)
        outcomes[name] = Outcome.of(read.values, read.risks)
    rises = {n: o.change[UNLEARN] for n, o in outcomes.items() if math.isfinite(o.change[UNLEARN])}
    costs = {n: o.cost for n, o in outcomes.items() if math.isfinite(o.cost)}
    sentences = []
    if rises:
        best = max(rises, key=rises.__getitem__)
        sentences.append(
            f"Of {len(runs)} runs, {best} raises the forget risk most, by "
            f"{cell(rises[best], '.3g')}."
        )
    if costs:
        least, most = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
        sentences.append(
            f"The least cost for a unit of forgetting has {least} "
            f"({cell(costs[least], '.2g')}), the highest {most} ({cell(costs[most], '.2g')})."
        )
    kept = [name for name in runs if name not in costs]
    if kept:
        sentences.append(f"The forget risk does not rise in {', '.join(kept)}.")
    each = [
        f"{name}: {outcome_sentence(dataset)} {turning_sentence(Steps.of(dataset))}"
        for name, dataset in runs.items()
    ]
    return [Text(" ".join(sentences), "lead"), Items(each)]
