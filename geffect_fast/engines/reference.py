"""The reference model that objectives compare with, and its outputs on each batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import is_sharded, own_part
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
        """Whether `model` gives the reference's outputs wherever `passes` need them.

        Outputs are compared bit by bit. Where they differ by no more than rounding, the weights
        are: weights that are not aligned in memory, as those of a file, may round differently.

        False where the reference has no model of its own. The comparison ends at the first batch
        with a difference, except for ranks that keep step. Call this before `prepare`, which may
        release the reference's model.
        """
        equal, in_step = True, is_sharded(model)
        same_weights: bool | None = None
        if self.model is None:
            return False
        for data_pass, attempt in each_batch(t for t in passes if t.needs & REFERENCE_NEEDS):
            with attempt:
                batch = attempt.batch.to(device)
                said = []
                for each in (self.model, model):
                    with packed_attention(each, batch):
                        said.append(model_outputs(each, batch, data_pass.needs & REFERENCE_NEEDS))
                if equal and not _differ_by(0, *said):
                    continue
                if same_weights is None:
                    same_weights = _same_weights(self.model, model)
                equal = equal and same_weights and not _differ_by(_ROUNDING, *said)
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


_ROUNDING = 16
"""Units in the last place, of the largest output, that the same weights may differ by."""


def _differ_by(units: int, one: Outputs, other: Outputs) -> bool:
    """Whether outputs of two models differ by more than some units in the last place."""
    pairs = [(one.token_logprob, other.token_logprob)]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits))
    own, others = one.hidden_states or (), other.hidden_states or ()
    if len(own) != len(others):
        return True
    pairs += zip(own, others, strict=True)
    if not units:
        return not all(torch.equal(a, b) for a, b in pairs)
    return any(
        a.shape != b.shape
        or bool((a - b).abs().max() > units * torch.finfo(a.dtype).eps * a.abs().max())
        for a, b in pairs
    )


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are of one class, with parameters and buffers of equal values."""
    own, others = (dict((*m.named_parameters(), *m.named_buffers())) for m in (one, other))
    if type(one) is not type(other) or own.keys() != others.keys():
        return False
    for name, x in own.items():
        x, y = own_part(x), own_part(others[name])
        dtype = torch.promote_types(x.dtype, y.dtype)  # a loaded model's frequencies are fp32
        if not torch.equal(x.to(dtype), y.to(dtype)):
            return False
    return True


def _places(data_pass: DataPass, batch: Batch) -> list[tuple[str, tuple[Role, ...], int]]:
    """The keys under which a reference keeps the samples of a batch."""
    roles = tuple(dict.fromkeys(batch.roles))
    return [(data_pass.on, roles, row) for row in batch.rows]
