"""What a report says in numbers: totals, shares and a verdict an objective, from a result."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.results.axes import GROUPS, OUTSIDE
from geffect_fast.results.intervals import NEGLIGIBLE, cosine_interval
from geffect_fast.results.told_apart import (
    collateral_error,
    effect_errors,
    effect_spreads,
    half_width,
    has_intervals,
    ratio_spread,
    row_spreads,
)
from geffect_fast.storage.csv_cells import csv_cell

if TYPE_CHECKING:
    import xarray as xr

UNLEARN = "unlearn"
LEAD = ("step", "objective", "risk")
"""The axes that sums over the rest of a result leave; `step` where it has one."""

LITTLE_HARM, MUCH_HARM = 0.1, 1.0
HARDLY = 0.1
"""A gradient whose cosine with the forget risk's is smaller does next to nothing to that risk."""

MOSTLY_HARM = "mostly harm"
UNCLEAR, HARM_UNCLEAR = "within noise", "forgets, harm unclear"
"""Verdicts where the interval of e_u holds 0, and where that of collateral allows several."""
PERHAPS = "perhaps hardly forgets"
"""The verdict where the interval of the cosine with the forget risk holds `-HARDLY`."""

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class Summary:
    """One objective in one line.

    Attributes:
        objective: its canonical string.
        loss: its value.
        effects: G-effect on each risk; `unlearn` is e_u.
        cosines: cosine of its gradient with each risk's; empty where norms were not computed.
        collateral: largest of e / e_u over the other risks, the rise of that risk for a unit
            rise of the forget risk; NaN where the objective does not forget.
        verdict: a word or two.
        collateral_error: by how much `collateral` may be off in the precision of the result; 0
            where that is not known.
        intervals: of the effect on each risk, by the choice of rows; empty where not known.
        cosine_intervals: the same of cosines.
        collateral_interval: the same of collateral.
        collateral_spread: what each row moves it by, `(rows,)`, as `told_apart` takes it.
    """

    objective: str
    loss: float
    effects: dict[str, float]
    cosines: dict[str, float]
    collateral: float
    verdict: str
    collateral_error: float = 0.0
    intervals: dict[str, Interval] = field(default_factory=dict)
    cosine_intervals: dict[str, Interval] = field(default_factory=dict)
    collateral_interval: Interval = UNKNOWN
    collateral_spread: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def forgets(self) -> bool:
        """Whether the objective is made to raise the forget risk, not by the way or by rounding."""
        return self.verdict.startswith("forgets") or self.verdict == MOSTLY_HARM


def summarise(dataset: xr.Dataset) -> list[Summary]:
    """A `Summary` for every objective of a result, in its order."""
    effects = total(dataset)
    risks = [str(r) for r in dataset["risk"].values]
    largest = np.nanmax(np.abs(effects), initial=0.0, where=np.isfinite(effects))
    losses = dataset["loss"].values
    errors, spreads = effect_errors(dataset), effect_spreads(dataset)
    bounds = _intervals_of(dataset)
    cosines = None
    if "cosine" in dataset:
        cosines = dataset["cosine"].transpose("objective", "risk").values
    summaries = []
    for i, objective in enumerate(dataset["objective"].values):
        effect = dict(zip(risks, map(float, effects[i]), strict=True))
        cosine = {}
        if cosines is not None:
            cosine = dict(zip(risks, map(float, cosines[i]), strict=True))
        collateral = collateral_of(effect, NEGLIGIBLE * largest)
        intervals, of_collateral = bounds[i]
        of_cosines = {
            risk: cosine_interval(c, effect[risk], intervals[risk])
            for risk, c in cosine.items()
            if risk in intervals
        }
        summaries.append(
            Summary(
                objective=str(objective),
                loss=float(losses[i]),
                effects=effect,
                cosines=cosine,
                collateral=collateral,
                verdict=verdict_of(
                    effect,
                    cosine,
                    collateral,
                    NEGLIGIBLE * largest,
                    intervals.get(UNLEARN, UNKNOWN),
                    of_collateral,
                    of_cosines.get(UNLEARN, UNKNOWN),
                ),
                collateral_error=_error_of_collateral(effect, collateral, errors[i]),
                intervals=intervals,
                cosine_intervals=of_cosines,
                collateral_interval=of_collateral,
                collateral_spread=_spread_of_collateral(effect, collateral, spreads[i]),
            )
        )
    return summaries


def _intervals_of(dataset: xr.Dataset) -> list[tuple[dict[str, Interval], Interval]]:
    """Of each objective the intervals of its effects by risk, and of its collateral."""
    if not has_intervals(dataset):
        return [({}, UNKNOWN)] * dataset.sizes["objective"]
    risks = [str(r) for r in dataset["risk"].values]
    low, high = (
        dataset[f"g_effect_{side}"].transpose("objective", "risk").values.tolist()
        for side in ("low", "high")
    )
    least, most = (dataset[f"collateral_{side}"].values.tolist() for side in ("low", "high"))
    return [
        (dict(zip(risks, zip(low[k], high[k], strict=True), strict=True)), (least[k], most[k]))
        for k in range(len(least))
    ]


def _worst_other(effects: dict[str, float], collateral: float) -> str | None:
    """The risk that `collateral` is of; None where it is of none."""
    others = {risk: e for risk, e in effects.items() if risk != UNLEARN}
    if math.isnan(collateral) or not others:
        return None
    return min(others, key=others.__getitem__)  # e_u is below 0


def _error_of_collateral(effects: dict[str, float], collateral: float, errors: np.ndarray) -> float:
    """That of the risk that `collateral` is of, given those of the effects."""
    off = dict(zip(effects, map(float, errors), strict=True))
    worst = _worst_other(effects, collateral)
    if worst is None:
        return 0.0
    return collateral_error(effects[UNLEARN], collateral, (off[worst], off[UNLEARN]))


def _spread_of_collateral(
    effects: dict[str, float], collateral: float, spreads: np.ndarray
) -> np.ndarray:
    """What rows move `collateral` by, given what they move the effects by, `(M, rows)`."""
    of = dict(zip(effects, spreads, strict=True))
    worst = _worst_other(effects, collateral)
    if worst is None:
        return np.zeros(spreads.shape[-1])
    return ratio_spread(effects[UNLEARN], collateral, of[worst], of[UNLEARN])


def total(dataset: xr.Dataset) -> np.ndarray:
    """G-effects of the whole forget data, `(objective, risk)` fp64; NaN stays NaN.

    Of a step result `(step, objective, risk)`.
    """
    effect = dataset["g_effect"]
    lead = [d for d in LEAD if d in effect.dims]
    rest = [d for d in effect.dims if d not in lead]
    return effect.sum(rest, skipna=False).transpose(*lead).values


def by_sample(dataset: xr.Dataset) -> xr.DataArray | None:
    """G-effects of the forget rows, `(objective, risk, sample)`; None where samples are summed.

    Of a step result `(step, objective, risk, sample)`.
    """
    effect = dataset["g_effect"]
    if "sample" not in effect.dims:
        return None
    lead = [d for d in LEAD if d in effect.dims]
    effect = effect.sum([d for d in effect.dims if d not in (*lead, "sample")], skipna=False)
    return effect.transpose(*lead, "sample")[..., (effect["set"] == "forget").values]


def by_place(
    dataset: xr.Dataset, blocks: bool, *, rows: bool = False
) -> tuple[list[str], np.ndarray] | None:
    """G-effects of parts of the model, front to back.

    Args:
        dataset: a result.
        blocks: every block by itself (True), where the result tells them apart, or groups of them.
        rows: keep samples apart, in a last axis.

    Returns:
        Labels and values `(objective, risk, len(labels))`, of a step result `(step, objective,
        risk, len(labels))`; None where the whole model is summed.
    """
    effect = dataset["g_effect"]
    axis = next((d for d in ("parameter", "group") if d in effect.dims), None)
    if axis is None:
        return None
    lead = [d for d in LEAD if d in effect.dims]
    kept_dims = [*lead, axis, *(["sample"] if rows else [])]
    effect = effect.sum([d for d in effect.dims if d not in kept_dims], skipna=False)
    effect = effect.transpose(*kept_dims)
    groups = [str(group) for group in effect["group"].values]
    numbers = effect["block"].values if "block" in effect.coords else [OUTSIDE] * len(groups)
    labels: list[str] = []
    where: dict[str, tuple[int, int]] = {}
    for group, block in zip(groups, numbers, strict=True):
        place = GROUPS.index(group) if group in GROUPS else len(GROUPS)
        label = str(block) if blocks and block != OUTSIDE else group
        where[label] = (place, int(block) if blocks else 0)
        labels.append(label)
    kept, at = sorted(where, key=where.__getitem__), len(lead)
    parts = [
        np.compress([label == part for label in labels], effect.values, axis=at).sum(axis=at)
        for part in kept
    ]
    return kept, np.stack(parts, axis=at)


def place_widths(dataset: xr.Dataset, blocks: bool) -> np.ndarray | None:
    """Half of the intervals of `by_place`'s values; None where they are not known.

    By the rows that objectives read, of which the forget rows make both gradients; what the rows of
    other risks add is not told apart by part.
    """
    if not has_intervals(dataset) or "sample" not in dataset["g_effect"].dims:
        return None
    placed = by_place(dataset, blocks, rows=True)
    if placed is None:
        return None
    widths = half_width(row_spreads(placed[1], dataset["set"].values))
    widths[..., [str(risk) for risk in dataset["risk"].values].index(UNLEARN), :] *= 2
    return widths


def shares(values: np.ndarray) -> np.ndarray:
    """Values along the last axis over the sum of their sizes, signed.

    All zero stays zero; where one is not finite, all are NaN.
    """
    size = np.abs(values).sum(axis=-1, keepdims=True)
    defined = np.divide(values, size, out=np.zeros_like(values), where=(size > 0) & (size < np.inf))
    return np.where(np.isfinite(size), defined, np.nan)


def write_summary(dataset: xr.Dataset, file: Path) -> None:
    """A CSV with a row an objective: loss, an effect and a cosine a risk, collateral, verdict.

    Where they are known, the intervals of effects and collateral behind them.
    Of a sweep also its string with ranges, its hyper-parameters, and whether it is on the front.
    """
    rows = summarise(dataset)
    swept = [name for name, c in dataset.coords.items() if c.dims == ("objective",)]
    swept = [*(name for name in swept if name != "objective"), *({"pareto"} & set(dataset))]
    risks = list(rows[0].effects)
    with_cosines = bool(rows[0].cosines)
    header = ["objective", *swept, "loss", *(f"g_effect_{r}" for r in risks)]
    header += [f"cosine_{r}" for r in risks if with_cosines] + ["collateral", "verdict"]
    intervals = [*(f"g_effect_{r}" for r in risks), "collateral"] if rows[0].intervals else []
    header += [f"{name}_{side}" for name in intervals for side in ("low", "high")]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(map(csv_cell, header))
        for i, row in enumerate(rows):
            cells = [
                row.objective,
                *(dataset[name].values[i] for name in swept),
                row.loss,
                *row.effects.values(),
                *row.cosines.values(),
                row.collateral,
                row.verdict,
                *(bound for interval in row.intervals.values() for bound in interval),
                *(row.collateral_interval if intervals else ()),
            ]
            writer.writerow(map(csv_cell, cells))


def collateral_of(effects: dict[str, float], negligible: float) -> float:
    """Largest of `e / e_u` over the other risks; NaN where `e_u` is not below `-negligible`."""
    e_u = effects[UNLEARN]
    others = [e for risk, e in effects.items() if risk != UNLEARN]
    if not (e_u < -negligible) or not all(map(math.isfinite, effects.values())):
        return math.nan
    return max((e / e_u for e in others), default=0.0) + 0.0  # + 0.0 turns -0.0 into 0.0


def verdict_of(
    effects: dict[str, float],
    cosines: dict[str, float],
    collateral: float,
    negligible: float,
    e_u: Interval = UNKNOWN,
    harm: Interval = UNKNOWN,
    cosine: Interval = UNKNOWN,
) -> str:
    """An objective in a word or two: whether it forgets, and what that costs.

    Args:
        effects: on every risk.
        cosines: with every risk's gradient; empty where they are not known.
        collateral: of `collateral_of`.
        negligible: the size below which an effect is none.
        e_u: interval of the effect on the forget risk; NaN: not known.
        harm: that of collateral.
        cosine: that of the cosine with the forget risk's gradient.
    """
    if not all(map(math.isfinite, effects.values())):
        return "undefined (NaN)"
    if all(abs(e) <= negligible for e in effects.values()):
        return "no effect"
    if e_u[0] <= 0 <= e_u[1]:
        return UNCLEAR
    if math.isnan(collateral):
        return "does not forget"
    if cosines:
        hardly = {bound > -HARDLY for bound in _known(cosines[UNLEARN], cosine)}
        if True in hardly:
            return "hardly forgets" if len(hardly) == 1 else PERHAPS
    words = {_harm_words(bound) for bound in _known(collateral, harm)}
    return words.pop() if len(words) == 1 else HARM_UNCLEAR


def _known(value: float, interval: Interval) -> list[float]:
    """A number and the bounds of its interval, as far as they are known."""
    return [value, *(bound for bound in interval if not math.isnan(bound))]


def _harm_words(collateral: float) -> str:
    """What an objective that forgets costs, in a word or two."""
    if collateral <= 0:
        return "forgets, spares"
    if collateral < LITTLE_HARM:
        return "forgets, little harm"
    return "forgets, some harm" if collateral < MUCH_HARM else MOSTLY_HARM
