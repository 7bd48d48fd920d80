"""Batches of tokenised samples, flattened token by token, without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec

import torch
from torch import Tensor

from geffect_fast.transfer import on_device

IGNORE = -100
"""Label of a token that no loss reads, as in transformers."""

Role = Literal["answer", "alternative"]
"""Role of a sequence: the sample's answer, or an alternative in its place, such as a refusal."""

Reduction = Literal["token", "sample", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("token", "sample", "sum")


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole data set that a batch was cut from, over which means are taken.

    `sequence_targets[role]` counts, sequence by sequence, label tokens that are predicted (all but
    a sequence's first token); `n_labelled[role]` counts positions whose own label is not ignored.
    """

    n_samples: int
    sequence_targets: dict[str, tuple[int, ...]]
    n_labelled: dict[str, int]

    @property
    def n_targets(self) -> dict[str, int]:
        """Label tokens that are predicted, by role."""
        return {role: sum(counts) for role, counts in self.sequence_targets.items()}

    def n_targets_after(self, role: Role, skip: int) -> int:
        """Label tokens that are predicted, without the first `skip` of every sequence."""
        return sum(max(count - skip, 0) for count in self.sequence_targets[role])


P = ParamSpec("P")


def _from_host(
    method: Callable[Concatenate[Batch, P], Tensor],
) -> Callable[Concatenate[Batch, P], Tensor]:
    """Decorator for values that follow from the tokens alone: computed on the host, and kept.

    A batch on a device gets the host's value, moved there once. On a GPU the computation would cost
    a dozen small kernels for each objective, and sometimes a wait.
    """

    @wraps(method)
    def known(self: Batch, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (method.__name__, args, tuple(kwargs.items()))
        if key not in self._known:
            # Computed inside a `jvp`, the kept value would belong to that transform.
            with torch._C._DisableFuncTorch():
                self._known[key] = (
                    method(self, *args, **kwargs)
                    if self.host is None
                    else on_device(known(self.host, *args, **kwargs), self.labels.device)
                )
        return self._known[key]

    return known


@dataclass(frozen=True)
class Batch:
    """Several samples as one flat run of tokens.

    Sequence `q` owns tokens `cu_seqlens[q] : cu_seqlens[q + 1]`. The sequences of one sample (its
    answer and, where an objective needs them, its alternatives) are neighbours, so sample `i` owns
    tokens `cu_samples[i] : cu_samples[i + 1]`.

    Attributes:
        input_ids: `(1, total_tokens)` packed, or `(n_sequences, length)` where a model cannot be
            packed; flattened, both give the same order.
        position_ids: shaped like `input_ids` where sequences are packed, and restarting at every
            sequence; None where every sequence has a row of its own, whose positions the model
            counts itself.
        labels: `(total_tokens,)` unshifted labels, `IGNORE` where no loss reads them.
        targets: `(total_tokens,)` the label that each position predicts (the next token's label
            within the same sequence), `IGNORE` where there is none.
        cu_seqlens: `(n_sequences + 1,)` int32.
        cu_samples: `(n_samples + 1,)` int32.
        roles: role of each sequence.
        sequence_sample: `(n_sequences,)` int64, index of the sequence's sample in this batch.
        rows: row number of each sample in its data set.
        totals: sizes of the data set.
        reduction: what a mean is taken over: all target tokens (`token`), the tokens of a sample
            and then samples (`sample`), or nothing, a sum (`sum`).
        weights: `(total_tokens,)` fp64, the data's own weight of the label in `targets`, 0 where
            there is no label and in sequences other than answers; None where the data gives no
            weights.
        host: the batch on the CPU that this batch was moved from, for values that the host needs;
            None where the batch was not moved.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    labels: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    cu_samples: Tensor
    roles: tuple[Role, ...]
    sequence_sample: Tensor
    rows: tuple[int, ...]
    totals: Totals
    reduction: Reduction = "token"
    weights: Tensor | None = None
    host: Batch | None = field(default=None, repr=False, compare=False)
    _known: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def n_samples(self) -> int:
        return len(self.rows)

    @property
    def total_tokens(self) -> int:
        return self.labels.numel()

    @property
    def packed(self) -> bool:
        """Whether several sequences share one row of `input_ids`, told apart by `position_ids`."""
        return self.input_ids.shape[0] == 1

    @property
    def target_index(self) -> Tensor:
        """Positions that predict a label token, `(n_targets,)` int64, ascending."""
        return self._target_index()

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of every sequence."""
        return (self.host or self).cu_seqlens.diff().tolist()

    @property
    def sample_lengths(self) -> list[int]:
        """Tokens of every sample."""
        return (self.host or self).cu_samples.diff().tolist()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; the copies are not waited for."""
        device = torch.device(device)
        if device == self.labels.device:
            return self
        host = self.host or (self if self.labels.is_cpu else None)
        if host is not None and device.type == "cpu":
            return host
        moved: dict[str, Any] = {
            f.name: on_device(value, device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, host=host)

    # ---- from tokens to samples and back: the building blocks of objectives ----

    @_from_host
    def _target_index(self) -> Tensor:
        return torch.nonzero(self.targets != IGNORE).squeeze(1)

    @_from_host
    def token_sequence(self) -> Tensor:
        """Index of the sequence each token belongs to, `(total_tokens,)` int64."""
        # The number of sequences that have ended before each token. Unlike repeat_interleave, this
        # starts no threads.
        ends = self.cu_seqlens[1:].long()
        ended = ends.new_zeros(self.total_tokens + 1).index_add_(0, ends, torch.ones_like(ends))
        return ended[:-1].cumsum(0)

    @_from_host
    def token_sample(self) -> Tensor:
        """Index of the sample each token belongs to, `(total_tokens,)` int64."""
        return self.sequence_sample[self.token_sequence()]

    @_from_host
    def role_mask(self, role: Role) -> Tensor:
        """Tokens of sequences that play `role`, `(total_tokens,)` bool."""
        return self.plays(role)[self.token_sequence()]

    @_from_host
    def plays(self, role: Role) -> Tensor:
        """Sequences that play `role`, `(n_sequences,)` bool."""
        return torch.tensor([r == role for r in self.roles], device=self.labels.device)

    @_from_host
    def target_mask(self, role: Role = "answer", skip: int = 0) -> Tensor:
        """Positions of `role` that predict a label token, `(total_tokens,)` bool.

        The first `skip` of every sequence are left out.
        """
        mask = self.targets != IGNORE
        if skip:
            before = mask.cumsum(0) - mask.long()
            at_start = before[self.cu_seqlens[:-1].long()]
            mask = mask & (before - at_start[self.token_sequence()] >= skip)
        return mask & self.role_mask(role)

    @_from_host
    def label_mask(self, role: Role = "answer") -> Tensor:
        """Positions of `role` that hold a label token themselves, `(total_tokens,)` bool."""
        return (self.labels != IGNORE) & self.role_mask(role)

    @_from_host
    def target_positions(self, role: Role = "answer") -> Tensor:
        """`target_mask` as positions, ascending, int64; indexing by a mask would wait for a GPU."""
        return torch.nonzero(self.target_mask(role)).squeeze(1)

    @_from_host
    def label_positions(self, role: Role = "answer") -> Tensor:
        """`label_mask` as positions, ascending, int64."""
        return torch.nonzero(self.label_mask(role)).squeeze(1)

    def sample_sum(self, values: Tensor, mask: Tensor) -> Tensor:
        """Sums of `values` `(total_tokens,)` under `mask`, `(n_samples,)`; differentiable."""
        return _segment_sum(values, mask, self.sample_lengths)

    def sequence_sum(self, values: Tensor, mask: Tensor) -> Tensor:
        """Sums of `values` `(total_tokens,)` under `mask`, `(n_sequences,)`; differentiable."""
        return _segment_sum(values, mask, self.sequence_lengths)

    def spread(self, per_sample: Tensor) -> Tensor:
        """The value of each token's sample: `(n_samples,)` to `(total_tokens,)`."""
        return per_sample[self.token_sample()]

    @_from_host
    def target_weight(self, role: Role = "answer", skip: int = 0) -> Tensor:
        """The weight of each predicted token in a mean, `(total_tokens,)` fp64, 0 elsewhere.

        With `N` target tokens of `role` in the whole set, `n_i` of them in sample `i`, and `B`
        samples, the weight is `1/N` (reduction token), `1/(B n_i)` (sample) or 1 (sum). The first
        `skip` target tokens of every sequence are left out, and do not count in `N` and `n_i`.
        """
        return self._weight(self.target_mask(role, skip), self.totals.n_targets_after(role, skip))

    @_from_host
    def label_weight(self, role: Role = "answer") -> Tensor:
        """`target_weight`, counted over the positions that hold a label token themselves."""
        return self._weight(self.label_mask(role), self.totals.n_labelled[role])

    def _weight(self, mask: Tensor, n_in_set: int) -> Tensor:
        weight = mask.double()
        if self.reduction == "token":
            return weight / max(n_in_set, 1)
        if self.reduction == "sample":
            counts = self.sample_sum(weight, mask).clamp(min=1)
            return weight / self.spread(counts) / self.totals.n_samples
        return weight

    def sample_weight(self) -> float:
        """The weight of one sample in a mean over samples: `1/B`, or 1 for `sum`."""
        return 1.0 if self.reduction == "sum" else 1.0 / self.totals.n_samples


def _segment_sum(values: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    picked = torch.where(mask, values, torch.zeros_like(values))
    return torch.stack([part.sum() for part in picked.split(lengths)])
