"""The reference model that objectives compare with, and its outputs on each batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import is_sharded
from geffect_fast.data.batch import Batch, Role
from geffect_fast.engines.batches import DataPass, each_batch
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.objectives import Outputs
from geffect_fast.objectives.base import REFERENCE_NEEDS


class Reference:
    """The frozen model that objectives compare with.

    Without a model of its own, the reference is the profiled model as it stands, and costs nothing.
    Otherwise its log-probabilities are computed once, before the engine starts, so that no second
    model need stay in memory. Only logits (kl) and hidden states (rr) are computed batch by batch,
    and the model is kept for them.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self._stored: dict[tuple[str, tuple[Role, ...], int], Tensor] = {}
        """Log-probabilities by data set, roles and row, not by batch: batches may be cut anew."""

    @torch.no_grad()
    def prepare(self, passes: Sequence[DataPass], device: torch.device) -> None:
        """Compute and keep log-probabilities for passes that need nothing else of the reference.

        Where no pass needs anything else, the reference's model is released.
        """
        if self.model is None:
            return
        needs = [data_pass.needs & REFERENCE_NEEDS for data_pass in passes]
        for data_pass, needed in zip(passes, needs, strict=True):
            if needed == {"reference"}:
                for _, attempt in each_batch([data_pass]):
                    places = _places(data_pass, attempt.batch)
                    if places[0] in self._stored:
                        continue  # an earlier measurement kept them
                    with attempt:
                        found = self._log_probabilities(self.model, attempt.batch.to(device))
                        lengths = attempt.batch.cu_samples.diff().tolist()
                        self._stored |= zip(places, found.split(lengths), strict=True)
        if not any(needed - {"reference"} for needed in needs):
            self.model = None

    @torch.no_grad()
    def is_computed_by(
        self, model: nn.Module, passes: Sequence[DataPass], device: torch.device
    ) -> bool:
        """Whether `model` gives the reference's outputs, bit by bit, wherever `passes` need them.

        False where the reference has no model of its own. The comparison ends at the first batch
        with a difference, except for ranks that keep step. Call this before `prepare`, which may
        release the reference's model.
        """
        equal, in_step = True, is_sharded(model)
        if self.model is None:
            return False
        for data_pass, attempt in each_batch(t for t in passes if t.needs & REFERENCE_NEEDS):
            with attempt:
                batch = attempt.batch.to(device)
                said = []
                for each in (self.model, model):
                    with packed_attention(each, batch):
                        said.append(model_outputs(each, batch, data_pass.needs & REFERENCE_NEEDS))
                equal = equal and _equal(*said)
                if not equal and not in_step:
                    return False
        return equal

    @staticmethod
    def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
        with packed_attention(model, batch):
            return model_outputs(model, batch).token_logprob

    @torch.no_grad()
    def _own_outputs(self, data_pass: DataPass, batch: Batch) -> Outputs | None:
        """The outputs of the reference's own model on `batch`.

        None where the pass needs none, or where the reference has no model of its own.
        """
        needs = data_pass.needs & REFERENCE_NEEDS
        if needs == {"reference"} and self._stored:
            return Outputs(torch.cat([self._stored[place] for place in _places(data_pass, batch)]))
        if not needs or self.model is None:
            return None
        with packed_attention(self.model, batch):
            return model_outputs(self.model, batch, needs)

    def outputs(self, data_pass: DataPass, batch: Batch, own: Outputs) -> Outputs | None:
        """The reference's outputs on a batch, None where the pass needs none.

        Args:
            data_pass: the pass that the batch belongs to.
            batch: the batch, on the model's device.
            own: the profiled model's outputs on the batch.
        """
        another = self._own_outputs(data_pass, batch)
        if another is not None or not data_pass.needs & REFERENCE_NEEDS:
            return another
        return Outputs(
            own.token_logprob.detach(),
            None if own.logits is None else own.logits.detach(),
            None if own.hidden_states is None else tuple(h.detach() for h in own.hidden_states),
        )


def _equal(one: Outputs, other: Outputs) -> bool:
    """Whether the outputs of two models are equal, bit by bit."""
    pairs = [(one.token_logprob, other.token_logprob)]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits))
    own, others = one.hidden_states or (), other.hidden_states or ()
    if len(own) != len(others):
        return False
    pairs += zip(own, others, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _places(data_pass: DataPass, batch: Batch) -> list[tuple[str, tuple[Role, ...], int]]:
    """The keys under which a reference keeps the samples of a batch."""
    roles = tuple(dict.fromkeys(batch.roles))
    return [(data_pass.on, roles, row) for row in batch.rows]
