"""What a page says of step results: the answer, verdicts, curves, predictions, every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures.svg import Colours
from geffect_fast.report.html.blocks import (
    Block,
    Items,
    Table,
    Text,
    cell,
    cell_with_interval,
    effect_heads,
    figure_block,
)
from geffect_fast.report.html.profile import MOST_ROWS, left_out
from geffect_fast.report.summary.findings import findings
from geffect_fast.report.summary.objectives import UNLEARN, Interval, summarise
from geffect_fast.report.summary.step_findings import turning_sentence
from geffect_fast.report.summary.steps import (
    PREDICTIONS,
    Outcome,
    Steps,
    agreements,
    lead_objective,
    outcome_sentence,
    risk_words,
    trust_sentences,
)
from geffect_fast.report.summary.sweep import thinned
from geffect_fast.report.tables.compare import (
    comparison_intervals,
    comparison_rows,
    comparison_spreads,
)
from geffect_fast.report.tables.profile import interval_line, symbol
from geffect_fast.results.rows_needed import rows_note
from geffect_fast.results.told_apart import (
    half_width,
    interval_of,
    precision_error,
    risk_spreads,
    told_apart,
)

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
    few = rows_note(dataset.isel(step=0))
    return [
        Text(outcome_sentence(dataset), "lead"),
        *(Text(sentence) for sentence in [*([few] if few else []), *sentences, *trust]),
    ]


_NOTE = (
    "Cost: rise of the worst other risk for a unit rise of the forget risk; below 0 it fell. A "
    "dash: not defined."
)


def verdicts(dataset: xr.Dataset) -> list[Block]:
    """What a run came to, and every objective at its first and last step."""
    read = Steps.of(dataset)
    spreads = risk_spreads(dataset)
    outcome = Outcome.of(read.values, read.risks, spreads)
    trained = dataset.attrs.get("trained_objective")
    row = [
        str(trained or "checkpoints"),
        outcome.verdict,
        f"{read.steps[0]} to {read.steps[-1]}",
        *(
            cell_with_interval(rise, interval_of(rise, moved))
            for rise, moved in zip(outcome.change.values(), spreads[-1] - spreads[0], strict=True)
        ),
        cell_with_interval(outcome.cost, outcome.cost_interval, ".2g"),
    ]
    heads = [f"rise of the {risk_words(risk)}" for risk in outcome.change]
    measured = Table(
        "What was measured from the first step to the last",
        ["trained on" if trained else "run", "verdict", "steps", *heads, "cost"],
        [row],
        frozenset([0, 1, 2]),
    )
    note = f"{_NOTE} Collateral: the cost of a further small step, to first order."
    drawn = interval_line(dataset.attrs)
    notes = [note, *([drawn] if drawn else [])]
    return [measured, _objectives(dataset), *(Text(line, "note") for line in notes)]


def compared_verdicts(both: xr.Dataset) -> list[Block]:
    """What each of several runs came to, on the steps that they share."""
    rows, intervals = comparison_rows(both), comparison_intervals(both)
    risks = [str(risk) for risk in both["risk"].values]
    steps, equal = both["step"].values, rows[0]["equal_removal"]
    table = Table(
        f"What was measured from step {steps[0]} to step {steps[-1]}",
        [
            *("run", "trained on", "verdict"),
            *(f"rise of the {risk_words(risk)}" for risk in risks),
            *("cost", f"harm at {cell(equal, '.2g')}"),
        ],
        [
            [
                row["run"],
                row["objective"] if trained else "checkpoints",
                row["verdict"],
                *(
                    cell_with_interval(row[name], of.get(name), spec)
                    for name, spec in (
                        *((f"rise_{risk}", "+.3g") for risk in risks),
                        *(("cost", ".3g"), ("harm_at_equal_removal", ".3g")),
                    )
                ),
            ]
            for row, of, trained in zip(rows, intervals, both["trained"].values, strict=True)
        ],
        frozenset([0, 1, 2]),
    )
    note = (
        f"{_NOTE} Harm at {cell(equal, '.2g')}: rise of the worst other risk when the forget risk "
        "first had risen so far, the most that all runs reach."
    )
    drawn = interval_line(both.attrs)
    return [table, *(Text(line, "note") for line in [note, *([drawn] if drawn else [])])]


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
                    *(cell_with_interval(e, row.intervals.get(r)) for r, e in row.effects.items()),
                    cell_with_interval(row.collateral, row.collateral_interval, ".2g"),
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
    figures: Mapping[str, Figure | None],
    names: tuple[str, ...],
    colours: Colours,
    prefix: str = "",
) -> list[Block]:
    """Those of the figures that there are, described by their labels."""
    there = {name: figure for name in names if (figure := figures.get(name)) is not None}
    return [
        figure_block(figure, f"{prefix}{name}", str(figure.get_label()), colours)
        for name, figure in there.items()
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
    columns: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    if "learning_rate" in dataset:
        columns["lr"] = dataset["learning_rate"].values, None
    spreads = risk_spreads(dataset)
    moved = spreads - np.roll(spreads, 1, axis=0)
    for m, risk in enumerate(read.risks):
        values, effects = read.value_bounds, read.effect_bounds
        columns[f"R_{symbol(risk)}"] = (
            read.values[:, m],
            None if values is None else values[:, :, m],
        )
        columns[f"e_{symbol(risk)}"] = (
            read.effects[:, 0, m],
            None if effects is None else effects[:, :, 0, m],
        )
        names = {"cosine": "cos", "measured_change": "ΔR"}
        names |= {name: f"ΔR, {words}" for name, words in PREDICTIONS.items()}
        for name, words in names.items():
            if name in lead:
                found, bounds = lead[name].sel(risk=risk).values, None
                if name == "measured_change" and moved.shape[-1]:
                    bounds = found + np.outer([-1, 1], half_width(moved[:, m]))
                columns[f"{words} ({symbol(risk)})"] = found, bounds
    for name, words in (("loss", "loss"), ("grad_norm", "|grad|")):
        if name in lead:
            columns[words] = lead[name].values, None
    rows = [
        [
            str(read.steps[s]),
            *(
                cell_with_interval(
                    float(values[s]), None if bounds is None else tuple(bounds[:, s]), ".4g"
                )
                for values, bounds in columns.values()
            ),
        ]
        for s in kept
    ]
    return [
        Table(f"Every step under {read.objectives[0]}", ["step", *columns], rows),
        *left_out(len(read.steps), "steps", len(kept)),
    ]


def _with(name: str, alike: list[str]) -> str:
    """A run and those that the rows do not tell apart from it."""
    return f"{name} (as far as these rows tell no other than {', '.join(alike)})" if alike else name


def _direction(value: float, interval: Interval) -> int:
    """1 for a rise, -1 for none; 0 where its interval holds 0."""
    if interval[0] <= 0 <= interval[1]:
        return 0
    return 1 if value > 0 else -1


def compared_answer(
    runs: Mapping[str, xr.Dataset], models: Mapping[str, xr.Dataset], both: xr.Dataset
) -> list[Block]:
    """Which of several runs removed most, which at the least cost, and what each came to.

    Args:
        runs: they.
        models: what they say of their last step, by sample at most.
        both: of `geffect_fast.compare`.
    """
    rows, share = comparison_rows(both), precision_error(both.attrs)
    spreads = comparison_spreads(both)
    known = bool(spreads["cost"].shape[-1])
    tell = " and ".join(["these rows"] * known + ["16 bits"] * bool(share)) + " tell"
    place = {row["run"]: i for i, row in enumerate(rows)}

    def differ(x: dict[str, Any], y: dict[str, Any], name: str) -> bool:
        of_x, of_y = (spreads[name][place[row["run"]]] for row in (x, y))
        off_x, off_y = (share * abs(row[name]) for row in (x, y))
        return bool(told_apart(x[name], y[name], off_x, off_y, of_x, of_y))

    rise = f"rise_{UNLEARN}"
    side = [
        _direction(row[rise], interval_of(row[rise], of))
        for row, of in zip(rows, spreads[rise], strict=True)
    ]
    removed = [row for row, way in zip(rows, side, strict=True) if way == 1]
    sentences = []
    if removed:
        best = max(removed, key=lambda row: row[rise])
        alike = [
            row["run"]
            for row in removed
            if (share or known) and row is not best and not differ(row, best, rise)
        ]
        least = min(removed, key=lambda row: row[rise])
        if len(removed) > 1 and len(alike) == len(removed) - 1:
            sentences.append(
                f"{'All' if len(removed) == len(rows) else len(removed)} of {len(rows)} runs raise "
                f"the forget risk, alike as far as {tell}: by {cell(least[rise], '.3g')} to "
                f"{cell(best[rise], '.3g')}."
            )
        else:
            also = f"; {', '.join(alike)} as much, as far as {tell}" if alike else ""
            sentences.append(
                f"Of {len(rows)} runs, {best['run']} raises the forget risk most, by "
                f"{cell(best[rise], '.3g')}{also}."
            )
    for name, words in (
        (
            "harm_at_equal_removal",
            f"once each has raised it by {cell(rows[0]['equal_removal'], '.3g')}",
        ),
        ("cost", "for a unit of forgetting"),
    ):
        ranked = sorted((row for row in rows if math.isfinite(row[name])), key=lambda r: r[name])
        if len(ranked) > 1:
            least, most = ranked[0], ranked[-1]
            if (share or known) and not differ(least, most, name):
                sentences.append(
                    f"The worst other risk has risen alike under all, as far as {tell} "
                    f"({cell(least[name], '.3g')} to {cell(most[name], '.3g')}), {words}."
                )
                break
            low, high = (
                [r["run"] for r in ranked if known and r is not end and not differ(r, end, name)]
                for end in (least, most)
            )
            sentences.append(
                f"The worst other risk has risen least under {_with(least['run'], low)} "
                f"({cell(least[name], '.3g')}) and most under {_with(most['run'], high)} "
                f"({cell(most[name], '.3g')}), {words}."
            )
            break
    for way, words in (
        (-1, "The forget risk does not rise in"),
        (0, "Whether the forget risk rises is within what the choice of the rows moves in"),
    ):
        names = [row["run"] for row, of in zip(rows, side, strict=True) if of == way]
        if names:
            sentences.append(f"{words} {', '.join(names)}.")
    blocks: list[Block] = [Text(" ".join(sentences), "lead")]
    for name, dataset in runs.items():
        where = findings(models[name].sel(objective=[lead_objective(dataset)]))[1]
        said = [
            outcome_sentence(dataset),
            turning_sentence(Steps.of(dataset)),
            f"At the last step: {where}",
            *trust_sentences(dataset)[:1],
        ]
        blocks += [Text(name, "label"), Items(said)]
    return blocks
