"""How much an objective asks of every token: its derivative by the label's log-probability."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from geffect_fast.capture.precision import widened
from geffect_fast.data.batch import Batch
from geffect_fast.objectives import Objective, Outputs


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
