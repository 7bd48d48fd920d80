"""The number of forget rows needed to know e_u, from the interval of the rows measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import has_intervals

if TYPE_CHECKING:
    import xarray as xr

WIDE = 0.2
"""Relative half-width of the interval of e_u up to which there is no note."""
SOME = 20
"""Number of rows that the note suggests where only one row was measured."""


def rows_note(dataset: xr.Dataset) -> str:
    """A note on the width of the interval of e_u, with the number of rows that would narrow it.

    An interval narrows with the root of the number of rows, so `n (width / WIDE)^2` rows are
    needed. The note asks for no more rows than the data has (attribute `forget_rows`; without it
    all rows are measured).

    Args:
        dataset: a result at one step.

    Returns:
        A sentence or two; empty where the interval is narrow enough (`WIDE`), or not known.
    """
    if not has_intervals(dataset):
        return ""
    objectives = [str(objective) for objective in dataset["objective"].values]
    trained = str(dataset.attrs.get("trained_objective", ""))
    one = dataset.sel(objective=trained if trained in objectives else objectives[0], risk=UNLEARN)
    e_u = float(one["g_effect"].sum(skipna=False))
    low, high = float(one["g_effect_low"]), float(one["g_effect_high"])
    n = int(dataset.attrs["n_forget"])
    there = int(dataset.attrs.get("forget_rows", n))
    if math.isnan(low):
        if n > 1:  # e_u itself is NaN
            return ""
        more = f"measure {_asked(SOME, there)}" if there > 1 else "give more"
        return f"No interval of e_u can be given from one forget row: {more}."
    off = max(high - e_u, e_u - low) / abs(e_u) if e_u else math.inf
    if off <= WIDE:
        return ""
    at = f" at step {int(dataset['step'])}" if "step" in dataset.coords else ""
    uncertain = f"{100 * off:.0f} %" if off < 1 else "more than itself"
    takes, wanted = "it takes more rows", there
    if math.isfinite(off):
        wanted = math.ceil(n * (off / WIDE) ** 2 - 1e-6)
        takes = f"it takes about {wanted:,} rows"
    if there <= n:
        remedy = f"{takes}, and all {n} are measured"
    elif wanted > there:
        remedy = f"{takes}, more than there are; measure {_asked(wanted, there)}"
    elif wanted == there:
        remedy = f"{takes}; measure {_asked(wanted, there)}"
    else:
        remedy = f"measure about {_asked(wanted, there)}"
    return (
        f"e_u{at} is {e_u:+.3g} [{low:+.3g}, {high:+.3g}]: the choice of {n} forget rows makes it "
        f"uncertain by {uncertain}. To know it to within {100 * WIDE:.0f} %, {remedy}."
    )


def _asked(wanted: int, there: int) -> str:
    """The number of rows wanted, or all, with the option that measures them."""
    if wanted >= there:
        return f"all {there:,} (--probe-rows all)"
    return f"{wanted:,} rows (--probe-rows {wanted})"
