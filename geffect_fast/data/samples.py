"""Tokenised data sets: sequences of ids and labels, samples of them, and sets of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from geffect_fast.data.batch import IGNORE, Role, Totals
from geffect_fast.data.row_kinds import row_place
from geffect_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Token ids and unshifted labels, both `(length,)` int64; `IGNORE` where nothing is learned.

    `weights` `(length,)` fp64 are the labels' own, from the data, 0 where there is no label; None
    where the data gives none.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def n_targets(self) -> int:
        """Label tokens that are predicted: all but one on the first token."""
        return int((self.labels.numpy()[1:] != IGNORE).sum())

    @property
    def n_labelled(self) -> int:
        """Tokens that carry a label."""
        return int((self.labels.numpy() != IGNORE).sum())


@dataclass(frozen=True, eq=False)
class Sample:
    """Row `row` (from 0) of a set: its answer, and what objectives may put in its place.

    Attributes:
        row: counts the samples of the set.
        question: what was asked last before the answer ends; empty where nothing was.
        answer: all of the sample's sequence, the question too.
        alternatives: sequences in place of it.
        part_of: its row in the set that this one is a part of; None where it is whole.
        fields: the row of the data with all its fields, but those that became tokens.
        window_of: the text it is a window of, a row of the data, and the window's number in it;
            None where it is none.
    """

    row: int
    question: str
    answer: TokenSequence
    alternatives: tuple[TokenSequence, ...] = ()
    part_of: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    window_of: tuple[int, int] | None = None

    @property
    def data_row(self) -> int:
        """The row in the whole set, where windows of texts count as rows."""
        return self.row if self.part_of is None else self.part_of

    def place(self, name: str) -> str:
        """How messages call it in the set of that name."""
        if self.window_of is None:
            return row_place(name, self.data_row)
        row, window = self.window_of
        return f"{row_place(name, row)}, window {window},"

    def sequences(self) -> dict[Role, tuple[TokenSequence, ...]]:
        """The sequences it has, by role."""
        return {"answer": (self.answer,), "alternative": self.alternatives}


@dataclass(frozen=True, eq=False)
class SampleSet:
    """A tokenised data set; `name` is the argument it came from."""

    name: str
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, rows: Iterable[int]) -> SampleSet:
        """A set of these rows alone, in this order, which know where they come from."""
        picked = [self.samples[row] for row in rows]
        return replace(
            self,
            samples=tuple(replace(s, row=i, part_of=s.data_row) for i, s in enumerate(picked)),
        )

    @property
    def questions(self) -> tuple[str, ...]:
        """The question of each sample, empty where there is none."""
        return tuple(sample.question for sample in self.samples)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences, alternatives included."""
        return sum(len(q) for s in self.samples for qs in s.sequences().values() for q in qs)

    @property
    def has_alternatives(self) -> bool:
        """Whether every sample has at least one alternative."""
        return all(sample.alternatives for sample in self.samples)

    @property
    def has_weights(self) -> bool:
        """Whether the data gives every answer's label tokens weights."""
        return all(sample.answer.weights is not None for sample in self.samples)

    def totals(self) -> Totals:
        """The sizes that means over the whole set are taken over."""
        sequences: dict[Role, list[TokenSequence]] = {"answer": [], "alternative": []}
        for sample in self.samples:
            for role, found in sample.sequences().items():
                sequences[role] += found
        return Totals(
            n_samples=len(self),
            sequence_targets={r: tuple(q.n_targets for q in qs) for r, qs in sequences.items()},
            n_labelled={r: sum(q.n_labelled for q in qs) for r, qs in sequences.items()},
        )


def check_vocabulary(sample_set: SampleSet, vocab_size: int, what: str = "model") -> None:
    """Refuse token ids and labels that a model of `vocab_size` tokens does not have.

    `what` is what the message calls the model.

    Raises:
        InputError: names the first such row and id.
    """
    for sample in sample_set.samples:
        for role, sequences in sample.sequences().items():
            for sequence in sequences:
                highest = max(int(x.numpy().max()) for x in (sequence.input_ids, sequence.labels))
                if highest >= vocab_size:
                    raise InputError(
                        f"{sample.place(sample_set.name)}: its {role} holds token id "
                        f"{highest}, but the {what} knows {vocab_size} tokens; use its own "
                        "tokenizer"
                    )


def check_positions(sample_set: SampleSet, n_positions: int, what: str = "model") -> None:
    """Refuse sequences longer than a model's table of `n_positions` positions.

    Raises:
        InputError: names the first such row.
    """
    for sample in sample_set.samples:
        for role, sequences in sample.sequences().items():
            for sequence in sequences:
                if len(sequence) > n_positions:
                    raise InputError(
                        f"{sample.place(sample_set.name)}: its {role} sequence has "
                        f"{len(sequence)} tokens, but the {what} knows {n_positions} positions; "
                        "shorten or drop the row"
                    )


def evenly(n: int, count: int | None) -> list[int]:
    """`count` of the rows 0 to n - 1, evenly spread; all where that is none, or too many."""
    if count is None or count >= n:
        return list(range(n))
    return [(2 * at + 1) * n // (2 * count) for at in range(count)]
