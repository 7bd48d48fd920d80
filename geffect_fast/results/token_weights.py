"""Weights that objectives put on tokens, laid out by sample and token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass
from geffect_fast.objectives import Outputs
from geffect_fast.results.axes import Resolution
from geffect_fast.results.weights_of_tokens import token_weights
from geffect_fast.transfer import OnItsWay


class ObjectiveWeights:
    """Collects `token_weights` of all objectives while an engine evaluates their parts.

    A batch may come twice, whole or in pieces.

    Args:
        resolution: of the result.
        mixture: `(K, n_parts)` fp64, how often each part counts in each objective.
    """

    def __init__(self, resolution: Resolution, mixture: Tensor) -> None:
        self._resolution = replace(resolution, axes=("sample", "token"))
        self._mixture = mixture
        self._coming: list[tuple[DataPass, int, Batch, OnItsWay]] = []

    def add(
        self,
        data_pass: DataPass,
        index: int,
        outputs: Outputs,
        batch: Batch,
        reference: Outputs | None,
    ) -> None:
        """As `geffect_fast.engines.batches.Listener`."""
        found = token_weights(data_pass.parts[index], outputs, batch, reference)
        if found is not None:
            self._coming.append((data_pass, index, batch.to("cpu"), OnItsWay(found)))

    def variables(self, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variable `token_weight`, and its coordinates.

        Args:
            tokenizer: as `Resolution.coordinates`.
        """
        n_parts, _, _, n, t = self._resolution.shape(self._mixture.shape[1], 1)
        of_parts = np.full((n_parts, n, t), np.nan)
        for data_pass, index, batch, copy in self._coming:
            (found,) = copy.arrived()
            places = self._resolution.places(data_pass, batch)
            rows = torch.tensor(batch.rows)[batch.token_sample()] + data_pass.offset
            ahead = batch.target_index
            at = (rows[ahead].numpy(), places[ahead + 1].numpy())  # the token that is predicted
            of_parts[index][at] = found[ahead].numpy()
        values = np.full((len(self._mixture), n, t), np.nan)
        for k, index in self._mixture.nonzero().tolist():
            own = of_parts[index]
            has = ~np.isnan(own)
            share = float(self._mixture[k, index]) * own[has]
            values[k][has] = np.nan_to_num(values[k][has]) + share
        dims = ("objective", "sample", "token")
        return {"token_weight": (dims, values)}, self._resolution.coordinates(tokenizer)
