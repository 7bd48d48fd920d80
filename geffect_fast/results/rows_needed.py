"""How many forget rows it takes to know e_u, from the interval that those measured give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from geffect_fast.results.told_apart import has_intervals

if TYPE_CHECKING:
    import xarray as xr

WIDE = 0.2
"""The relative deviation up to which an interval of e_u is narrow enough not to be spoken of."""
SOME = 20
"""Rows to begin with where one alone says nothing."""


def rows_note(dataset: xr.Dataset) -> str:
    """How wide the interval of e_u is for the rows measured, and what would make it narrower.

    An interval narrows with the root of the rows, so that it takes `n (width / WIDE)^2` of them; at
    most those that there are can be asked for (attribute `forget_rows`, else all are measured).

    Args:
        dataset: a result at one step.

    Returns:
        A sentence or two; empty where the interval is narrow enough (`WIDE`), or not known.
    """
    if not has_intervals(dataset):
        return ""
    objectives = [str(objective) for objective in dataset["objective"].values]
    trained = str(dataset.attrs.get("trained_objective", ""))
    one = dataset.sel(objective=trained if trained in objectives else objectives[0], risk="unlearn")
    e_u = float(one["g_effect"].sum(skipna=False))
    low, high = float(one["g_effect_low"]), float(one["g_effect_high"])
    n = int(dataset.attrs["n_forget"])
    there = int(dataset.attrs.get("forget_rows", n))
    if math.isnan(low):
        if n > 1:  # it is e_u that is not a number
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
    """So many rows, or all that there are, and the option that asks for them."""
    if wanted >= there:
        return f"all {there:,} (--probe-rows all)"
    return f"{wanted:,} rows (--probe-rows {wanted})"
