"""Summaries of a result's objectives: totals, collateral and a verdict for each."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.format import UNKNOWN, Interval, Number
from geffect_fast.report.summary.effects import bounds_of, interval_at, labels, total
from geffect_fast.results import intervals as of_rows
from geffect_fast.results.risks import UNLEARN, effect_name
from geffect_fast.results.told_apart import (
    collateral_error,
    effect_errors,
    effect_spreads,
    ratio_spread,
)
from geffect_fast.storage.csv_cells import csv_cell

if TYPE_CHECKING:
    import xarray as xr

LITTLE_HARM, MUCH_HARM = 0.1, 1.0
HARDLY = 0.1
"""A gradient whose cosine with the forget risk's is smaller in size hardly moves that risk."""

MOSTLY_HARM = "mostly harm"
UNCLEAR, HARM_UNCLEAR = "within noise", "forgets, harm unclear"
"""Verdicts where the interval of e_u holds 0, and where the interval of collateral allows several
verdicts."""
PERHAPS = "perhaps hardly forgets"
"""The verdict where the interval of the cosine with the forget risk holds `-HARDLY`."""


@dataclass(frozen=True)
class Summary:
    """The summary of one objective.

    Attributes:
        objective: its canonical string.
        loss: value of the objective.
        effects: G-effect on each risk; `unlearn` is e_u.
        cosines: cosine of the objective's gradient with each risk's; empty where norms were not
            computed.
        collateral: largest of e / e_u over the other risks, the rise of that risk for a unit
            rise of the forget risk; NaN where the objective does not forget.
        verdict: a word or two.
        collateral_error: error that the result's precision may cause in `collateral`; 0 where the
            error is not known.
        intervals: interval of the effect on each risk, by the choice of rows; empty where not
            known.
        cosine_intervals: interval of each cosine, likewise.
        collateral_interval: interval of `collateral`, likewise.
        collateral_spread: how far each row moves `collateral`, `(rows,)`, as `told_apart` takes
            it.
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
    def numbers(self) -> dict[str, Number]:
        """The objective's effects, `e_u` first, and its collateral, by name."""
        effects = {
            effect_name(risk): (e, self.intervals.get(risk, UNKNOWN))
            for risk, e in self.effects.items()
        }
        return effects | {"collateral": (self.collateral, self.collateral_interval)}

    @property
    def forgets(self) -> bool:
        """Whether the objective raises the forget risk by more than a side effect or rounding."""
        return self.verdict.startswith("forgets") or self.verdict == MOSTLY_HARM


def summarise(dataset: xr.Dataset) -> list[Summary]:
    """A `Summary` for every objective of a result, in its order."""
    effects, risks = total(dataset), labels(dataset, "risk")
    finite = np.isfinite(effects)
    negligible = of_rows.NEGLIGIBLE * np.abs(np.where(finite, effects, 0.0)).max(initial=0.0)
    errors, spreads = effect_errors(dataset), effect_spreads(dataset)
    of_effects, of_collateral = (bounds_of(dataset, name) for name in ("g_effect", "collateral"))
    cosines = None
    if "cosine" in dataset:
        cosines = dataset["cosine"].transpose("objective", "risk").values.tolist()
    found = []
    for k, objective in enumerate(labels(dataset, "objective")):
        effect = dict(zip(risks, effects[k].tolist(), strict=True))
        cosine = {} if cosines is None else dict(zip(risks, cosines[k], strict=True))
        known = (
            {}
            if of_effects is None
            else {r: interval_at(of_effects, k, m) for m, r in enumerate(risks)}
        )
        of_cosines = {
            risk: of_rows.cosine_interval(c, effect[risk], known[risk])
            for risk, c in cosine.items()
            if risk in known
        }
        collateral, harm = collateral_of(effect, negligible), interval_at(of_collateral, k)
        error, spread = collateral_noise(effect, collateral, errors[k], spreads[k])
        verdict = verdict_of(
            effect,
            cosine,
            collateral,
            negligible,
            known.get(UNLEARN, UNKNOWN),
            harm,
            of_cosines.get(UNLEARN, UNKNOWN),
        )
        found.append(
            Summary(
                objective=objective,
                loss=float(dataset["loss"].values[k]),
                effects=effect,
                cosines=cosine,
                collateral=collateral,
                verdict=verdict,
                collateral_error=error,
                intervals=known,
                cosine_intervals=of_cosines,
                collateral_interval=harm,
                collateral_spread=spread,
            )
        )
    return found


def collateral_noise(
    effects: dict[str, float], collateral: float, errors: np.ndarray, spreads: np.ndarray
) -> tuple[float, np.ndarray]:
    """Error of `collateral` from the result's precision, and how far each row moves it, `(rows,)`.

    Args:
        effects: effect on each of M risks.
        collateral: collateral of these effects; NaN: not defined, and all that is returned is 0.
        errors: errors of the effects, `(M,)`.
        spreads: how far each row moves the effects, `(M, rows)`.
    """
    others = {risk: e for risk, e in effects.items() if risk != UNLEARN}
    if math.isnan(collateral) or not others:
        return 0.0, np.zeros(spreads.shape[-1])
    at = {risk: m for m, risk in enumerate(effects)}
    worst, of, e_u = at[min(others, key=others.__getitem__)], at[UNLEARN], effects[UNLEARN]
    error = collateral_error(e_u, collateral, (float(errors[worst]), float(errors[of])))
    return error, ratio_spread(e_u, collateral, spreads[worst], spreads[of])


def write_summary(dataset: xr.Dataset, file: Path) -> None:
    """Write a CSV with a row an objective: loss, effects and cosines by risk, collateral, verdict.

    Intervals of effects and collateral follow, where they are known. Rows of a sweep also hold the
    objective's string with ranges, its hyper-parameters, and whether it is on the Pareto front.
    """
    rows = summarise(dataset)
    swept = [n for n, c in dataset.coords.items() if c.dims == ("objective",) and n != "objective"]
    swept += {"pareto"} & set(dataset)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        for i, row in enumerate(rows):
            cells = {"objective": row.objective} | {n: dataset[n].values[i] for n in swept}
            cells["loss"] = row.loss
            cells |= {f"g_effect_{risk}": e for risk, e in row.effects.items()}
            cells |= {f"cosine_{risk}": c for risk, c in row.cosines.items()}
            cells |= {"collateral": row.collateral, "verdict": row.verdict}
            known = {f"g_effect_{risk}": of for risk, of in row.intervals.items()}
            known |= {"collateral": row.collateral_interval} if known else {}
            for name, (low, high) in known.items():
                cells |= {f"{name}_low": low, f"{name}_high": high}
            if i == 0:
                writer.writerow(map(csv_cell, cells))
            writer.writerow(map(csv_cell, cells.values()))


def collateral_of(effects: dict[str, float], negligible: float) -> float:
    """Largest of `e / e_u` over the other risks; NaN where `e_u` is not below `-negligible`."""
    others = [e for risk, e in effects.items() if risk != UNLEARN]
    return float(of_rows.collateral_of(np.array([effects[UNLEARN], *others]), negligible))


def verdict_of(
    effects: dict[str, float],
    cosines: dict[str, float],
    collateral: float,
    negligible: float,
    e_u: Interval = UNKNOWN,
    harm: Interval = UNKNOWN,
    cosine: Interval = UNKNOWN,
) -> str:
    """The verdict on an objective in a word or two: whether it forgets, and at what cost.

    Args:
        effects: effect on every risk.
        cosines: cosine with every risk's gradient; empty where they are not known.
        collateral: as `collateral_of` gives it.
        negligible: the size up to which an effect counts as none.
        e_u: interval of the effect on the forget risk; NaN: not known.
        harm: interval of collateral.
        cosine: interval of the cosine with the forget risk's gradient.
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
    """The verdict on an objective that forgets, by its collateral."""
    if collateral <= 0:
        return "forgets, spares"
    if collateral < LITTLE_HARM:
        return "forgets, little harm"
    return "forgets, some harm" if collateral < MUCH_HARM else MOSTLY_HARM
