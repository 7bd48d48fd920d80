"""How much objectives ask of every token, laid out by sample and token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.capture.precision import widened
from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.ranks import Ranks
from geffect_fast.results.axes import Resolution
from geffect_fast.transfer import OnItsWay


def token_weights(
    objective: Objective, outputs: Outputs, batch: Batch, reference: Outputs | None
) -> Tensor | None:
    """`d L / d log p_t` of every predicted label, what `L` holds constant being constant.

    For `ga` it is what a token counts in the mean, for `wga` that times `p^alpha`, for `npo` that
    of its sample, `2 sigmoid(b r) / B`: read off the objective's own `token_terms`.

    Args:
        objective: elementary.
        outputs: the model's on `batch`.
        batch: on the model's device.
        reference: what the objective compares with.

    Returns:
        `(total_tokens,)` fp64 at the positions that predict, 0 where nothing is predicted; None
        where no term reads a log-probability (hidden states, or whole distributions).
    """
    # In fp32 at least, and apart from the model's own graph.
    leaf = widened(outputs.token_logprob.detach()).requires_grad_()
    hidden, logits = outputs.hidden_states, outputs.logits
    own = replace(
        outputs,
        token_logprob=leaf,
        logits=None if logits is None else logits.detach(),
        hidden_states=None if hidden is None else tuple(h.detach() for h in hidden),
    )
    with torch.enable_grad():
        total = objective.token_terms(own, batch, reference).double().sum()
    if not total.requires_grad:
        return None
    return torch.autograd.grad(total, leaf)[0].double()


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

    def variables(self, tokenizer: Any, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variable `token_weight`, and its coordinates.

        Args:
            tokenizer: as `Resolution.coordinates`.
            ranks: who evaluated the rows.
        """
        own = []
        for data_pass, index, batch, copy in self._coming:
            (found,) = copy.arrived()
            places = self._resolution.places(data_pass, batch)
            rows = torch.tensor(batch.rows)[batch.token_sample()] + data_pass.offset
            ahead = batch.target_index
            at = (rows[ahead].numpy(), places[ahead + 1].numpy())  # the token that is predicted
            own.append((index, at, found[ahead].numpy()))
        n_parts, _, _, n, t = self._resolution.shape(self._mixture.shape[1], 1)
        of_parts = np.full((n_parts, n, t), np.nan)
        for told in ranks.meet(own):
            for index, at, weights in told:
                of_parts[index][at] = weights
        values = np.full((len(self._mixture), n, t), np.nan)
        for k, index in self._mixture.nonzero().tolist():
            of_part = of_parts[index]
            has = ~np.isnan(of_part)
            share = float(self._mixture[k, index]) * of_part[has]
            values[k][has] = np.nan_to_num(values[k][has]) + share
        dims = ("objective", "sample", "token")
        return {"token_weight": (dims, values)}, self._resolution.coordinates(tokenizer)
