"""Sentences on a result of `profile`: what was found, where it comes from, how to read signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.format import bounds, number_with_interval, question
from geffect_fast.report.summary.effects import by_place, by_sample, labels, shares
from geffect_fast.report.summary.objectives import HARDLY, PERHAPS, UNCLEAR, Summary, summarise
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import has_intervals, row_spreads, told_apart

if TYPE_CHECKING:
    import xarray as xr

NAMED = 4
"""The most objectives that a sentence names as not told apart from another."""

_PARTS = {
    "embedding": "the embedding",
    "shallow": "the shallow blocks",
    "middle": "the middle blocks",
    "deep": "the deep blocks",
    "final_norm": "the final norm",
    "lm_head": "the output layer",
}


def findings(dataset: xr.Dataset) -> tuple[str, str]:
    """Sentences on what was found, and on where the effect comes from.

    Args:
        dataset: result of `geffect_fast.profile`.
    """
    return _what(summarise(dataset)), where_sentence(dataset)


def _what(rows: list[Summary]) -> str:
    good = [row for row in rows if row.forgets]
    broken = [row.objective for row in rows if row.verdict.startswith("undefined")]
    unclear = sum(row.verdict in (UNCLEAR, PERHAPS) for row in rows)
    tail = f", and {len(broken)} undefined ({', '.join(broken)})" if broken else ""
    if unclear:
        tail = f"; for {unclear} these rows do not tell{tail}"
    objectives = "objectives raises" if len(good) == 1 else "objectives raise"
    if not good:
        return f"None of the {len(rows)} objectives clearly raises the forget risk{tail}."
    how = f" (cosine at least {HARDLY} in size)" if good[0].cosines else ""
    start = f"{len(good)} of {len(rows)} {objectives} the forget risk{how}{tail}"
    best = min(good, key=lambda row: row.collateral)
    worst = max(good, key=lambda row: row.collateral)
    if not _differ(best, worst):
        tells = "" if best.collateral == worst.collateral else f", as far as {_teller(best)} tell"
        same = f"They do so at the same cost elsewhere{tells}" if len(good) > 1 else "The cost"
        return f"{start}. {same}: {_cost(best)} for a unit of forgetting."
    return (
        f"{start}. The least cost elsewhere is that of {best.objective}: {_cost(best)} for a unit "
        f"of forgetting{_no_other(best, good)}. The highest is that of {worst.objective}: "
        f"{_cost(worst)}{_no_other(worst, good)}."
    )


def _differ(x: Summary, y: Summary) -> bool:
    return bool(
        told_apart(
            x.collateral,
            y.collateral,
            x.collateral_error,
            y.collateral_error,
            x.collateral_spread,
            y.collateral_spread,
        )
    )


def _teller(row: Summary) -> str:
    """The limits that decide whether objectives are told apart: the rows, 16 bits, or both."""
    by = ["these rows"] if row.collateral_spread.size else []
    return " and ".join([*by, *(["16 bits"] if row.collateral_error else [])])


def _no_other(row: Summary, rows: list[Summary]) -> str:
    """The clause that names the objectives whose collateral is not told from that of `row`.

    Rounding or the choice of the data's rows alone may explain the difference. Empty where there
    are no such objectives.
    """
    by = _teller(row)
    if not by:
        return ""
    alike = [other.objective for other in rows if other is not row and not _differ(other, row)]
    if len(alike) > NAMED:
        alike = [*alike[:NAMED], f"{len(alike) - NAMED} more"]
    return f"; {by} do not tell it from {' and '.join(alike)}" if alike else ""


def _cost(row: Summary) -> str:
    others = [risk for risk in row.effects if risk != UNLEARN]
    what = f"the {others[0]} risk" if len(others) == 1 else "the worst other risk"
    if row.collateral == 0:
        return f"{what} does not change"
    low, high = row.collateral_interval
    if low <= 0 <= high:
        return f"the change of {what} is within noise, {bounds((low, high), '.2g')}"
    verb = "rises" if row.collateral > 0 else "falls"
    if row.collateral < 0:
        low, high = -high, -low
    return f"{what} {verb} by {number_with_interval(abs(row.collateral), (low, high), '.2g')}"


def where_sentence(dataset: xr.Dataset) -> str:
    """The sentence on the parts and the rows that carry the effect on the forget risk.

    Their shares are means over the objectives.
    """
    clauses = []
    placed = by_place(dataset, blocks=False)
    at = labels(dataset, "risk").index(UNLEARN)
    if placed is not None:
        size = _mean_size(placed[1][:, at])
        if size is not None:
            top = int(size.argmax())
            names = [_PARTS.get(label, label) for label in placed[0]]
            alike = [names[p] for p in _no_smaller(dataset, size, top)]
            tell = (
                f" (these rows do not tell that from what sits in {' and '.join(alike)})"
                if alike
                else ""
            )
            share = f"{100 * size[top]:.0f} % of the effect on the forget risk"
            clauses.append(f"{share} sits in {names[top]}{tell}")
    effect, what = by_sample(dataset), "it" if clauses else "the effect on the forget risk"
    if effect is not None:
        size = _mean_size(effect.values[:, at])
        if size is not None:
            order = np.argsort(-size, kind="stable")
            half = int(np.searchsorted(np.cumsum(size[order]), 0.5 - 1e-12)) + 1
            asked = question(effect, int(order[0]), 60)
            quoted = f' ("{asked}")' if asked else ""
            row = effect["sample"].values[order[0]]
            rows = "row carries" if half == 1 else "rows carry"
            clauses.append(
                f"{half} of {size.size} forget {rows} half of {what}, row {row}{quoted} the most"
            )
    if not clauses:
        return "Where the effect on the forget risk sits cannot be told from this result."
    over = "Averaged over objectives, " if dataset.sizes["objective"] > 1 else ""
    sentence = f"{over}{' and '.join(clauses)}."
    return sentence[0].upper() + sentence[1:]


def _no_smaller(dataset: xr.Dataset, size: np.ndarray, top: int) -> list[int]:
    """Parts whose mean share the rows do not tell from the largest; none without intervals.

    The share `a_p = |e_p| / S` of a part, where `S` is the sum of sizes over parts, changes by
    `(d|e_p| - a_p dS) / S`.
    """
    if not has_intervals(dataset) or "sample" not in dataset["g_effect"].dims:
        return []
    placed = by_place(dataset, blocks=False, rows=True)
    assert placed is not None
    rows = placed[1][:, labels(dataset, "risk").index(UNLEARN)]
    rows = rows[_usable(rows.sum(-1))]
    effects = rows.sum(-1)
    moved = 2 * np.sign(effects)[..., None] * row_spreads(rows, dataset["set"].values)
    whole = np.abs(effects).sum(-1)[:, None, None]
    part = np.abs(shares(effects))[..., None]
    spread = ((moved - part * moved.sum(1, keepdims=True)) / whole).mean(0)
    apart = told_apart(size, size[top], 0, 0, spread, spread[top])
    return [int(p) for p in np.flatnonzero(~apart) if p != top]


def _usable(values: np.ndarray) -> np.ndarray:
    """Whether each objective's effects are finite and not all zero, `(K,)`."""
    return np.isfinite(values).all(axis=-1) & (values != 0).any(axis=-1)


def _mean_size(values: np.ndarray) -> np.ndarray | None:
    """Mean share of the size at each place, over the usable objectives; None without any."""
    usable = _usable(values)
    if not usable.any():
        return None
    return np.abs(shares(values[usable])).mean(axis=0)


def signs() -> str:
    """The sentences on how to read the signs of effects."""
    return (
        "How to read the signs: a small descent step on an objective changes a risk by minus its "
        "effect. A strongly negative e_u is what you want: it raises the risk on what must go. An "
        "e_r of zero or more leaves the rest unharmed; a negative e_r harms it."
    )
