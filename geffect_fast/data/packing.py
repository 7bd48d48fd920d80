"""Cutting of a tokenised set into batches without padding, and of batches into smaller ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from geffect_fast.data.batch import IGNORE, REDUCTIONS, Batch, Reduction, Role, Totals
from geffect_fast.data.samples import Sample, SampleSet, TokenSequence
from geffect_fast.errors import InputError

Layout = Literal["packed", "equal_length", "single"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def make_batches(
    sample_set: SampleSet,
    roles: tuple[Role, ...],
    *,
    token_budget: int,
    reduction: Reduction = "token",
    layout: Layout = "packed",
) -> list[Batch]:
    """Cut a set into batches of at most `token_budget` tokens; a longer sample gets its own.

    Layouts:
        packed: `input_ids` `(1, total_tokens)`, samples in row order, positions restart at every
            sequence.
        equal_length: `input_ids` `(n_sequences, length)`, for models that cannot be packed, which
            count positions themselves. Samples of one length are batched, longest first, so that a
            budget that is too large fails at once. The sequences of a sample must share a batch,
            since an objective may couple them; where they differ in length, the shorter ones repeat
            their last token, unlabelled. This is exact for a causal model, since no labelled
            position sees later tokens. All samples of a batch have the same number of sequences.
        single: one sample a batch, whatever the budget; several sequences of a sample are laid out
            as in `equal_length`.

    Args:
        sample_set: tokenised samples.
        roles: roles of the sequences that each sample brings: `("answer",)`, `("alternative",)`
            (one or more a sample), or both in this order.
        token_budget: the most tokens of a batch.
        reduction: what the batches' means are taken over, in the whole set.
        layout: one of the layouts above.

    Returns:
        Batches that hold each sample once.

    Raises:
        InputError: a bad argument, or a row that lacks the alternative that `roles` asks for.
    """
    if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < 1:
        raise InputError(f"token_budget: {token_budget!r} is no whole number of at least 1")
    if layout not in LAYOUTS:
        raise InputError(f"layout: {layout!r} is none of {', '.join(LAYOUTS)}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: {reduction!r} is none of {', '.join(REDUCTIONS)}")
    if roles not in (("answer",), ("alternative",), ("answer", "alternative")):
        raise InputError(f"roles: {roles!r} is none of answer, alternative, or both in this order")
    for sample in sample_set.samples:
        if "alternative" in roles and not sample.alternatives:
            raise InputError(
                f"{sample.place(sample_set.name)} has no alternative answer; "
                "give refusals, or a field 'alternative' in every row"
            )
    totals = sample_set.totals()
    return [
        _batch(samples, roles, totals, reduction, layout)
        for samples in _cut(sample_set.samples, roles, token_budget, layout)
    ]


def _cut(
    samples: tuple[Sample, ...], roles: tuple[Role, ...], token_budget: int, layout: Layout
) -> Iterator[list[Sample]]:
    if layout == "single":
        yield from ([sample] for sample in samples)
    elif layout == "packed":
        yield from _fill(
            ((sample, sum(_lengths(sample, roles))) for sample in samples), token_budget
        )
    else:
        by_shape: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            lengths = _lengths(sample, roles)
            by_shape.setdefault((max(lengths), len(lengths)), []).append(sample)
        for shape in sorted(by_shape, reverse=True):
            yield from _fill(((s, prod(shape)) for s in by_shape[shape]), token_budget)


def _lengths(sample: Sample, roles: tuple[Role, ...]) -> list[int]:
    sequences = sample.sequences()
    return [len(sequence) for role in roles for sequence in sequences[role]]


Item = TypeVar("Item")


def _fill(sized: Iterable[tuple[Item, int]], token_budget: int) -> Iterator[list[Item]]:
    """Groups of consecutive items whose sizes add up to at most the budget; a larger item alone."""
    batch: list[Item] = []
    used = 0
    for item, size in sized:
        if batch and used + size > token_budget:
            yield batch
            batch, used = [], 0
        batch.append(item)
        used += size
    if batch:
        yield batch


def _batch(
    samples: list[Sample],
    roles: tuple[Role, ...],
    totals: Totals,
    reduction: Reduction,
    layout: Layout,
) -> Batch:
    played = [
        (i, role, sequence)
        for i, sample in enumerate(samples)
        for role in roles
        for sequence in sample.sequences()[role]
    ]
    sequences = [sequence for _, _, sequence in played]
    if layout != "packed":
        length = max(map(len, sequences))
        sequences = [_extend(sequence, length) for sequence in sequences]
    shape = (1 if layout == "packed" else len(sequences), -1)
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = _offsets(lengths)
    sequence_sample = torch.tensor([i for i, _, _ in played])
    sequences_a_sample = torch.bincount(sequence_sample).tolist()
    return Batch(
        input_ids=torch.cat([s.input_ids for s in sequences]).view(shape),
        position_ids=_restarting(lengths) if layout == "packed" else None,
        labels=torch.cat([s.labels for s in sequences]),
        targets=torch.cat([_ahead(s.labels, IGNORE) for s in sequences]),
        cu_seqlens=cu_seqlens,
        cu_samples=cu_seqlens[_offsets(sequences_a_sample).long()],
        roles=tuple(role for _, role, _ in played),
        sequence_sample=sequence_sample,
        rows=tuple(sample.row for sample in samples),
        totals=totals,
        reduction=reduction,
        weights=_target_weights(sequences),
    )


def split_batch(batch: Batch, token_budget: int) -> list[Batch]:
    """Cut a batch into pieces of at most `token_budget` tokens; a longer sample gets its own.

    Args:
        batch: a batch of `make_batches`, in any layout; the pieces keep the layout.
        token_budget: the most tokens of a piece.
    """
    tokens = batch.cu_samples.tolist()
    sized = ((i, tokens[i + 1] - tokens[i]) for i in range(batch.n_samples))
    return [_part(batch, piece[0], piece[-1] + 1) for piece in _fill(sized, token_budget)]


def _part(batch: Batch, first: int, end: int) -> Batch:
    """The batch's samples from `first` up to, but without, `end`."""
    start, stop = batch.cu_samples[[first, end]].tolist()
    inside = (batch.sequence_sample >= first) & (batch.sequence_sample < end)
    q, q_end = int(inside.nonzero()[0]), int(inside.nonzero()[-1]) + 1
    at = (slice(None), slice(start, stop)) if batch.packed else (slice(q, q_end),)
    return replace(
        batch,
        input_ids=batch.input_ids[at],
        position_ids=None if batch.position_ids is None else batch.position_ids[at],
        labels=batch.labels[start:stop],
        targets=batch.targets[start:stop],
        cu_seqlens=batch.cu_seqlens[q : q_end + 1] - start,
        cu_samples=batch.cu_samples[first : end + 1] - start,
        roles=batch.roles[q:q_end],
        sequence_sample=batch.sequence_sample[q:q_end] - first,
        rows=batch.rows[first:end],
        weights=None if batch.weights is None else batch.weights[start:stop],
    )


def token_places(sample_set: SampleSet, batch: Batch) -> Tensor:
    """The place of each token of a batch within its sample, `(total_tokens,)` int64.

    A sample's tokens are counted through its answer and then its alternatives, whichever of them
    the batch holds. Tokens that extend a sequence get -1.

    Args:
        sample_set: the set that the batch was cut from.
        batch: a batch of `make_batches`.
    """
    by_row = {sample.row: sample for sample in sample_set.samples}
    lengths = batch.cu_seqlens.diff().tolist()
    pieces, seen = [], dict.fromkeys(by_row, 0)
    for q, (i, role) in enumerate(zip(batch.sequence_sample.tolist(), batch.roles, strict=True)):
        sample = by_row[batch.rows[i]]
        alternative = seen[sample.row]
        seen[sample.row] += role == "alternative"
        earlier = [] if role == "answer" else [sample.answer, *sample.alternatives[:alternative]]
        own = sample.answer if role == "answer" else sample.alternatives[alternative]
        places = torch.arange(lengths[q]) + sum(map(len, earlier))
        places[len(own) :] = -1
        pieces.append(places)
    return torch.cat(pieces)


def _extend(sequence: TokenSequence, length: int) -> TokenSequence:
    missing = length - len(sequence)
    if missing == 0:
        return sequence
    weights = sequence.weights
    return TokenSequence(
        torch.cat([sequence.input_ids, sequence.input_ids[-1:].expand(missing)]),
        torch.cat([sequence.labels, sequence.labels.new_full((missing,), IGNORE)]),
        None if weights is None else torch.cat([weights, weights.new_zeros(missing)]),
    )


def _ahead(values: Tensor, last: float) -> Tensor:
    """The value of the next token, for each token of a sequence; `last` for its last token."""
    return torch.cat([values[1:], values.new_full((1,), last)])


def _target_weights(sequences: list[TokenSequence]) -> Tensor | None:
    """The data's weight of the label that each position predicts; None where no sequence has any.

    Sequences without weights get 0.
    """
    if all(sequence.weights is None for sequence in sequences):
        return None
    return torch.cat(
        [
            torch.zeros(len(s), dtype=torch.float64) if s.weights is None else _ahead(s.weights, 0)
            for s in sequences
        ]
    )


def _restarting(lengths: list[int]) -> Tensor:
    """Positions `(1, total_tokens)` that restart at every sequence."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
