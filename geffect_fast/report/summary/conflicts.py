"""Conflicts of objectives' gradients with the retain risk's, by part of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.summary.effects import labels

if TYPE_CHECKING:
    import xarray as xr

CAPTION = "Conflict: % of the gradient, by size, whose sign opposes the retain risk's"
FISHER = "Fisher, % of trace"
"""Name of the row with the shares of the retain risk's Fisher matrix."""
NOTE = (
    "50 % is what gradients without any relation have. A part with a large share of the retain "
    "risk's Fisher trace is one that its rows depend on."
)


@dataclass(frozen=True)
class Conflicts:
    """Shares of gradients that oppose the retain risk's, in per cent, by part of the model.

    Attributes:
        parts: names of the parts.
        opposed: the opposing shares by objective, `(n_parts,)` each.
        fisher: shares of the trace of the retain risk's Fisher matrix, `(n_parts,)`, adding to
            100.
    """

    parts: list[str]
    opposed: dict[str, np.ndarray]
    fisher: np.ndarray

    @staticmethod
    def of(dataset: xr.Dataset) -> Conflicts | None:
        """Read the conflicts of a result; None where they were not measured."""
        if "conflict_share" not in dataset:
            return None
        by = next((d for d in ("parameter", "group") if d in dataset["conflict_share"].dims), None)
        groups = ["whole model"] if by is None else dataset["group"].values.astype(str).tolist()
        parts = list(dict.fromkeys(groups))

        def summed(of: xr.DataArray) -> np.ndarray:
            values = of.values[None] if by is None else of.transpose(by, ...).values
            return np.stack([values[[g == part for g in groups]].sum(0) for part in parts])

        mass = dataset["gradient_mass"]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = 100 * summed((dataset["conflict_share"] * mass).fillna(0.0)) / summed(mass)
            fisher = summed(dataset["fisher_trace"].sel(risk="retain"))
            fisher = 100 * fisher / fisher.sum()
        objectives = labels(dataset, "objective")
        return Conflicts(parts, dict(zip(objectives, shares.T, strict=True)), fisher)

    def rows(self) -> dict[str, np.ndarray]:
        """The rows of a table, by name: the objectives, then the Fisher matrix."""
        return self.opposed | {FISHER: self.fisher}
