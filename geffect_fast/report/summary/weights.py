"""The goal of token weights in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from geffect_fast.report.format import number

if TYPE_CHECKING:
    import xarray as xr


def goal_of(best: xr.Dataset) -> str:
    """The goal and the limit of weights of `geffect_fast.optimal_weights`, in a few words."""
    if "removal" in best.attrs:
        return f"least harm for e_u ≤ {number(best.attrs['removal'], '.3g')}"
    budget = best.attrs["retain_budget"]
    if budget == math.inf:
        return "most removal, at any harm"
    return f"most removal for e_r ≥ {number(-budget, '.3g')}"
