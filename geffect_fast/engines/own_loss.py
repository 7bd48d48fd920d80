"""Comparison of a model's own loss with the risk, whose labels are predicted one position earlier.

transformers' decoders of encoder-decoder families compare the logits with the labels at the same
place; other models add a router's loss, or smooth labels. To find out, a model is asked for its
loss on one short sequence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import eagerly, frequencies_at_first
from geffect_fast.data import SampleSet
from geffect_fast.engines.layout import probe_batch
from geffect_fast.engines.model_outputs import logits_of, model_outputs, without_cache
from geffect_fast.engines.remembered import Remembered, state_of
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.precision import precisions, widened
from geffect_fast.trying import Trying

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative difference of two losses that rounding explains. Losses are computed in fp32 at
least, and may be rounded to the model's precision afterwards."""


@dataclass(frozen=True)
class OwnLoss:
    """A model's own loss that is not the risk.

    Attributes:
        kind: `unshifted`: labels are compared with the logits at their own places; `auxiliary`: the
            model adds a loss that it names, such as its routers'; `other`: anything else, such as
            smoothed labels.
        difference: the loss minus the risk, on the sequence tried, in nats a token.
    """

    kind: Literal["unshifted", "auxiliary", "other"]
    difference: float

    def __str__(self) -> str:
        if self.kind == "unshifted":
            return (
                "the model's own loss does not shift labels: it compares each label with the "
                "logits at its own position, whereas risk and effects compare it with the logits "
                "one position earlier"
            )
        auxiliary = self.kind == "auxiliary"
        why = "an auxiliary loss" if auxiliary else "a term, a scale or a smoothing of its own"
        return (
            f"the model's own loss includes {why}, whereas risk and effects are those of the mean "
            "negative log-likelihood of the labels alone (difference on a short sequence: "
            f"{self.difference:+.4g})"
        )

    def attributes(self) -> dict[str, Any]:
        """The attributes of a result that state this loss."""
        difference = {"own_loss_difference": self.difference}
        return {"own_loss": self.kind, "own_loss_note": str(self)} | difference


def tried_own_loss(plan: Plan, sample_set: SampleSet) -> OwnLoss | None:
    """The difference of a model's own loss from the risk, found by asking the model for its loss.

    One pass over seven tokens is run, and one more where the losses differ. The answer is kept
    until the model changes. Arguments, result and errors are those of `own_loss`.
    """
    state = state_of(plan)
    known = _KNOWN.get(plan.model, state)
    if known is None:
        known = (_found(plan, sample_set),)
        _KNOWN.keep(plan.model, state, known)
    return known[0]


_KNOWN: Remembered[tuple[OwnLoss | None]] = Remembered()


def _found(plan: Plan, sample_set: SampleSet) -> OwnLoss | None:
    model = plan.model
    batch = probe_batch(plan, sample_set, "single")
    ids = batch.input_ids
    answer, loss, logits = None, None, torch.zeros(0)
    with Trying(), torch.no_grad(), eagerly(model), frequencies_at_first(model), _without_remarks():
        answer = model(input_ids=ids, labels=ids.clone(), **without_cache(model))
        logits = logits_of(answer, model, ids)
        loss = getattr(answer, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:  # or the model wants other labels
        return None
    logits, ids = widened(logits[0]), ids[0]
    tolerance = max(TOLERANCE[dtype] for dtype in precisions(model))
    found, risk, unshifted = (
        float(x)
        for x in (
            loss,
            F.cross_entropy(logits[:-1], ids[1:]),
            F.cross_entropy(logits, ids),
        )
    )
    if _close(found, risk, tolerance) or not math.isfinite(found - risk):
        return None
    with torch.no_grad():
        plain = float(-model_outputs(model, batch).token_logprob.sum() / (len(ids) - 1))
    if not _close(plain, risk, tolerance):
        raise UnsupportedModelError(
            f"{type(model).__name__}: it computes other logits where it is given labels, so its "
            "own loss and the risk cannot be compared; give a causal language model"
        )
    if _close(found, unshifted, tolerance):
        return OwnLoss("unshifted", found - risk)
    named = getattr(answer, "aux_loss", None) is not None
    return OwnLoss("auxiliary" if named else "other", found - risk)


def _close(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Inside, transformers' models do not say in the log which loss they take."""
    log = logging.getLogger("transformers.modeling_utils")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
