"""Weights that objectives put on tokens, laid out by sample and token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.data.batch import IGNORE, Batch
from geffect_fast.engines.tasks import Task
from geffect_fast.engines.token_weights import token_weights
from geffect_fast.objectives import Outputs
from geffect_fast.runs.resolution import Resolution


class TokenWeights:
    """Collects `token_weights` of all objectives while an engine evaluates their parts.

    A batch may come twice, whole or in pieces.

    Args:
        resolution: of the result.
        mixture: `(K, n_parts)` fp64, how often each part counts in each objective.
    """

    def __init__(self, resolution: Resolution, mixture: Tensor) -> None:
        self._resolution = replace(resolution, axes=("sample", "token"))
        self._mixture = mixture
        n_parts, _, _, n, t = self._resolution.shape(mixture.shape[1], 1)
        self._of_parts = np.full((n_parts, n, t), np.nan)

    def add(
        self, task: Task, index: int, outputs: Outputs, batch: Batch, reference: Outputs | None
    ) -> None:
        """As `geffect_fast.engines.tasks.Watch`."""
        found = token_weights(task.parts[index], outputs, batch, reference)
        if found is None:
            return
        batch = batch.to("cpu")
        places = self._resolution.places(task, batch)
        sample = batch.sequence_sample[batch.token_sequence()]
        rows = torch.tensor(batch.rows)[sample] + task.offset
        ahead = torch.nonzero(batch.targets != IGNORE).squeeze(1)
        at = (rows[ahead].numpy(), places[ahead + 1].numpy())  # the token that is predicted
        self._of_parts[index][at] = found.cpu()[ahead].numpy()

    def variables(self, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variable `token_weight`, and its coordinates.

        Args:
            tokenizer: as `Resolution.coordinates`.
        """
        dims = ("objective", "sample", "token")
        values = np.full((len(self._mixture), *self._of_parts.shape[1:]), np.nan)
        for k, index in self._mixture.nonzero().tolist():
            own = self._of_parts[index]
            has = ~np.isnan(own)
            share = float(self._mixture[k, index]) * own[has]
            values[k][has] = np.nan_to_num(values[k][has]) + share
        return {"token_weight": (dims, values)}, self._resolution.coordinates(tokenizer)
