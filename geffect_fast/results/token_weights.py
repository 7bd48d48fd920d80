"""The weights that objectives give every token's log-probability, laid out by sample and token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.data.batch import Batch
from geffect_fast.engines.batches import DataPass
from geffect_fast.objectives import Objective, Outputs
from geffect_fast.precision import widened
from geffect_fast.ranks import Ranks
from geffect_fast.results.axes import Resolution
from geffect_fast.transfer import OnItsWay


def token_weights(
    objective: Objective, outputs: Outputs, batch: Batch, reference: Outputs | None
) -> Tensor | None:
    """The weight `d L / d log p_t` of every predicted label, with detached factors held constant.

    The weight is the derivative of the objective's own `token_terms`. For `ga` it is a token's
    weight in the mean, for `wga` this times `p^alpha`, for `npo` the weight of the token's sample,
    `2 sigmoid(b r) / B`.

    Args:
        objective: an elementary objective.
        outputs: the model's outputs on `batch`.
        batch: on the model's device.
        reference: outputs of the reference on `batch`, where the objective needs one.

    Returns:
        `(total_tokens,)` fp64 at the positions that predict, 0 where nothing is predicted; None
        where no term reads a log-probability (hidden states, or whole distributions).
    """
    # The leaf is fp32 at least, and detached from the model's own graph.
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
    """A collector of the `token_weights` of all objectives while an engine evaluates their parts.

    A batch may come twice, whole or in pieces.

    Args:
        resolution: the result's axes.
        mixture: `(K, n_parts)` fp64, the coefficient of each part in each objective.
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
        """Keep the weights of one part on a batch, as a `geffect_fast.engines.batches.Listener`."""
        found = token_weights(data_pass.parts[index], outputs, batch, reference)
        if found is not None:
            self._coming.append((data_pass, index, batch.to("cpu"), OnItsWay(found)))

    def variables(self, tokenizer: Any, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variable `token_weight` (objective, sample, token), and its coordinates.

        Args:
            tokenizer: as in `Resolution.coordinates`.
            ranks: the ranks that evaluated the rows; all call this method.
        """
        own = []
        for data_pass, index, batch, copy in self._coming:
            (found,) = copy.arrived()
            indices = self._resolution.indices_within(data_pass, batch)
            rows = torch.tensor(batch.rows)[batch.token_sample()] + data_pass.offset
            ahead = batch.target_index
            at = (rows[ahead].numpy(), indices[ahead + 1].numpy())  # of the predicted token
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
