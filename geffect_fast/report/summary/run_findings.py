"""Sentences on several runs: those that removed most, and those that did so at the least cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from geffect_fast.report.format import Interval, number
from geffect_fast.report.summary.runs import comparison_rows, comparison_spreads
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import interval_of, precision_error, told_apart

if TYPE_CHECKING:
    import xarray as xr

Row = dict[str, Any]
"""A row of `comparison_rows`."""


def comparison_finding(both: xr.Dataset) -> str:
    """Sentences that name the runs of most removal and of least cost, as far as the rows tell.

    Args:
        both: result of `geffect_fast.compare`.
    """
    rows, share = comparison_rows(both), precision_error(both.attrs)
    spreads = comparison_spreads(both)
    known = bool(spreads["cost"].shape[-1])
    tell = " and ".join(["these rows"] * known + ["16 bits"] * bool(share)) + " tell"
    place = {row["run"]: i for i, row in enumerate(rows)}

    def alike(x: Row, y: Row, name: str) -> bool:
        of_x, of_y = (spreads[name][place[row["run"]]] for row in (x, y))
        off_x, off_y = (share * abs(row[name]) for row in (x, y))
        return not told_apart(x[name], y[name], off_x, off_y, of_x, of_y)

    rise = f"rise_{UNLEARN}"
    ways = [
        _direction(row[rise], interval_of(row[rise], of))
        for row, of in zip(rows, spreads[rise], strict=True)
    ]
    removed = [row for row, way in zip(rows, ways, strict=True) if way == 1]
    sentences = []
    if removed:
        best, least = (choose(removed, key=lambda row: row[rise]) for choose in (max, min))
        most, sure = number(best[rise], ".3g"), bool(share or known)
        others = [r["run"] for r in removed if sure and r is not best and alike(r, best, rise)]
        if len(removed) > 1 and len(others) == len(removed) - 1:
            sentences.append(
                f"{'All' if len(removed) == len(rows) else f'{len(removed)} of'} {len(rows)} runs "
                f"raise the forget risk, alike as far as {tell}: by {number(least[rise], '.3g')} "
                f"to {most}."
            )
        else:
            also = f"; {', '.join(others)} as much, as far as {tell}" if others else ""
            sentences.append(
                f"Of {len(rows)} runs, {best['run']} raises the forget risk most, by {most}{also}."
            )
    for name, words in (
        (
            "harm_at_equal_removal",
            f"once each has raised it by {number(rows[0]['equal_removal'], '.3g')}",
        ),
        ("cost", "for a unit of forgetting"),
    ):
        ranked = sorted((row for row in rows if math.isfinite(row[name])), key=lambda r: r[name])
        if len(ranked) < 2:
            continue
        ends = ranked[0], ranked[-1]
        low, high = (number(end[name], ".3g") for end in ends)
        if (share or known) and alike(*ends, name):
            sentences.append(
                f"The worst other risk has risen alike under all, as far as {tell} "
                f"({low} to {high}), {words}."
            )
            break
        least_under, most_under = (
            _with(
                end["run"],
                [r["run"] for r in ranked if known and r is not end and alike(r, end, name)],
            )
            for end in ends
        )
        sentences.append(
            f"The worst other risk has risen least under {least_under} ({low}) and most under "
            f"{most_under} ({high}), {words}."
        )
        break
    for way, words in (
        (-1, "The forget risk does not rise in"),
        (0, "These rows do not tell whether the forget risk rises in"),
    ):
        names = [row["run"] for row, of in zip(rows, ways, strict=True) if of == way]
        if names:
            sentences.append(f"{words} {', '.join(names)}.")
    return " ".join(sentences)


def _with(name: str, alike: list[str]) -> str:
    """A run's name, followed by the runs that the rows do not tell from it."""
    return f"{name} (these rows do not tell it from {' and '.join(alike)})" if alike else name


def _direction(value: float, interval: Interval) -> int:
    """1 for a rise, -1 for a fall or no change, 0 where the interval holds 0."""
    if interval[0] <= 0 <= interval[1]:
        return 0
    return 1 if value > 0 else -1
