"""A sweep in the form that its report reads: families of objectives, and the best of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.format import Number
from geffect_fast.report.summary.effects import labels, thinned, total
from geffect_fast.report.summary.objectives import Summary, summarise
from geffect_fast.results.form import HYPER
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import effect_errors, effect_spreads, told_apart

if TYPE_CHECKING:
    import xarray as xr

STRONGEST, LEAST, CHEAPEST = "strongest removal", "least harm", "least collateral"

NUMBERS = ("e_u", "e_r", "collateral")

CLEARLY = 0.1
"""The least collateral is sought among objectives with at least this share of their family's
strongest removal. With less removal, collateral is a ratio of two numbers near 0."""

HIGHLIGHTS = 24
"""The most objectives of a sweep that are shown where each takes room of its own."""


@dataclass(frozen=True)
class SweptFamily:
    """Objectives of one string with ranges, or one objective alone.

    Attributes:
        text: string of the family.
        axes: for each swept parameter, whether its values are evenly spaced in the logarithm.
        at: indices of the family's objectives in the result, `(n,)`.
        values: values of every swept parameter, `(n,)` each.
    """

    text: str
    axes: dict[str, bool]
    at: np.ndarray
    values: dict[str, np.ndarray]

    def point(self, i: int) -> str:
        """The parameters of the family's `i`-th objective, such as `beta=0.1, alpha=2`."""
        return ", ".join(f"{name}={value[i]:.6g}" for name, value in self.values.items())


@dataclass(frozen=True)
class Swept:
    """The result of a sweep in the form that its report reads.

    Arrays are `(objective,)` unless a shape is given.

    Attributes:
        objectives: strings of the objectives.
        e_u: effect on the forget risk.
        e_r: effect on the retain risk.
        collateral: rise of the worst other risk for a unit rise of the forget risk.
        errors: errors that rounding may cause in `e_u`, `e_r`, `collateral`, `(3, objective)`.
        spreads: how far each row moves the same three, `(3, objective, rows)`, as `told_apart`
            takes it.
        rows: summaries of the objectives.
        alike: names of the objectives with the same effects, by the index of the objective that
            stands for them.
        front: whether an objective is on the Pareto front.
        families: the families. A family whose objectives all belong to others is left out.
    """

    objectives: list[str]
    e_u: np.ndarray
    e_r: np.ndarray
    collateral: np.ndarray
    errors: np.ndarray
    spreads: np.ndarray
    rows: list[Summary]
    alike: dict[int, list[str]]
    front: np.ndarray
    families: list[SweptFamily]

    @staticmethod
    def of(dataset: xr.Dataset) -> Swept:
        """Read the result of `geffect_fast.sweep`."""
        effects, errors, rows = total(dataset), effect_errors(dataset), summarise(dataset)
        spreads = effect_spreads(dataset)
        at_u, at_r = map(labels(dataset, "risk").index, (UNLEARN, "retain"))
        texts = dataset["sweep"].values
        families = []
        for text, axes in json.loads(dataset.attrs["sweeps"]).items():
            at = np.flatnonzero(texts == text)
            values = {name: dataset[f"{HYPER}{name}"].values[at] for name in axes}
            families.append(SweptFamily(text, axes, at, values))
        return Swept(
            labels(dataset, "objective"),
            effects[:, at_u],
            effects[:, at_r],
            np.array([row.collateral for row in rows]),
            np.stack([errors[:, at_u], errors[:, at_r], [row.collateral_error for row in rows]]),
            np.stack([spreads[:, at_u], spreads[:, at_r], [r.collateral_spread for r in rows]]),
            rows,
            _alike(dataset),
            dataset["pareto"].values,
            [family for family in families if family.at.size],
        )

    @property
    def bounds(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Low and high bounds of `e_u`, `e_r` and `collateral` by name; NaN where not known."""
        known = np.array([[row.numbers[name][1] for name in NUMBERS] for row in self.rows])
        return {name: (known[:, n, 0], known[:, n, 1]) for n, name in enumerate(NUMBERS)}

    @property
    def has_bounds(self) -> bool:
        """Whether intervals are known."""
        return any(row.intervals for row in self.rows)

    def numbers(self, i: int) -> dict[str, Number]:
        """`e_u`, `e_r` and `collateral` of an objective."""
        return {name: self.rows[i].numbers[name] for name in NUMBERS}

    def picks(self, family: SweptFamily) -> dict[int, list[str]]:
        """The best objectives of a family, by index in the family, each with what it is best in.

        Where the rows or the precision do not tell others from the best, the number of all that
        are alike follows, as in `least harm (3 alike)`. `all alike` means that nothing is best.
        Empty where the effects of all are undefined.
        """
        e_u, e_r = self.e_u[family.at], self.e_r[family.at]
        errors, spreads = self.errors[:, family.at], self.spreads[:, family.at]
        collateral = self.collateral[family.at]
        found: dict[int, list[str]] = {}
        finite = np.isfinite(e_u) & np.isfinite(e_r)
        removes = finite & np.isfinite(collateral)
        clearly = removes & (e_u <= CLEARLY * np.where(removes, e_u, 0.0).min(initial=0.0))
        for what, score, off, spread, among in (
            (STRONGEST, e_u, errors[0], spreads[0], finite),
            (LEAST, -e_r, errors[1], spreads[1], removes),
            (CHEAPEST, collateral, errors[2], spreads[2], clearly),
        ):
            if not among.any():
                continue
            best = int(np.where(among, score, np.inf).argmin())
            apart = told_apart(score, score[best], off, off[best], spread, spread[best])
            n_alike = int((among & ~apart).sum()) if off.any() or spread.shape[-1] else 1
            if n_alike > 1:
                every = n_alike == among.sum()
                what = f"{what} (all alike)" if every else f"{what} ({n_alike} alike)"
            found.setdefault(best, []).append(what)
        return found

    def label(self, i: int, most: int = 3) -> str:
        """An objective's string, followed by the objectives with the same effects, if any."""
        same = self.alike.get(i, [])
        if not same:
            return self.objectives[i]
        named = same if len(same) <= most else [*same[:most], f"{len(same) - most} more"]
        return f"{self.objectives[i]} (the same: {', '.join(named)})"

    def ranked_front(self) -> np.ndarray:
        """Indices of the front's objectives, strongest removal first."""
        at = np.flatnonzero(self.front)
        return at[np.argsort(self.e_u[at], kind="stable")]


def _alike(dataset: xr.Dataset) -> dict[int, list[str]]:
    """Names of objectives with the same effects, by the index of the one that stands for them."""
    if "same_as" not in dataset.coords:  # a result of an earlier version
        return {}
    names = labels(dataset, "objective")
    found: dict[int, list[str]] = {}
    for name, first in zip(names, labels(dataset, "same_as"), strict=True):
        if name != first and first in names:
            found.setdefault(names.index(first), []).append(name)
    return found


def is_sweep(dataset: xr.Dataset) -> bool:
    """Whether a result is one of `geffect_fast.sweep`."""
    return "sweep" in dataset.coords


def highlights(dataset: xr.Dataset) -> xr.Dataset:
    """A sweep's result, reduced to the best of its families and the front, `HIGHLIGHTS` at most.

    Views by sample or token give each objective room of its own and could not be read otherwise.
    """
    swept = Swept.of(dataset)
    best = {family.at[i] for family in swept.families for i in swept.picks(family)}
    chosen = np.array(sorted(best | set(swept.ranked_front())), dtype=int)
    return dataset.isel(objective=thinned(chosen, HIGHLIGHTS))
