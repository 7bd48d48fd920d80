"""The tables of a step result for the terminal: steps, objectives, and first-order predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from geffect_fast.report.format import number, risk_words
from geffect_fast.report.summary.effects import interval_at, last_step, thinned
from geffect_fast.report.summary.measures import live_measures
from geffect_fast.report.summary.objectives import summarise
from geffect_fast.report.summary.steps import PREDICTIONS, Steps, agreements
from geffect_fast.report.tables.cells import (
    covered,
    effect_cells,
    verdict_cell,
    with_interval,
)
from geffect_fast.report.tables.fitted import FittedTable
from geffect_fast.report.tables.measures import render_evaluation
from geffect_fast.report.tables.profile import totals_table
from geffect_fast.results.risks import effect_name, symbol
from geffect_fast.results.rows_needed import rows_note

if TYPE_CHECKING:
    import xarray as xr

ROWS = 9
"""The most steps that the table lists."""

NOTE = (
    "R is a risk, e the effect on it at that step: an update of size lr changes R by -lr·e to "
    "first order. collateral: rise of the worst other risk for a unit rise of the forget risk, in "
    "a small step from there; the verdict is of that step too."
)


def render_steps(dataset: xr.Dataset) -> RenderableType:
    """All tables of a step result, for `rich.console.Console.print`."""
    parts: list[RenderableType] = [steps_table(dataset), Text(NOTE, style="dim"), Text()]
    if few := rows_note(dataset.isel(step=0)):
        parts += [Text(few), Text()]
    if dataset.sizes["objective"] > 1:
        last = last_step(dataset)
        table = totals_table(last)
        table.title = f"All objectives at step {int(last['step'])}"
        parts.append(table)
    trust = trust_table(dataset)
    if trust is not None:
        parts.append(trust)
    measures = live_measures(dataset)
    if measures is not None:
        shown = thinned(np.arange(measures.sizes["step"]), ROWS)
        parts += [render_evaluation(measures.isel(step=shown)), Text()]
    return Group(*parts, *covered(dataset.attrs))


def steps_table(dataset: xr.Dataset) -> FittedTable:
    """A table of evenly spaced steps: risks, effects, collateral, verdict.

    The effects are of the trained objective, or else of the first.
    """
    read = Steps.of(dataset)
    lead, n_forget, last = read.objectives[0], dataset.attrs["n_forget"], read.steps[-1]
    what = f"Trained on {lead}" if "trained_objective" in dataset.attrs else f"Effects of {lead}"
    of_step = _of_step(dataset, lead)
    table = FittedTable(
        f"{what} to step {last}, measured at {len(read.steps)} steps on {n_forget} forget rows",
        [
            "step",
            *(f"R_{symbol(risk)}" for risk in read.risks),
            *map(effect_name, read.risks),
            *(f"e_P,{symbol(risk)}" for risk in read.risks if of_step is not None),
            "collateral",
            "verdict",
        ],
        ["verdict"],
    )
    for i in thinned(np.arange(len(read.steps)), ROWS):
        (row,) = summarise(dataset.isel(step=i).sel(objective=[lead]))
        *effects, collateral = effect_cells(row.numbers)
        table.add_row(
            str(read.steps[i]),
            *(
                with_interval(value, interval_at(read.value_bounds, i, m), ".4g")
                for m, value in enumerate(read.values[i])
            ),
            *effects,
            *(number(e, "+.3g") for e in (of_step[i] if of_step is not None else ())),
            collateral,
            verdict_cell(row.verdict),
        )
    return table


def _of_step(dataset: xr.Dataset, objective: str) -> np.ndarray | None:
    """Effects of an objective in the optimizer's metric, `(S, M)`; None where they are unknown."""
    if "step_effect" not in dataset or not np.isfinite(dataset["step_total"].values).any():
        return None
    effect = dataset["step_effect"].sel(objective=objective)
    within = [d for d in effect.dims if d not in ("step", "risk")]
    return effect.sum(within, skipna=False).transpose("step", "risk").values


def trust_table(dataset: xr.Dataset) -> FittedTable | None:
    """A table of how well first order predicts each risk's changes; None without predictions."""
    found = agreements(dataset)
    if not found:
        return None
    n = max(a.n for by_risk in found.values() for a in by_risk.values())
    table = FittedTable(
        f"First order against {n} measured changes",
        ["predicted", "change of", "correlation", "same sign", "typically off by", "so"],
        ["predicted", "change of", "so"],
    )
    for name, by_risk in found.items():
        for risk, a in by_risk.items():
            table.add_row(
                PREDICTIONS[name],
                risk_words(risk),
                number(a.correlation, ".3f"),
                f"{100 * a.same_sign:.0f} %" if a.n else "–",
                f"{100 * a.error:.0f} %" if np.isfinite(a.error) else "–",
                a.words,
            )
    return table
