"""Shares of a risk's own rows in effects and in the risk, which intervals need.

An effect is the product of two gradients, and the rows of both were chosen. The result holds the
share of each row of the objective. The shares of the risk's rows are measured along the gradient
`G` of the forget risk, in the pass that computes the risk's own gradient. An objective's gradient
has the component `e_u / <G, G>` along `G`, so

    < grad R_j, grad L >  ~  e_u(L) / <G, G>  < grad R_j, G >

This is exact for gradient ascent itself. The component of an objective across `G` is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass
from geffect_fast.engines.directions import ProductsWithFirst
from geffect_fast.objectives import Outputs
from geffect_fast.ranks import Ranks
from geffect_fast.results.intervals import (
    effect_intervals,
    risk_interval,
    risk_spread,
    spread_of_risk,
)
from geffect_fast.transfer import OnItsWay


class RowValues:
    """A collector of every row's share of each risk, while the risks' gradients are computed.

    A batch may come twice, whole or in pieces.

    Args:
        sizes: number of rows in each risk's data set, by risk, the forget risk first.
        adds_up: whether a risk is a sum over rows instead of a mean.
        diagonal: diagonal of the metric in which effects are measured, by parameter; None for the
            plain inner product.

    Attributes:
        products: receives the products of rows' gradients with the forget risk's gradient.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        adds_up: bool,
        diagonal: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._sizes, self._adds_up = dict(sizes), adds_up
        self._found: list[tuple[int, list[int], Tensor]] = []
        self.products = ProductsWithFirst(diagonal)

    def add(
        self,
        data_pass: DataPass,
        index: int,
        outputs: Outputs,
        batch: Batch,
        reference: Outputs | None,
    ) -> None:
        """Keep the rows' shares of one risk, as a `geffect_fast.engines.batches.Listener`."""
        terms = data_pass.parts[index].token_terms(outputs, batch, reference).detach().double()
        sums = terms.new_zeros(2, batch.n_samples)
        at = batch.token_sample()
        sums[0].index_add_(0, at, terms)
        sums[1].index_add_(0, at, batch.target_weight())
        self._found.append((index, list(batch.rows), sums))

    def gather(self, ranks: Ranks) -> None:
        """Exchange the shares between ranks, so that every rank has those of all rows."""
        if ranks.size > 1:
            told = ranks.meet([(index, rows, sums.cpu()) for index, rows, sums in self._found])
            self._found = [each for found in told for each in found]

    def along(self) -> list[np.ndarray]:
        """`< grad R_j, G >` of the rows of each risk but the first; NaN without products."""
        missing = 0.0 if self.products.available else np.nan
        whole = [np.full(n, missing) for n in self._sizes.values()]
        found = self.products.found
        if self.products.available and found:
            (read,) = OnItsWay(torch.cat([own for *_, own in found])).arrived()
            each = read.split([len(rows) for _, rows, _ in found])
            for (index, rows, _), own in zip(found, each, strict=True):
                whole[index][rows] += own.numpy()
        return whole[1:]

    def by_risk(self) -> list[np.ndarray]:
        """Two numbers for each row of each risk, `(2, n)` fp64.

        The first is the row's share of the risk, the second its fraction of the items, such as
        tokens, that the risk's mean is over.
        """
        found = [np.zeros((2, n)) for n in self._sizes.values()]
        if self._found:
            (read,) = OnItsWay(torch.cat([sums for *_, sums in self._found], dim=1)).arrived()
            each = read.split([len(rows) for _, rows, _ in self._found], dim=1)
            for (index, rows, _), values in zip(self._found, each, strict=True):
                found[index][:, rows] = values.numpy()
        return found

    def variables(
        self,
        rows: np.ndarray,
        sets: Sequence[str],
        risk_values: Tensor,
        square: float,
    ) -> dict[str, Any]:
        """Variables of a result for its intervals: how much of its numbers is the choice of rows.

        Args:
            rows: effects of objectives by row, `(K, M, n)`.
            sets: the name of each row's data set, `(n,)`.
            risk_values: `(M,)`.
            square: `< G, G >`.

        Returns:
            The variables of `geffect_fast.results.intervals.effect_intervals`, `risk_value_low` and
            `risk_value_high` (risk), and `risk_value_spread` (risk, risk_sample), the change of a
            risk by each row, 0 beyond its rows. These are NaN for a risk that is no sum of its
            rows' shares.
        """
        spreads = [spread_of_risk(along, square) for along in self.along()]
        sizes = list(self._sizes.values())
        low, high = np.full((2, len(sizes)), np.nan)
        moved = np.zeros((len(sizes), max(sizes)))
        for m, (name, (values, parts), whole) in enumerate(
            zip(self._sizes, self.by_risk(), risk_values.tolist(), strict=True)
        ):
            if math.isclose(values.sum(), whole, rel_tol=1e-4):  # other risks have no row shares
                of = None if self._adds_up else parts
                low[m], high[m] = risk_interval(values, of, name)
                moved[m, : sizes[m]] = risk_spread(values, of)
            else:
                moved[m] = np.nan
        bounds = {
            "risk_value_low": ("risk", low),
            "risk_value_high": ("risk", high),
            "risk_value_spread": (("risk", "risk_sample"), moved),
        }
        return bounds | effect_intervals(rows, sets, spreads)
