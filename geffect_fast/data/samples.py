"""Tokenised data sets: sequences of ids and labels, samples of sequences, and sets of samples."""

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

    `weights` `(length,)` fp64 are the data's weights of the labels, 0 where there is no label; None
    where the data gives no weights.
    """

    input_ids: Tensor
    labels: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def n_targets(self) -> int:
        """Number of label tokens that are predicted: all but a label on the first token."""
        return int((self.labels.numpy()[1:] != IGNORE).sum())

    @property
    def n_labelled(self) -> int:
        """Number of tokens that carry a label."""
        return int((self.labels.numpy() != IGNORE).sum())


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample of a set: its answer, and alternatives that objectives may put in its place.

    Attributes:
        row: number of the sample in its set, from 0.
        question: the last question before the answer's end; empty where nothing was asked.
        answer: the whole sequence of question and answer.
        alternatives: whole sequences with another answer.
        part_of: row of the sample in the whole set that this set is a part of; None where this set
            is whole.
        fields: the row of the data with all its fields, except those that became tokens.
        window_of: for a window of a text, the text's row in the data and the number of the window
            in the text; else None.
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
        """The sample's row in the whole set, where windows of texts count as rows."""
        return self.row if self.part_of is None else self.part_of

    def place(self, name: str) -> str:
        """The sample's place in the set of this name, for messages."""
        if self.window_of is None:
            return row_place(name, self.data_row)
        row, window = self.window_of
        return f"{row_place(name, row)}, window {window}"

    def sequences(self) -> dict[Role, tuple[TokenSequence, ...]]:
        """The sample's sequences, by role."""
        return {"answer": (self.answer,), "alternative": self.alternatives}


@dataclass(frozen=True, eq=False)
class SampleSet:
    """A tokenised data set; `name` is the argument it came from."""

    name: str
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, rows: Iterable[int]) -> SampleSet:
        """A set of these rows alone, in this order; `part_of` keeps their rows in the whole set."""
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
        """Number of tokens of all sequences, alternatives included."""
        return sum(len(q) for s in self.samples for qs in s.sequences().values() for q in qs)

    @property
    def has_alternatives(self) -> bool:
        """Whether every sample has at least one alternative."""
        return all(sample.alternatives for sample in self.samples)

    @property
    def has_weights(self) -> bool:
        """Whether the data gives weights for the label tokens of every answer."""
        return all(sample.answer.weights is not None for sample in self.samples)

    def totals(self) -> Totals:
        """The sizes of the set over which means are taken."""
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

    `what` is the model's name in the message.

    Raises:
        InputError: a row holds such a token; the first such row and id are named.
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
        InputError: a sequence is longer; the first such row is named.
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
    """`count` of the rows 0 to n - 1, evenly spread; all rows where `count` is None or above n."""
    if count is None or count >= n:
        return list(range(n))
    return [(2 * at + 1) * n // (2 * count) for at in range(count)]
