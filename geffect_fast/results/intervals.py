"""Intervals of effects, risks and collateral, for their uncertainty from the choice of the rows.

The intervals are a percentile bootstrap. The rows of each data set are drawn anew, with
replacement, as many as there are and independently of other sets, and every number is computed
again from the shares of the rows drawn. For few rows the deviations are stretched by

    t(n - 1) / t(inf) * sqrt(n / (n - 1))        "expanded", Hesterberg, arXiv 1411.5279

An effect is the product of two gradients, and the rows of both were chosen. The result holds the
share of each row of the objective. The forget rows are also the rows of the forget risk's gradient:
where the shares drawn add up to `s`, the effect on the forget risk is `s |s| / |e|`. The shares of
the other risks' rows are known along the forget risk's gradient (`geffect_fast.results.risk_rows`).
Effects keep the normaliser of the whole data, so rows of unlike lengths make their intervals wider.

There is no interval for a data set of one row, or where the result sums over samples.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
"""Share of the draws that lie between the bounds."""
Z = 1.959964
"""Half the width of the interval of a normal distribution at `LEVEL`, in standard deviations."""
DRAWS = 1000
SEED = 0

NEGLIGIBLE = 1e-6
"""Effects of an objective that are smaller than this, relative to the largest, are rounding."""

_AT_ONCE = 256
"""Number of objectives whose draws are in memory at once."""


def stretch(n: int) -> float:
    """The factor that stretches deviations found from `n` rows; NaN for fewer than two rows."""
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
    """Weights of rows in each draw, `(DRAWS, n)`; NaN where a data set has only one row.

    Args:
        sets: the name of each row's data set, `(n,)`.
    """
    names = np.asarray(sets, dtype=str)
    weights = np.empty((DRAWS, len(names)))
    for name in dict.fromkeys(names.tolist()):
        own = names == name
        weights[:, own] = _drawn(name, int(own.sum()))
    return weights


def bounds(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds of the middle `LEVEL` of draws along the first axis; NaN where a draw is NaN."""
    out = (1 - LEVEL) / 2
    # "nearest" takes one of the draws: interpolation would mix finite with infinite ones.
    low, high = np.quantile(draws, [out, 1 - out], axis=0, method="nearest")
    return low, high


def collateral_of(effects: np.ndarray, negligible: float = 0.0) -> np.ndarray:
    """Largest of `e / e_u` over the other risks, from effects `(..., M)`, the forget risk first.

    NaN where `e_u` is not below `-negligible`, or an effect is not finite; 0 without other risks.

    Args:
        effects: effects on all risks.
        negligible: the size up to which `e_u` counts as zero.
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
        sets: the name of each row's data set, `(n,)`.
        spreads: values of `spread_of_risk`, for every risk but the first, `(n_m,)` each.

    Returns:
        `g_effect_low` and `g_effect_high` (objective, risk), bounds of the whole data's effects;
        `collateral`, `collateral_low` and `collateral_high` (objective); `risk_row_spread` (risk,
        risk_row), the given spreads, 0 beyond a risk's rows. A draw in which the forget risk would
        not rise has an infinite collateral.
    """
    weights = row_weights(sets)
    others = np.zeros((DRAWS, 1 + len(spreads)))
    stored = np.zeros((1 + len(spreads), max(map(len, spreads), default=0)))
    for m, of in enumerate(spreads, 1):
        # Spreads (as `told_apart` needs them) and weights are both stretched: one factor too many.
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
    """The interval of a cosine, from the interval of its effect.

        r c / sqrt(r^2 c^2 + 1 - c^2),        r = bound / effect

    Rows are taken to change the component of the gradient along the risk's gradient, and not the
    component across it. So a cosine of -1 stays -1, however uncertain the effect. The bounds are
    NaN where the effect's interval is not known, or the effect is 0.

    Args:
        cosine: the cosine `c` of the two gradients.
        effect: the product of the two gradients.
        interval: the interval of the effect.
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
    """Change of an effect by each row of its risk when rows are drawn, in units of `e_u`, `(n,)`.

    The value is NaN where the risk has only one row.

    Args:
        along: `< grad R_j, G >` of the risk's rows, `(n,)`, with the forget risk's gradient `G`.
        square: `< G, G >`.
    """
    moved = (along - along.mean()) / square if square > 0 else np.zeros(len(along))
    return moved * stretch(len(along))


def risk_interval(
    values: np.ndarray, parts: np.ndarray | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a risk.

    Args:
        values: each row's share of the risk, `(n,)`.
        parts: each row's fraction of the items that the mean is over, such as tokens, with sum 1;
            None where the risk is a sum.
        name: the data set's name.
    """
    weights = row_weights([name] * len(values))
    draws = weights @ values
    return bounds(draws if parts is None else draws / (weights @ parts))


def risk_spread(values: np.ndarray, parts: np.ndarray | None) -> np.ndarray:
    """Change of a risk by each row when rows are drawn, `(n,)`, in the form `told_apart` needs.

    Args:
        values, parts: as in `risk_interval`.
    """
    middle = values.mean() if parts is None else values.sum() * parts
    return (values - middle) * stretch(len(values))
