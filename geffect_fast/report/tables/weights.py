"""The tables of the best token weights for the terminal: their effects, tokens taken and spared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.text import Text

from geffect_fast.report.format import Interval, number, question
from geffect_fast.report.summary.weights import goal_of
from geffect_fast.report.tables.cells import with_interval
from geffect_fast.report.tables.fitted import FittedTable
from geffect_fast.report.tokens.colours import inline, visible

if TYPE_CHECKING:
    import xarray as xr

TOKENS_SHOWN = 6
ROUNDING = 1e-12
"""A sum that is at most this part of the sizes that it adds up is rounding, and shown as 0."""


def render_weights(best: xr.Dataset) -> Group:
    """The tables of weights of `geffect_fast.optimal_weights`, for `rich.console.Console.print`.

    The effects of the weights are compared with those of `ga`, all of whose weights are 1.
    """
    full = best.attrs["max_weight"]
    weight = best["weight"].values
    return Group(
        _reached(best),
        Text(reached(best), style="bold"),
        Text(_counts(best), style="dim"),
        Text(),
        _tokens(best, weight == 0, "token_e_r", "Spared (weight 0), most harm first"),
        _tokens(best, weight == full, "token_e_u", f"In full (weight {full:g}), lowest e_u first"),
    )


def reached(best: xr.Dataset) -> str:
    """One sentence on how much of ga's removal and how much of its harm the weights keep."""
    kept, harm = _compared(best, *_effects(best))
    return f"The best weights keep {kept} of ga's removal and {harm} of its harm."


def _reached(best: xr.Dataset) -> FittedTable:
    title = f"Token weights from 0 to {best.attrs['max_weight']:g}: {goal_of(best)}"
    table = FittedTable(title, ["weights", "e_u", "e_r", "removal kept", "harm"], ["weights"])
    for name, prefix, e in (
        ("ga", "ga_", _of_ga(best)),
        ("best", "", _effects(best)),
    ):
        numbers = [
            with_interval(value, _interval(best, f"{prefix}{effect}"))
            for value, effect in zip(e, ("e_u", "e_r"), strict=True)
        ]
        table.add_row(name, *numbers, *_compared(best, *e))
    return table


def _effects(best: xr.Dataset) -> list[float]:
    """`e_u` and `e_r` of the weights, as printed: 0 where only rounding is left."""
    return [
        _unrounded(float(best[name]), best["weight"] * best[f"token_{name}"])
        for name in ("e_u", "e_r")
    ]


def _of_ga(best: xr.Dataset) -> list[float]:
    """`e_u` and `e_r` of `ga`, as printed."""
    tokens = (best["token_e_u"], best["token_e_r"])
    return [_unrounded(float(shares.sum()), shares) for shares in tokens]


def _unrounded(value: float, added: xr.DataArray) -> float:
    """A sum of `added`, or one of them; 0 where the value is rounding beside their sizes."""
    return 0.0 if abs(value) <= ROUNDING * float(abs(added).sum()) else value


def _interval(best: xr.Dataset, name: str) -> Interval | None:
    """The interval of an effect; None where it is not known."""
    if f"{name}_low" not in best:
        return None
    return float(best[f"{name}_low"]), float(best[f"{name}_high"])


def _compared(best: xr.Dataset, e_u: float, e_r: float) -> tuple[str, str]:
    """Removal and harm in percent of those of `ga`; a dash where `ga` has none."""
    ga_u, ga_r = _of_ga(best)
    kept = f"{number(100 * e_u / ga_u, '.1f')} %" if ga_u < 0 else "–"
    if e_r >= 0:
        return kept, "none"
    return kept, f"{number(100 * e_r / ga_r, '.1f')} %" if ga_r < 0 else "–"


def _counts(best: xr.Dataset) -> str:
    weight = best["weight"].values
    weight = weight[~np.isnan(weight)]
    full = best.attrs["max_weight"]
    n_none, n_full = int((weight == 0).sum()), int((weight == full).sum())
    line = f"Of {len(weight):,} tokens, {n_full:,} have weight {full:g}, {n_none:,} have weight 0"
    if between := len(weight) - n_none - n_full:
        line += f", {between} lies between"
    price = float(best["shadow_price"])
    more = (
        f"An e_r lower by one would buy an e_u lower by {price:.3g}"
        if price
        else "A lower e_r would buy no lower e_u"
    )
    return f"{line}. {more}."


def _tokens(best: xr.Dataset, chosen: np.ndarray, by: str, title: str) -> FittedTable:
    """A table of the chosen tokens whose effect `by` is lowest, the lowest first."""
    table = FittedTable(title, ["token", "e_u", "e_r", "row", "question"], ["token", "question"])
    effect = np.where(chosen, best[by].values, np.inf)
    for flat in effect.argsort(axis=None, kind="stable")[: min(TOKENS_SHOWN, int(chosen.sum()))]:
        i, t = (int(at) for at in np.unravel_index(flat, effect.shape))
        text = str(best["token_text"].values[i, t]) if "token_text" in best.coords else ""
        table.add_row(
            Text(inline(visible(text, int(best["token_id"].values[i, t])))),
            *(
                number(_unrounded(float(best[name].values[i, t]), best[name]))
                for name in ("token_e_u", "token_e_r")
            ),
            str(best["sample"].values[i]),
            Text(question(best["weight"], i, 50)),
        )
    return table
