"""Tokenising of rows into samples: token ids, with labels on the tokens to learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from string import ascii_uppercase as LETTERS
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from geffect_fast.data.batch import IGNORE, Role
from geffect_fast.data.chat_template import CHAT_DATE, Turns
from geffect_fast.data.choices import lettered
from geffect_fast.data.conversations import is_learned
from geffect_fast.data.encoder import Encoder, Labelled
from geffect_fast.data.row_kinds import row_kind, row_place
from geffect_fast.data.samples import Sample, SampleSet, TokenSequence
from geffect_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_WINDOW = 2048
"""Tokens of a window of plain text where no length is given, as in MUSE."""

_NOT_HANDED_ON = ("input_ids", "labels", "attention_mask", "weights", "alternative")


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    refusals: Sequence[str] | Sequence[Mapping[str, Any]] | None = None,
    template: str = "auto",
    max_length: int | None = None,
    date: str = CHAT_DATE,
    n_positions: int | None = None,
    window: int = TEXT_WINDOW,
) -> SampleSet:
    """Turn rows into samples, with labels on the tokens to learn.

    The kind of a row decides which tokens these are:

    - *Questions and answers*, *conversations*: the answer, or every turn of the assistant's, and
      the token that ends it. A sequence is `prompt, answer, end`; text that a template puts after
      the last end is cut, since no label depends on it. The end is the first special token that
      the template puts after the answer; a text template without one gets the tokenizer's
      end-of-sequence token. White space around turns is dropped. Without a chat template a
      conversation is the text template, repeated for every pair of turns.
    - *Multiple choice*: the right choice's text, after the question alone.
    - *Plain text*: every token, in windows of `max_length`, one sample for each window
      (`Encoder.windows`).
    - *Continuations*: `gt`, after `prompt`, without a template or an end.
    - *Tokenised rows* are used as they are.

    Tokens never straddle prompt and answer: where joint tokenising would merge across the boundary,
    the two are tokenised apart.

    The alternatives of row `i` are its own field `alternative`, one or a list of them, else
    `refusals[i % len(refusals)]`. An alternative takes the place of the answer. In a conversation
    it takes the place of the last answer, and it alone is labelled. Plain text has no alternatives.

    Args:
        rows: rows of `read_rows`, all of one kind.
        tokenizer: a tokenizer of transformers; None for tokenised rows.
        name: the argument that the rows came from, for messages.
        refusals: refusals of `read_refusals`; tokenised ones are whole sequences, one for each row.
        template: `auto` (the tokenizer's chat template, else `PLAIN_TEMPLATE`), or a string with
            `{question}` and then `{answer}`.
        max_length: the most tokens of a sequence; a longer one is refused, and plain text is cut
            into windows of this length.
        date: the day, `YYYY-MM-DD`, that chat templates are told that ask for it (`strftime_now`,
            `date_string`), so that a run does not depend on the day it is made.
        n_positions: number of positions of a model that has a table of them; text that cannot fit
            is refused before it is tokenised (`check_positions` counts exactly).
        window: tokens of a window of plain text where `max_length` is None.

    Returns:
        One sample for each row, or for each window of a row, in order.

    Raises:
        InputError: text without a tokenizer; a bad template or date; a template that takes too much
            time, memory or room (`geffect_fast.data.chat_render`) or rewrites the text to learn; a
            sample that is too long or has no label to learn; weights for another number of tokens;
            or tokenised refusals that do not match the rows.
    """
    most = min((n for n in (max_length, n_positions) if n is not None), default=None)
    encode = None if tokenizer is None else Encoder(tokenizer, template, date, most)
    if encode is not None:
        encode.render(_asked(row) for row in rows if row_kind(row) in _ASKED)
    samples: list[Sample] = []
    for i, (row, others) in enumerate(zip(rows, _alternatives(rows, refusals), strict=True)):
        place = row_place(name, i)
        fields = {key: value for key, value in row.items() if key not in _NOT_HANDED_ON}
        if row_kind(row) == "text":
            if others:
                raise InputError(
                    f"{place} is plain text, which no refusal or alternative can stand in for; "
                    "give questions and answers"
                )
            length = min(max_length or window, n_positions or max_length or window)
            windows = _windows(row, encode, place, length)
            samples += [
                Sample(len(samples) + k, "", each, fields=fields, window_of=(i, k))
                for k, each in enumerate(windows)
            ]
            continue
        answer = _sequence(row, None, "answer", encode, place, max_length)
        samples.append(
            Sample(
                row=i,
                question=question_of(row),
                answer=_weighted(answer, row.get("weights"), place),
                alternatives=tuple(
                    _sequence(row, other, "alternative", encode, place, max_length)
                    for other in others
                ),
                fields=fields,
            )
        )
    return SampleSet(name, tuple(samples))


def tokenize_choices(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    form: Literal["letters", "texts"] = "letters",
    template: str = "auto",
    max_length: int | None = None,
    date: str = CHAT_DATE,
) -> SampleSet:
    """Turn rows of multiple choice into samples that hold all choices of a question.

    Args:
        rows: rows of `read_rows`, of multiple choice.
        tokenizer, name, template, max_length, date: as for `tokenize_rows`.
        form: `letters`: the prompt is the question, all choices and `Answer:`, as for MMLU and
            WMDP, and a choice is its letter; `texts`: the prompt is the question alone, and a
            choice is its text.

    Returns:
        One sample for each row: `answer` is the right choice, `alternatives` the others in the
        row's order. Labels are on the choice alone, from the first token that holds a part of any
        choice, without an end.

    Raises:
        InputError: a row is not of multiple choice; also the errors of `tokenize_rows`.
    """
    by_letter = form == "letters"
    if by_letter and template == "auto" and not getattr(tokenizer, "chat_template", None):
        template = "{question} {answer}"
    encode = Encoder(tokenizer, template, date, max_length)
    samples = []
    for i, row in enumerate(rows):
        place = row_place(name, i)
        if row_kind(row) != "choice":
            raise InputError(f"{place} has no 'choices'; give rows of multiple choice")
        asked = lettered(row) if by_letter else row["question"].strip()
        texts = LETTERS[: len(row["choices"])] if by_letter else row["choices"]
        turns = _question_turns(asked)
        made = [
            encode.conversation(turns, None, f"{place}, choice {k},", text.strip(), ends=False)
            for k, text in enumerate(texts)
        ]
        # Where a tokenizer ties the space before to some choices, it counts for all of them.
        first = min(len(ids) - sum(t != IGNORE for t in labels) for ids, labels in made)
        sequences = [
            _within((ids, [IGNORE] * first + ids[first:]), max_length, place, f"choice {k}")
            for k, (ids, _) in enumerate(made)
        ]
        right = sequences.pop(row["answer"])
        samples.append(Sample(i, row["question"], right, tuple(sequences), fields=row))
    return SampleSet(name, tuple(samples))


def _alternatives(
    rows: Sequence[Mapping[str, Any]], refusals: Sequence[str] | Sequence[Mapping[str, Any]] | None
) -> Iterator[Sequence[str | Mapping[str, Any]]]:
    """The alternatives of each row, text or tokenised; empty where a row has none."""
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


_ASKED = ("question", "choice", "chat")
"""Kinds of rows that a chat template writes."""


def _question_turns(question: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": None}]


def _asked(row: Mapping[str, Any]) -> tuple[Turns, Any]:
    """The turns of a row that a template writes, up to the last learned turn, and its tools."""
    if row_kind(row) != "chat":
        return _question_turns(row["question"].strip()), None
    turns = [turn | {"content": turn["content"].strip()} for turn in row["messages"]]
    last = max(i for i, turn in enumerate(turns) if is_learned(turn))
    return turns[: last + 1], row.get("tools")


def question_of(row: Mapping[str, Any]) -> str:
    """The last question of a row, as the data has it; empty where it asks nothing."""
    if row_kind(row) == "chat":
        asked = [turn["content"] for turn in _asked(row)[0] if turn["role"] == "user"]
        return asked[-1] if asked else ""
    question = row.get("prompt" if row_kind(row) == "continuation" else "question")
    return question if isinstance(question, str) else ""


def _sequence(
    row: Mapping[str, Any],
    other: Mapping[str, Any] | str | None,
    role: Role,
    encode: Encoder | None,
    place: str,
    max_length: int | None,
) -> TokenSequence:
    """The sequence of a row, tokenised already or encoded here; `other` replaces its answer."""
    kind = row_kind(row)
    found = row if other is None else other
    if isinstance(found, Mapping) and "input_ids" in found:
        return _within((found["input_ids"], found["labels"]), max_length, place, role)
    if kind == "tokens":
        raise InputError(
            f"{place} is tokenised, its {role} is text; give 'refusals' as input_ids and labels too"
        )
    if encode is None:
        raise InputError(f"{place} is text; give a tokenizer, or rows of input_ids and labels")
    what = f"{place}, {role},"
    text = other["answer"] if isinstance(other, Mapping) else other
    if kind == "continuation":
        made = encode.continuation(row["prompt"], row["gt"] if text is None else text, what)
    else:
        if text is None and kind != "chat":
            text = row["choices"][row["answer"]] if kind == "choice" else row["answer"]
        turns, tools = _asked(row)
        made = encode.conversation(turns, tools, what, None if text is None else text.strip())
    return _within(made, max_length, place, role)


def _within(made: Labelled, max_length: int | None, place: str, role: str) -> TokenSequence:
    """Ids and labels as a sequence; raises `InputError` where it is longer than `max_length`."""
    ids, labels = made
    if max_length is not None and len(ids) > max_length:
        raise InputError(
            f"{place}: its {role} sequence has {len(ids)} tokens, more than "
            f"max_length={max_length}; shorten or drop the row, or raise max_length"
        )
    return TokenSequence(torch.tensor(ids), torch.tensor(labels))


def _windows(
    row: Mapping[str, Any], encode: Encoder | None, place: str, length: int
) -> Iterator[TokenSequence]:
    """The windows of a text, with the row's weights if it has some."""
    if encode is None:
        raise InputError(f"{place} is text; give a tokenizer, or rows of input_ids and labels")
    if length < 2:
        raise InputError(
            "max_length: 1 leaves a window of text no token to predict; give 2 or more"
        )
    windows = [
        _within(made, None, place, "") for made in encode.windows(row["text"], length, place)
    ]
    weights = row.get("weights")
    if weights is None:
        yield from windows
        return
    labels = sum(window.n_labelled for window in windows)
    if len(weights) != labels:
        _refuse_weights(len(weights), labels, place)
    at = 0
    for window in windows:
        yield _weighted(window, weights[at : at + window.n_labelled], place)
        at += window.n_labelled


def _refuse_weights(given: int, labels: int, place: str) -> NoReturn:
    raise InputError(
        f"{place}: {given} 'weights' for the {labels} label tokens of its answer; they were "
        "written for another tokenizer, template or answer: write them anew, or leave them out"
    )


def _weighted(answer: TokenSequence, weights: Sequence[float] | None, place: str) -> TokenSequence:
    """The answer with a weight at every label."""
    if weights is None:
        return answer
    if len(weights) != answer.n_labelled:
        _refuse_weights(len(weights), answer.n_labelled, place)
    spread = torch.zeros(len(answer), dtype=torch.float64)
    spread[answer.labels != IGNORE] = torch.tensor(weights, dtype=torch.float64)
    return replace(answer, weights=spread)
