"""From which step of a training on a further step costs more than it removes, if the rows tell."""

from __future__ import annotations

import math

import numpy as np

from geffect_fast.report.html.blocks import cell_with_interval
from geffect_fast.report.summary.objectives import MUCH_HARM, UNKNOWN, collateral_of
from geffect_fast.report.summary.steps import Steps

GOOD, OPEN, BAD = 0, 1, 2
"""A further step removes more than it costs, the choice of the rows decides, it costs more."""


def turning_sentence(read: Steps) -> str:
    """From which step on a further step of the lead objective costs more than it removes.

    Where intervals are known, a step counts as one or the other where its whole interval of
    collateral does, so that a turn is said where those before and after it do not overlap.
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
            "At every probed step it is within what the choice of the rows moves whether a further "
            f"small step on {lead} removes more than it costs.{tail}"
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
            between = f" (between step {steps[before]} and it the choice of the rows decides)"
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
        f"costs, at {n_bad} it costs more; at {n_open}, first at step {opened}, that is within "
        f"what the choice of the rows moves.{tail}"
    )


def _sides(read: Steps, costs: list[float], finite: np.ndarray) -> np.ndarray:
    """Of every step `GOOD`, `OPEN` or `BAD`, `(S,)`."""
    # NaN where the forget risk would not even rise
    bad = np.array([not cost <= MUCH_HARM for cost in costs])
    if read.collateral_bounds is None:
        return np.where(bad, BAD, GOOD)
    low, high = read.collateral_bounds[:, :, 0]
    return np.where((low > MUCH_HARM) | ~finite, BAD, np.where(high <= MUCH_HARM, GOOD, OPEN))


def _why(read: Steps, at: int, cost: float) -> str:
    """What a further step does at one where it costs more than it removes."""
    if math.isnan(cost):
        return "the forget risk would fall"
    interval = UNKNOWN
    if read.collateral_bounds is not None:
        low, high = read.collateral_bounds[:, at, 0]
        interval = float(low), float(high)
    rise = cell_with_interval(cost, interval, ".2g")
    return f"the worst other risk would rise by {rise} for a unit rise of the forget risk"
