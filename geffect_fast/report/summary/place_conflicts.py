"""Conflicts of gradients with the retain risk's by place: shares by position, and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.summary.effects import labels
from geffect_fast.report.tokens.colours import inline, visible
from geffect_fast.results.by_rows import row_slices

if TYPE_CHECKING:
    import xarray as xr

BY_POSITION = (
    "Conflict by position: % of the gradients of single places, by size, whose sign opposes the "
    "retain risk's"
)
BY_TOKEN = (
    "Forget rows with most conflict: tokens that bring most of the row's; in brackets, % of the "
    "token's own gradient that opposes the retain risk's"
)
PLACES_NOTE = (
    "Gradients of places cancel in the whole gradient, so shares of places are not parts of the "
    "share of the whole. Positions count all tokens that a row is read as, its prompt among them."
)
MOST_SPANS, N_ROWS, N_TOKENS = 8, 3, 4
"""The most spans of positions, rows of an objective, and tokens of a row."""


@dataclass(frozen=True)
class PlaceConflicts:
    """Shares of gradients that oppose the retain risk's, by position, and the tokens behind them.

    Where the result tells rows apart, only the forget rows count.

    Attributes:
        spans: spans of positions, such as `8–15`.
        opposed: the opposing share of each span, `(n_spans,)` per cent, by objective.
        rows: objective, row, and the row's tokens in words.
    """

    spans: list[str]
    opposed: dict[str, np.ndarray]
    rows: list[tuple[str, str, str]]

    @staticmethod
    def of(dataset: xr.Dataset) -> PlaceConflicts | None:
        """Read the conflicts of a result, which may be lazy; None where they were not measured."""
        if "place_mass" not in dataset:
            return None
        objectives, n = labels(dataset, "objective"), dataset.sizes["position"]
        masses = np.zeros((2, len(objectives), n))
        by_row = []
        for few in _forget_rows(dataset):
            found = _masses(few)
            masses += found.sum(2)
            by_row.append(found[1].sum(-1))
        edges = np.unique(np.linspace(0, n, min(n, MOST_SPANS) + 1).round().astype(int))
        with np.errstate(invalid="ignore"):
            whole, against = np.add.reduceat(masses, edges[:-1], axis=-1)
            shares = 100 * against / whole
        spans = [
            f"{first}–{end - 1}" if end - first > 1 else str(first)
            for first, end in pairwise(edges)
        ]
        rows = []
        if "sample" in dataset.dims:
            places = np.flatnonzero((dataset["set"] == "forget").values)
            for k, against in enumerate(np.concatenate(by_row, axis=1)):
                most = [i for i in np.argsort(-against, kind="stable")[:N_ROWS] if against[i] > 0]
                for i in most:
                    one = dataset.isel(objective=[k], sample=[places[i]])
                    rows.append((objectives[k], str(one["sample"].item()), _in_words(one)))
        return PlaceConflicts(spans, dict(zip(objectives, shares, strict=True)), rows)


def _forget_rows(dataset: xr.Dataset) -> Iterator[xr.Dataset]:
    """The forget rows of a result, a few at a time; the whole result where rows are summed."""
    if "sample" not in dataset.dims:
        yield dataset
        return
    forget = (dataset["set"] == "forget").values
    for rows in row_slices(dataset["place_mass"]):
        yield dataset.isel(sample=np.arange(len(forget))[rows][forget[rows]])


def _masses(dataset: xr.Dataset) -> np.ndarray:
    """Sizes of gradients and of their opposing part, summed over parts of the model.

    The shape is `(2, objectives, rows, positions)`, with one row where rows are summed.
    """
    mass = dataset["place_mass"]
    against = (dataset["place_conflict_share"] * mass).fillna(0.0)
    kept = [dim for dim in ("objective", "sample", "position") if dim in mass.dims]
    of_all = [
        each.sum([dim for dim in each.dims if dim not in kept]).transpose(*kept).values
        for each in (mass, against)
    ]
    return np.stack(of_all).reshape(2, mass.sizes["objective"], -1, mass.sizes["position"])


def _in_words(one: xr.Dataset) -> str:
    """The tokens of one row that bring most of its conflict under one objective."""
    mass, against = _masses(one)[:, 0, 0]
    ids = one["token_id"].values.reshape(-1)
    texts = one["token_text"].values.reshape(-1) if "token_text" in one.coords else [""] * len(ids)
    words = []
    for t in np.argsort(-against, kind="stable")[:N_TOKENS]:
        part = against[t] / against.sum()
        if part >= 0.005:  # smaller parts round to 0 %
            text = inline(visible(str(texts[t]), int(ids[t])))
            words.append(f"“{text}” {100 * part:.0f}% ({100 * against[t] / mass[t]:.0f})")
    return ", ".join(words)
