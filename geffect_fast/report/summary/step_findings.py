"""Sentences on a step result: its outcome, its turning point, and which predictions to trust."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.format import bounds, number, number_with_interval, risk_words
from geffect_fast.report.summary.effects import interval_at
from geffect_fast.report.summary.objectives import MUCH_HARM, collateral_of
from geffect_fast.report.summary.steps import PREDICTIONS, Outcome, Steps, agreements
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import interval_of, risk_spreads, told_apart

if TYPE_CHECKING:
    import xarray as xr

GOOD, OPEN, BAD = 0, 1, 2
"""A further step removes more than it costs, these rows do not tell, or it costs more."""


def turning_sentence(read: Steps) -> str:
    """The sentence on the step from which a further step costs more than it removes.

    A further step is one on the lead objective. Where intervals are known, a step counts as costing
    more, or as removing more, only where its whole interval of collateral says so. So a turn is
    stated only where the intervals before and after it do not overlap.
    """
    lead, steps = read.objectives[0], read.steps
    costs = [
        collateral_of(dict(zip(read.risks, map(float, effect), strict=True)), 0.0)
        for effect in read.effects[:, 0]
    ]
    finite = np.isfinite(read.effects[:, 0]).all(axis=1)
    side = _sides(read, costs, finite)
    n, n_open, n_bad = len(costs), int((side == OPEN).sum()), int((side == BAD).sum())
    lost = int((~finite).sum())
    tail = f" At {lost} of {n} steps its effects are NaN or infinite." if lost else ""
    if n_open == n:
        return (
            f"At no probed step do these rows tell whether a further small step on {lead} removes "
            f"more than it costs.{tail}"
        )
    if n_bad == n:
        return (
            f"At no probed step does a further small step on {lead} remove more than it costs."
            f"{tail}"
        )
    if not n_open and not n_bad:
        return (
            f"At every probed step a further small step on {lead} removes more than it costs any "
            f"other risk.{tail}"
        )
    trailing = int((side[::-1] != BAD).argmax())
    before = int(np.flatnonzero(side == GOOD)[-1]) if (side == GOOD).any() else None
    if trailing and before is not None:
        first = n - trailing
        between = ""
        if before + 1 < first:
            between = f" (between steps {steps[before]} and {steps[first]} these rows do not tell)"
        return (
            f"From step {steps[first]} on, a further small step on {lead} costs more than it "
            f"removes: there {_why(read, first, costs[first])}{between}.{tail}"
        )
    if not n_open:
        return (
            f"At {n_bad} of {n} probed steps a further small step on {lead} costs more than it "
            f"removes, first at step {steps[int((side == BAD).argmax())]}, but not at the last."
            f"{tail}"
        )
    n_good, opened = n - n_open - n_bad, steps[int((side == OPEN).argmax())]
    return (
        f"At {n_good} of {n} probed steps a further small step on {lead} removes more than it "
        f"costs, at {n_bad} it costs more; at {n_open}, first at step {opened}, these rows do not "
        f"tell.{tail}"
    )


def _sides(read: Steps, costs: list[float], finite: np.ndarray) -> np.ndarray:
    """`GOOD`, `OPEN` or `BAD` for every step, `(S,)`."""
    # a cost is NaN where the forget risk would not even rise
    bad = np.array([not cost <= MUCH_HARM for cost in costs])
    if read.collateral_bounds is None:
        return np.where(bad, BAD, GOOD)
    low, high = read.collateral_bounds[:, :, 0]
    return np.where((low > MUCH_HARM) | ~finite, BAD, np.where(high <= MUCH_HARM, GOOD, OPEN))


def _why(read: Steps, at: int, cost: float) -> str:
    """The reason why a further step at `at` costs more than it removes."""
    if math.isnan(cost):
        return "the forget risk would fall"
    interval = interval_at(read.collateral_bounds, at, 0)
    rise = number_with_interval(cost, interval, ".2g")
    return f"the worst other risk would rise by {rise} for a unit rise of the forget risk"


def outcome_sentence(dataset: xr.Dataset) -> str:
    """The sentence on what the run removed, and at what cost, as far as the rows tell."""
    read, spreads = Steps.of(dataset), risk_spreads(dataset)
    outcome = Outcome.of(read.values, read.risks, spreads)
    moved = dict(zip(read.risks, spreads[-1] - spreads[0], strict=True))
    trained = dataset.attrs.get("trained_objective")
    start = f"Trained on {trained}, from" if trained else "From"
    moves = []
    for risk, rise in outcome.change.items():
        low, high = interval_of(rise, moved[risk])
        if low <= 0 <= high:
            verb, size = "moves within noise, by", number(rise, "+.3g")
        else:
            verb, size = f"{'rises' if rise >= 0 else 'falls'} by", number(abs(rise), ".3g")
            low, high = (low, high) if rise >= 0 else (-high, -low)
        known = "" if math.isnan(low) else f" {bounds((low, high), '.3g')}"
        of = number(outcome.start[risk], ".3g")
        moves.append(f"the {risk_words(risk)} {verb} {size}{known} (from {of})")
    cost = ""
    if len(moves) > 1 and math.isfinite(outcome.cost):
        cost = _cost_words(outcome, moved)
    return (
        f"{start} step {read.steps[0]} to {read.steps[-1]} {', '.join(moves)}{cost}: "
        f"{outcome.verdict}."
    )


def _cost_words(outcome: Outcome, moved: dict[str, np.ndarray]) -> str:
    """The clause on what removal cost the worst other risk.

    The risk is named where the rows tell it from the other risks.
    """
    low, high = outcome.cost_interval
    if max(outcome.cost, -math.inf if math.isnan(high) else high) <= 0:
        return ", at no cost elsewhere"
    if low <= 0 <= high:
        return f", at a cost elsewhere within noise, {bounds((low, high), '.2g')}"
    others = {risk: rise for risk, rise in outcome.change.items() if risk != UNLEARN}
    worst = max(others, key=others.__getitem__)
    alike = any(
        moved[worst].size and not told_apart(rise, others[worst], 0, 0, moved[risk], moved[worst])
        for risk, rise in others.items()
        if risk != worst
    )
    what = "worst other risk" if alike else risk_words(worst)
    rise = number_with_interval(outcome.cost, outcome.cost_interval, ".2g")
    return f"; for a unit rise of the forget risk, the {what} rises by {rise}"


def trust_sentences(dataset: xr.Dataset) -> list[str]:
    """A sentence for each prediction: how well it holds, and how far to trust it."""
    sentences = []
    for name, by_risk in agreements(dataset).items():
        parts = [
            f"{risk_words(risk)} r = {number(a.correlation, '.2f')}, typically off by "
            f"{number(100 * a.error, '.0f')} % ({a.words})"
            for risk, a in by_risk.items()
        ]
        n = max(a.n for a in by_risk.values())
        sentences.append(
            f"First order {PREDICTIONS[name]} against {n} measured changes: {'; '.join(parts)}."
        )
    return sentences
