"""From questions and answers to token ids with labels on the answer alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geffect_fast.data.batch import IGNORE, Role, Totals
from geffect_fast.data.chat_render import Rendered, render
from geffect_fast.data.fewest_tokens import FewestTokens
from geffect_fast.data.qa import row_place
from geffect_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
"""What `template="auto"` means for a tokenizer without a chat template."""

_ANSWER_MARK = "@@answer@@"
CHAT_DATE = "2024-07-26"
"""The day that chat templates are told, unless another is given; a fixed one lets a run be replayed
on any day. It is the one in Llama's own template."""


@dataclass(frozen=True, eq=False)
class Sequence:
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

    `part_of` is its row in the set that this one is a part of; None where it is whole.
    """

    row: int
    question: str
    answer: Sequence
    alternatives: tuple[Sequence, ...] = ()
    part_of: int | None = None

    @property
    def data_row(self) -> int:
        """The row in the data as they were read."""
        return self.row if self.part_of is None else self.part_of

    def sequences(self) -> dict[Role, tuple[Sequence, ...]]:
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
        sequences: dict[Role, list[Sequence]] = {"answer": [], "alternative": []}
        for sample in self.samples:
            for role, found in sample.sequences().items():
                sequences[role] += found
        return Totals(
            n_samples=len(self),
            sequence_targets={r: tuple(q.n_targets for q in qs) for r, qs in sequences.items()},
            n_labelled={r: sum(q.n_labelled for q in qs) for r, qs in sequences.items()},
        )


def tokenize_rows(
    rows: Rows[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    refusals: Rows[str] | Rows[Mapping[str, Any]] | None = None,
    template: str = "auto",
    max_length: int | None = None,
    date: str = CHAT_DATE,
    n_positions: int | None = None,
) -> SampleSet:
    """Turn rows into samples whose labels cover the answer and the token that ends it.

    A sequence is `prompt, answer, end`; only `answer, end` is labelled, and what a template puts
    after the end is cut, since no label depends on it. The end is the first special token the
    template puts after the answer; a text template without one gets the tokenizer's end-of-sequence
    token. Tokens never straddle prompt and answer: where joint tokenising would merge across the
    boundary, the two are tokenised apart. White space around questions and answers is dropped.

    The alternatives of row `i` are its own field `alternative`, one or a list of them, else
    `refusals[i % len(refusals)]`.

    Args:
        rows: from `read_rows`, all text or all tokenised (those are used as they are).
        tokenizer: of transformers; None for tokenised rows.
        name: the argument the rows came from, for messages.
        refusals: from `read_refusals`; tokenised ones are whole sequences, one a row.
        template: `auto` (the tokenizer's chat template, else `PLAIN_TEMPLATE`), or a string with
            `{question}` and then `{answer}`.
        max_length: refuse sequences of more tokens.
        date: the day, `YYYY-MM-DD`, that a chat template is told which asks (`strftime_now`,
            `date_string`), so that no run depends on when it is made.
        n_positions: of the model, where it has a table of them: text that cannot fit is refused
            before it is tokenised (`check_positions` counts).

    Returns:
        One sample a row, in order.

    Raises:
        InputError: text without a tokenizer, a bad template or date, a template that takes too much
            time, memory or room (`geffect_fast.data.chat_render`), a sample that is too long or has
            no label to learn, weights of another number of tokens, or tokenised refusals that do
            not match the rows.
    """
    most = min((n for n in (max_length, n_positions) if n is not None), default=None)
    encode = None if tokenizer is None else _Encoder(tokenizer, template, date, most)
    if encode is not None:
        encode.render([row["question"].strip() for row in rows if "input_ids" not in row])
    samples = []
    for i, (row, others) in enumerate(zip(rows, _alternatives(rows, refusals), strict=True)):
        place = row_place(name, i)
        question = row.get("question")
        answer = _sequence(row, row, "answer", encode, place, max_length)
        samples.append(
            Sample(
                row=i,
                question=question if isinstance(question, str) else "",
                answer=_weighted(answer, row.get("weights"), place),
                alternatives=tuple(
                    _sequence(row, other, "alternative", encode, place, max_length)
                    for other in others
                ),
            )
        )
    return SampleSet(name, tuple(samples))


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
                        f"{row_place(sample_set.name, sample.row)}: its {role} holds token id "
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
                        f"{row_place(sample_set.name, sample.row)}: its {role} sequence has "
                        f"{len(sequence)} tokens, but the {what} knows {n_positions} positions; "
                        "shorten or drop the row"
                    )


def _alternatives(
    rows: Rows[Mapping[str, Any]], refusals: Rows[str] | Rows[Mapping[str, Any]] | None
) -> Iterator[Rows[str | Mapping[str, Any]]]:
    """What stands in for the answer of each row, text or tokenised; empty where nothing does."""
    if refusals is not None and not refusals:
        raise InputError("refusals: the list is empty; give at least one, or none at all")
    if refusals and not isinstance(refusals[0], str) and len(refusals) != len(rows):
        raise InputError(
            f"refusals: {len(refusals)} tokenised refusals for {len(rows)} rows; "
            "give one a row, each with the question's own tokens before it"
        )
    for i, row in enumerate(rows):
        own = row.get("alternative")
        if own is not None:
            yield own if isinstance(own, list) else [own]
        else:
            yield [] if refusals is None else [refusals[i % len(refusals)]]


def _sequence(
    row: Mapping[str, Any],
    answer: Mapping[str, Any] | str,
    role: Role,
    encode: _Encoder | None,
    place: str,
    max_length: int | None,
) -> Sequence:
    """The sequence that `answer` makes of `row`: as it is if tokenised, else encoded."""
    if isinstance(answer, Mapping) and "input_ids" in answer:
        ids, labels = answer["input_ids"], answer["labels"]
    elif "input_ids" in row:
        raise InputError(
            f"{place} is tokenised, its {role} is text; give 'refusals' as input_ids and labels too"
        )
    elif encode is None:
        raise InputError(f"{place} is text; give a tokenizer, or rows of input_ids and labels")
    else:
        text = answer if isinstance(answer, str) else answer["answer"]
        ids, labels = encode(row["question"].strip(), text.strip(), f"{place}, {role},")
    if max_length is not None and len(ids) > max_length:
        raise InputError(
            f"{place}: its {role} sequence has {len(ids)} tokens, more than "
            f"max_length={max_length}; shorten or drop the row, or raise max_length"
        )
    return Sequence(torch.tensor(ids), torch.tensor(labels))


def _weighted(answer: Sequence, weights: Rows[float] | None, place: str) -> Sequence:
    """The answer with a weight at every label."""
    if weights is None:
        return answer
    if len(weights) != answer.n_labelled:
        raise InputError(
            f"{place}: {len(weights)} 'weights' for the {answer.n_labelled} label tokens of its "
            "answer; they were written for another tokenizer, template or answer: write them anew, "
            "or leave them out"
        )
    spread = torch.zeros(len(answer), dtype=torch.float64)
    spread[answer.labels != IGNORE] = torch.tensor(weights, dtype=torch.float64)
    return replace(answer, weights=spread)


def checked_date(date: str) -> datetime:
    """Midnight of a day; raise `InputError` where `date` is none."""
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise InputError(f"date: {date!r} must be a day such as '{CHAT_DATE}'") from None


@contextmanager
def _clock_at(day: datetime) -> Iterator[None]:
    """The function `strftime_now` of chat templates tells this day; transformers takes no other."""
    from transformers.utils import chat_template_utils

    clock = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: day)
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


class _Encoder:
    """Question and answer to token ids and labels, with one tokenizer and template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, date: str, most: int | None
    ) -> None:
        if not callable(tokenizer):
            raise InputError(
                f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}; "
                "load it with AutoTokenizer.from_pretrained"
            )
        if not isinstance(template, str):
            raise InputError(f"template: got {type(template).__name__}; give 'auto' or a text")
        self.tokenizer = tokenizer
        self._day = checked_date(date)
        self._rendered: dict[str, Rendered] = {}
        self._most, self._fewest = most, FewestTokens(tokenizer)
        self.chat = template == "auto" and bool(getattr(tokenizer, "chat_template", None))
        if template == "auto":
            template = PLAIN_TEMPLATE
        if template.count("{question}") != 1 or template.count("{answer}") != 1:
            raise InputError(
                f"template: {template!r} must be 'auto' or hold {{question}} and {{answer}} once"
            )
        self.before, _, rest = template.partition("{question}")
        self.between, answer, self.after = rest.partition("{answer}")
        if not answer:
            raise InputError(f"template: {template!r} must put {{question}} before {{answer}}")
        # A chat template writes its own beginning of sequence; elsewhere the tokenizer decides.
        begins = not self.chat and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.begin = [tokenizer.bos_token_id] if begins else []
        added = getattr(tokenizer, "added_tokens_decoder", None)
        of_added = added.items() if isinstance(added, Mapping) else ()  # mistral-common has none
        self.special = set(tokenizer.all_special_ids) | {i for i, t in of_added if t.special}

    def __call__(self, question: str, answer: str, place: str) -> tuple[list[int], list[int]]:
        prompt, tail = self._around(question, place)
        fewest = 0 if self._most is None else self._fewest(prompt + answer)
        if self._most is not None and fewest > self._most:
            raise InputError(
                f"{place} has {len(prompt + answer)} characters, at least {fewest} tokens, "
                f"more than {self._most} (the model's positions, or max_length); shorten or drop "
                "the row"
            )
        ids, first = self._prompt_and_answer(prompt, answer)
        n_body = len(ids)
        if tail:
            ids = self._continue(ids, prompt + answer, tail)
        ends = [i for i in range(n_body, len(ids)) if ids[i] in self.special]
        if ends:
            ids = ids[: ends[0] + 1]
        elif not self.chat and self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        n_prompt = len(self.begin) + first
        if n_body == first or n_prompt == 0:
            raise InputError(f"{place} has no token to learn after a first one; check the template")
        return self.begin + ids, [IGNORE] * n_prompt + ids[first:]

    def render(self, questions: Rows[str]) -> None:
        """Have the chat template, if there is one, make its texts of these questions."""
        if self.chat:
            once = list(dict.fromkeys(questions))
            self._rendered |= zip(once, render(self._by_template, once), strict=False)

    def _by_template(self, question: str) -> str:
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _ANSWER_MARK},
        ]
        with _clock_at(self._day):
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, date_string=self._day.strftime("%d %b %Y")
            )
        return str(text)

    def _around(self, question: str, place: str) -> tuple[str, str]:
        """The text before the answer and the text after it."""
        if not self.chat:
            return self.before + question + self.between, self.after
        if question not in self._rendered:
            self.render([question])
        rendered = self._rendered[question]
        if rendered.reason:
            raise InputError(
                f"{place} does not fit the tokenizer's chat template ({rendered.reason[:200]}); "
                "give template='...{question}...{answer}'"
            )
        # The last one: a question may hold the mark too, but it comes before the answer.
        prompt, mark, tail = rendered.text.rpartition(_ANSWER_MARK)
        if not mark:
            raise InputError(
                f"{place} is lost in the tokenizer's chat template, which shows no assistant turn; "
                "give template='...{question}...{answer}'"
            )
        return prompt, tail

    def _prompt_and_answer(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids of both texts, and how many belong to the prompt.

        A tokenizer that ties a space to the word after it takes the prompt's last space into the
        answer. If no prefix of the ids is the prompt, a token straddles the boundary, and the two
        are tokenised apart.
        """
        whole = self._ids(prompt + answer)
        for head_text in (prompt, prompt.rstrip(" ")):
            head = self._ids(head_text)
            if self._begins(whole, head):
                return whole, len(head)
        return head + self._ids((prompt + answer)[len(head_text) :]), len(head)

    def _continue(self, ids: list[int], text: str, more: str) -> list[int]:
        """Ids of `text + more` of which the ids of `text` are a prefix."""
        whole = self._ids(text + more)
        return whole if self._begins(whole, ids) else ids + self._ids(more)

    def _begins(self, whole: list[int], head: list[int]) -> bool:
        # An unknown token stands for any length of text, so as a prefix it says nothing.
        known = not head or head[-1] != self.tokenizer.unk_token_id
        return known and whole[: len(head)] == head

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
