"""Where effects are added up: objectives by risks by parameters by samples by positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geffect_fast.capture.samples import Offsets
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass

Places = Callable[[DataPass, Batch], Tensor]
"""Where in its sample each token of a batch stands, `(total_tokens,)` int64; -1: nowhere."""


class EffectArray:
    """Effects of objectives, added up from batches of the effects of their parts.

    Args:
        mixture: `(K, n_parts)` fp64, how often each part counts in each objective.
        values: `(K, M, C, N, T)` fp64 zeros, added to in place: an array of numpy, or one in a
            file, of which one sample at a time is in memory. C is parameters or groups of them; N
            the rows of all data sets, or 1 to sum over samples; T the positions, or 1 to sum.
        places: of a batch's tokens; None to sum over positions.
    """

    def __init__(self, mixture: Tensor, values: Any, places: Places | None = None) -> None:
        self.mixture = mixture
        self.values = values
        self.places = places

    def add(self, data_pass: DataPass, batch: Batch, effects: Tensor) -> None:
        """Add what one batch gave.

        Args:
            data_pass: which parts read the batch.
            batch: which samples it holds.
            effects: `(len(data_pass.parts), M, C, n)` fp64 on the CPU, `n` the batch's samples or,
                with `places`, its tokens.
        """
        mixed = torch.tensordot(self.mixture[:, list(data_pass.parts)], effects, dims=1)
        by_sample = self.values.shape[3] > 1
        if self.places is None:
            pieces = mixed.unbind(-1)
        else:
            places = self.places(data_pass, batch)
            own = Offsets.of(batch.sample_lengths)
            pieces = tuple(_placed(mixed[..., tokens], places[tokens]) for tokens in own)
        for row, piece in zip(batch.rows, pieces, strict=True):
            at = row + data_pass.offset if by_sample else 0
            piece = piece.reshape(*piece.shape[:3], -1).numpy()
            self.values[:, :, :, at, : piece.shape[-1]] += piece


def _placed(effects: Tensor, places: Tensor) -> Tensor:
    """Effects `(..., n_tokens)` of one sample at its positions; those of padding are zero."""
    kept = places >= 0
    placed = effects.new_zeros(*effects.shape[:-1], int(places.numpy().max()) + 1)
    placed[..., places[kept]] = effects[..., kept]
    return placed
