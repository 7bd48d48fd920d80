"""One forward pass over a batch: log-probabilities of the labels, and what else objectives need."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from geffect_fast.capture.factors import widened
from geffect_fast.capture.segments import Segments
from geffect_fast.data.batch import Batch
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.objectives import Outputs
from geffect_fast.objectives.base import Need


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names `argument`."""
    return argument in inspect.signature(model.forward).parameters


def keeps_logits(model: nn.Module, batch: Batch) -> bool:
    """Whether the model computes logits at the batch's targets only."""
    return batch.packed and takes(model, "logits_to_keep")


def sample_axis(model: nn.Module, batch: Batch, per_token: bool = False) -> Segments:
    """How a module's rows are told apart by sample, or by token, in a forward over `batch`."""
    kept = batch.target_index if keeps_logits(model, batch) else None
    if per_token:
        return Segments.tokens(batch.input_ids.shape, kept)
    if not batch.packed:
        per_sample = len(batch.roles) // batch.n_samples
        return Segments.rectangular(batch.input_ids.shape, per_sample)
    return Segments.packed(batch.cu_samples, kept)


def model_outputs(model: nn.Module, batch: Batch, needs: Collection[Need] = ()) -> Outputs:
    """Run `model` on `batch`, under the caller's grad mode.

    Args:
        model: a causal language model of transformers, or one called and answering like it.
        batch: on the model's device.
        needs: `hidden_states` and `logits` cost memory and are returned only where asked for;
            `reference_hidden_states` and `reference_logits` ask for the same, here of this model.

    Raises:
        UnsupportedModelError: the model's answer has no logits of the expected shape.
    """
    wants_logits = not {"logits", "reference_logits"}.isdisjoint(needs)
    wants_hidden = not {"hidden_states", "reference_hidden_states"}.isdisjoint(needs)
    index = batch.target_index
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids}
    if takes(model, "position_ids"):
        kwargs["position_ids"] = batch.position_ids
    if takes(model, "use_cache"):
        kwargs["use_cache"] = False
    if keeps_logits(model, batch):
        kwargs["logits_to_keep"] = index
    if wants_hidden:
        kwargs["output_hidden_states"] = True
    answer = model(**kwargs)
    logits = getattr(answer, "logits", answer)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModelError(
            f"{type(model).__name__} returned no logits of shape (batch, tokens, vocabulary); "
            "give a causal language model"
        )
    logits = logits.flatten(0, 1)
    if not keeps_logits(model, batch):
        logits = logits[index]
    # Log-probabilities are differences of numbers of like size: never in bf16 or fp16.
    nll = F.cross_entropy(widened(logits), batch.targets[index], reduction="none")
    token_logprob = nll.new_zeros(batch.total_tokens).index_copy(0, index, -nll)
    hidden = None
    if wants_hidden:
        hidden = tuple(h.flatten(0, 1) for h in answer.hidden_states)
    return Outputs(token_logprob, logits if wants_logits else None, hidden)
