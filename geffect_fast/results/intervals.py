"""Intervals of effects, risks and collateral: how much of a number is the choice of the rows.

The rows of each data set are drawn anew, with replacement and as many, by themselves, and every
number is found again from the shares of the rows drawn: a percentile bootstrap. For few rows its
deviations are stretched by

    t(n - 1) / t(inf) * sqrt(n / (n - 1))        "expanded", Hesterberg, arXiv 1411.5279

An effect is a product of two gradients, and both are of rows that were chosen. Those of the
objective are told apart by the result. The forget rows make the gradient of the forget risk too:
where the shares drawn add up to `s`, the effect on it is `s |s| / |e|`. What the rows of the other
risks add is known along that gradient (`geffect_fast.results.risk_rows`). Means keep the number of
tokens that they have in the data, so that rows of unlike lengths make intervals wider.

Nothing can be said of a data set of one row, or where the result sums over samples.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
"""Of the draws that lie between the bounds."""
Z = 1.959964
"""The same of a normal distribution, in standard deviations either side."""
DRAWS = 1000
SEED = 0

NEGLIGIBLE = 1e-6
"""An objective whose effects are this small beside the largest has none but rounding."""

_AT_ONCE = 256
"""Objectives of which all draws are in memory."""


def stretch(n: int) -> float:
    """By what deviations that are found from `n` rows are multiplied; NaN for fewer than two."""
    if n < 2:
        return math.nan
    v = n - 1
    # The quantile of Student's distribution (Abramowitz and Stegun, 26.7.5); within 4 % from v = 2.
    powers = [
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    ]
    t = Z + sum(power / v**k for k, power in enumerate(powers, 1))
    return t / Z * math.sqrt(n / v)


@functools.lru_cache(maxsize=8)
def _drawn(name: str, n: int) -> np.ndarray:
    """Weights of a data set's rows in each draw, `(DRAWS, n)`: counts, stretched about 1."""
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    counts = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
    return 1 + (counts - 1) * stretch(n)


def row_weights(sets: Sequence[str]) -> np.ndarray:
    """Weights of rows in each draw, `(DRAWS, n)`; NaN where a data set has one row alone.

    Args:
        sets: of each of the rows, the name of its data set.
    """
    names = np.asarray(sets, dtype=str)
    weights = np.empty((DRAWS, len(names)))
    for name in dict.fromkeys(names.tolist()):
        own = names == name
        weights[:, own] = _drawn(name, int(own.sum()))
    return weights


def bounds(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of `LEVEL` of the draws along the first axis; NaN where a draw is NaN."""
    out = (1 - LEVEL) / 2
    # Infinite draws are not averaged with finite ones.
    low, high = np.quantile(draws, [out, 1 - out], axis=0, method="nearest")
    return low, high


def collateral_of(effects: np.ndarray, negligible: float = 0.0) -> np.ndarray:
    """Largest of `e / e_u` over the other risks, from effects `(..., M)`, the forget risk first.

    NaN where `e_u` is not below `-negligible`, or an effect is not finite; 0 without other risks.

    Args:
        effects: on all risks.
        negligible: the size below which `e_u` is none.
    """
    e_u, others = effects[..., 0], effects[..., 1:]
    forgets = (e_u < -negligible) & np.isfinite(effects).all(-1)
    ratio = others / np.where(forgets, e_u, np.nan)[..., None]
    worst = ratio.max(-1) if others.shape[-1] else np.where(forgets, 0.0, np.nan)
    return worst + 0.0  # turns -0.0 into 0.0


def effect_intervals(
    rows: np.ndarray, sets: Sequence[str], spreads: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Variables of a result: bounds of effects and of collateral, and collateral itself.

    Args:
        rows: effects by row, `(K, M, n)` fp64, the forget risk first.
        sets: of each row, the name of its data set.
        spreads: of `spread_of_risk`, for every risk but the first, `(n_m,)` each.

    Returns:
        `g_effect_low` and `g_effect_high` (objective, risk), of the whole data's effects;
        `collateral`, `collateral_low` and `collateral_high` (objective); `risk_row_spread` (risk,
        risk_row), as given, 0 beyond a risk's rows. A draw in which the forget risk would not rise
        has an infinite collateral.
    """
    weights = row_weights(sets)
    others = np.zeros((DRAWS, 1 + len(spreads)))
    stored = np.zeros((1 + len(spreads), max(map(len, spreads), default=0)))
    for m, of in enumerate(spreads, 1):
        # Stretched already, as `told_apart` takes it.
        others[:, m] = (row_weights([f"risk {m}"] * len(of)) - 1) @ of / stretch(len(of))
        stored[m, : len(of)] = of
    effects = rows.sum(-1)
    largest = np.abs(effects[np.isfinite(effects)]).max(initial=0.0)
    found = []
    for at in range(0, len(rows), _AT_ONCE):
        e_u = effects[at : at + _AT_ONCE, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = np.einsum("bn,kmn->bkm", weights, rows[at : at + _AT_ONCE], optimize=True)
            draws += e_u[:, None] * others[:, None]
            twice = draws[..., 0] * np.abs(draws[..., 0] / e_u)
            draws[..., 0] = np.where(e_u == 0, draws[..., 0], twice)
        ratio = collateral_of(draws)
        ratio[np.isnan(ratio) & np.isfinite(draws).all(-1)] = math.inf
        found.append((*bounds(draws), *bounds(ratio)))
    low, high, least, most = (np.concatenate(part) for part in zip(*found, strict=True))
    both = ("objective", "risk")
    return {
        "g_effect_low": (both, low),
        "g_effect_high": (both, high),
        "collateral": ("objective", collateral_of(effects, NEGLIGIBLE * largest)),
        "collateral_low": ("objective", least),
        "collateral_high": ("objective", most),
        "risk_row_spread": (("risk", "risk_row"), stored),
    }


def cosine_interval(
    cosine: float, effect: float, interval: tuple[float, float]
) -> tuple[float, float]:
    """The interval of a cosine, from that of the effect that it is of.

        r c / sqrt(r^2 c^2 + 1 - c^2),        r = bound / effect

    Rows move the gradient along the risk's, and what it has across that stays: so -1 stays -1,
    however uncertain the effect. NaN where the interval is not known, or there is no effect.

    Args:
        cosine: `c`, of the two gradients.
        effect: their product.
        interval: of it.
    """
    if effect == 0:
        return math.nan, math.nan
    across = max(1 - cosine**2, 0.0)

    def at(bound: float) -> float:
        along = bound / effect * cosine
        return along / math.hypot(along, math.sqrt(across)) if along else 0.0

    low, high = sorted(map(at, interval))
    return low, high


def spread_of_risk(along: np.ndarray, square: float) -> np.ndarray:
    """What each row of a risk moves an effect by when rows are drawn, in units of `e_u`, `(n,)`.

    NaN where the risk has one row alone.

    Args:
        along: `< grad R_j, G >` of its rows, `(n,)`.
        square: `< G, G >`, of the forget risk's gradient.
    """
    moved = (along - along.mean()) / square if square > 0 else np.zeros(len(along))
    return moved * stretch(len(along))


def risk_interval(
    values: np.ndarray, parts: np.ndarray | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a risk.

    Args:
        values: of each row, what it adds to the risk, `(n,)`.
        parts: of each row, its part of what the mean is over, such as its tokens, adding to 1; None
            where the risk is a sum.
        name: of the data set.
    """
    weights = row_weights([name] * len(values))
    draws = weights @ values
    return bounds(draws if parts is None else draws / (weights @ parts))


def risk_spread(values: np.ndarray, parts: np.ndarray | None) -> np.ndarray:
    """What each row moves a risk by when rows are drawn, `(n,)`, as `told_apart` takes it.

    Args:
        values, parts: as `risk_interval` takes them.
    """
    middle = values.mean() if parts is None else values.sum() * parts
    return (values - middle) * stretch(len(values))
