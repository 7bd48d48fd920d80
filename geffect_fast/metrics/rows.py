"""The sequences that metrics read of a data set's rows, and the fields they are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geffect_fast.data import IGNORE, Sample, SampleSet
from geffect_fast.data.row_kinds import row_place
from geffect_fast.data.samples import Sequence as Tokens
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.metrics.base import FORGET, Metric

Tokenize = Callable[[Sequence[Mapping[str, Any]], str], SampleSet]
"""DataRows of question, answer and alternatives, and the set's name, to samples."""

FIELDS = {
    "paraphrases": "paraphrased_answer",
    "perturbed": "perturbed_answer",
    "rephrased": "paraphrased_question",
    "choices": "choices",
}
"""By need, the field of a row that it reads."""

_PROMPT = 200
"""Tokens that are the prompt of a plain text, as in MUSE; half of a shorter one."""

_MOST_CHOICES = 26


@dataclass(frozen=True)
class DataRows:
    """A data set as metrics read it: every list has an entry a row, None where nothing is read.

    Attributes:
        name: of the set.
        answers: tokenised questions and answers.
        texts: the answers' texts, empty where rows are tokenised.
        paraphrases, perturbed, rephrased, choices: sequences that are scored beside.
        right: which of the choices is the answer.
    """

    name: str
    answers: SampleSet
    texts: tuple[str, ...]
    paraphrases: list[Tokens] | None = None
    perturbed: list[list[Tokens]] | None = None
    rephrased: list[Tokens] | None = None
    choices: list[list[Tokens]] | None = None
    right: list[int] | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def every_set(self) -> list[SampleSet]:
        """All sequences, for checks of vocabulary and length; rows keep their numbers."""
        columns: list[list[list[Tokens]]] = [
            *([[one] for one in of] for of in (self.paraphrases, self.rephrased) if of is not None),
            *(of for of in (self.perturbed, self.choices) if of is not None),
        ]
        return [
            self.answers,
            *(
                SampleSet(
                    self.name,
                    tuple(Sample(i, "", one, tuple(more)) for i, (one, *more) in enumerate(of)),
                )
                for of in columns
            ),
        ]


def rows_of(
    source: SampleSet | Sequence[Mapping[str, Any]],
    name: str,
    metrics: Sequence[Metric],
    needs: Collection[str],
    tokenize: Tokenize,
) -> DataRows:
    """What `metrics` read of a set.

    A field that no row of the set has is left out, except in the forget set, and the set has no
    number of the metric then; of the retain set that is told (`GEffectWarning`). Where a further
    set has perturbed answers but no paraphrased ones, its answers stand for these.

    Args:
        source: rows of `read_rows`, or samples.
        name: of the set.
        metrics: for messages.
        needs: of all metrics that are measured on this set.
        tokenize: makes samples of rows.

    Raises:
        InputError: a field is missing, or of the wrong form.
    """
    if isinstance(source, SampleSet):
        rows: Sequence[Mapping[str, Any]] = [{"input_ids": True}] * len(source)
        answers = source
    else:
        rows = [_with_answer(row) for row in source]
        answers = tokenize(
            [{k: v for k, v in row.items() if k != "alternative"} for row in rows], name
        )
    has_text = all(isinstance(row.get("answer"), str) and "input_ids" not in row for row in rows)
    has_text = has_text and len(answers) == len(rows)
    texts = tuple(str(row["answer"]).strip() for row in rows) if has_text else ("",) * len(answers)
    wanted = {need for need in FIELDS if need in needs}
    present = {need for need in sorted(wanted) if _present(rows, need, name, metrics)}
    if present and not has_text:
        need = sorted(present)[0]
        raise InputError(
            f"{name}: metric {_reader(metrics, need)} reads '{FIELDS[need]}' beside question and "
            "answer, and the rows hold no such; give rows of text"
        )

    def columns(
        need: str, values: list[list[str]], question: str = "question"
    ) -> list[list[Tokens]]:
        made = tokenize(
            [
                {"question": row[question], "answer": first, "alternative": others or None}
                for row, (first, *others) in zip(rows, values, strict=True)
            ],
            f"{name} ({FIELDS[need]})",
        )
        return [[each.answer, *each.alternatives] for each in made.samples]

    found: dict[str, Any] = {}
    if "perturbed" in present:
        found["perturbed"] = columns("perturbed", _texts(rows, "perturbed", name))
    if "paraphrases" in wanted:
        if "paraphrases" in present:
            made = columns("paraphrases", _texts(rows, "paraphrases", name))
            found["paraphrases"] = [of[0] for of in made]
        elif "perturbed" in present and name not in (FORGET, "retain"):
            found["paraphrases"] = [sample.answer for sample in answers.samples]
    if "rephrased" in present:
        questions = _texts(rows, "rephrased", name)
        asked = [
            {"question": question, "answer": row["answer"]}
            for row, (question, *_) in zip(rows, questions, strict=True)
        ]
        made_of = tokenize(asked, f"{name} ({FIELDS['rephrased']})")
        found["rephrased"] = [sample.answer for sample in made_of.samples]
    if "choices" in present:
        listed = [_choices(row, row_place(name, i), i) for i, row in enumerate(rows)]
        letters = [
            {
                "question": "\n".join(
                    [row["question"].strip(), *(f"{chr(65 + j)}. {c}" for j, c in enumerate(of))]
                ),
                "answer": "A",
                "alternative": [chr(65 + j) for j in range(1, len(of))],
            }
            for row, (of, _) in zip(rows, listed, strict=True)
        ]
        made_of = tokenize(letters, f"{name} ({FIELDS['choices']})")
        found["choices"] = [_letters([s.answer, *s.alternatives]) for s in made_of.samples]
        found["right"] = [right for _, right in listed]
    return DataRows(name, answers, texts, **found)


def _letters(choices: list[Tokens]) -> list[Tokens]:
    """The choices without what all of them end with, such as the token that ends an answer."""
    ids = [choice.input_ids.tolist() for choice in choices]
    end = next(i for i in range(1, min(map(len, ids)) + 1) if len({each[-i] for each in ids}) > 1)
    return [Tokens(c.input_ids[: len(c) + 1 - end], c.labels[: len(c) + 1 - end]) for c in choices]


def _with_answer(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose answer is a text, also where it is the number of a choice, as in WMDP."""
    answer, choices = row.get("answer"), row.get("choices")
    if isinstance(answer, int) and isinstance(choices, list | tuple) and answer < len(choices):
        return {**row, "answer": choices[answer]}
    return row


def prompt_length(sequence: Tokens) -> int:
    """Tokens that are put before what a model is to write."""
    labelled = (sequence.labels != IGNORE).nonzero().flatten()
    first = int(labelled[0])
    return first if first > 1 else min(_PROMPT, max(len(sequence) // 2, 1))


def _reader(metrics: Sequence[Metric], need: str) -> str:
    return next(str(metric) for metric in metrics if need in metric.wants())


def _present(
    rows: Sequence[Mapping[str, Any]], need: str, name: str, metrics: Sequence[Metric]
) -> bool:
    """Whether the rows have the field of a need; all do, or none."""
    field = FIELDS[need]
    has = [row.get(field) is not None for row in rows]
    if need == "choices":  # perturbed answers will do
        has = [
            h or row.get(FIELDS["perturbed"]) is not None for h, row in zip(has, rows, strict=True)
        ]
    if all(has):
        return True
    reader, missing = _reader(metrics, need), row_place(name, has.index(False))
    if any(has):
        raise InputError(
            f"{missing} has no '{field}', which metric {reader} reads and other rows have; give it "
            "to every row of the set, or to none"
        )
    if name == FORGET:
        raise InputError(
            f"{missing} has no '{field}', which metric {reader} reads; give data that has it, such "
            "as TOFU's forget01_perturbed.json, or leave the metric out"
        )
    if name == "retain":
        warnings.warn(
            f"retain has no '{field}', so that metric {reader} has no number there",
            GEffectWarning,
            stacklevel=2,
        )
    return False


def _texts(rows: Sequence[Mapping[str, Any]], need: str, name: str) -> list[list[str]]:
    """The texts in a field, one or a list of them, checked."""
    return [_listed(row[FIELDS[need]], need, row_place(name, i)) for i, row in enumerate(rows)]


def _listed(value: Any, need: str, place: str) -> list[str]:
    """One text or a list of them, as a list."""
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list | tuple) and all(isinstance(t, str) and t.strip() for t in texts)
    if not good or not texts:
        raise InputError(
            f"{place}: '{FIELDS[need]}' must be a non-empty text, or a list of such; got "
            f"{str(value)[:60]!r}"
        )
    return list(texts)


def _choices(row: Mapping[str, Any], place: str, number: int) -> tuple[list[str], int]:
    """A question's choices, and which of them is the answer.

    Where they are made of the answer and the perturbed ones, the answer's place follows from the
    row's number, so that no letter is right more often than others.
    """
    answer = str(row["answer"]).strip()
    if row.get("choices") is None:
        others = _listed(row[FIELDS["perturbed"]], "perturbed", place)
        at = number % (len(others) + 1)
        listed = [*others[:at], answer, *others[at:]]
    else:
        listed = [choice.strip() for choice in _listed(row["choices"], "choices", place)]
        if answer not in listed:
            raise InputError(
                f"{place}: its answer {answer[:40]!r} is none of its 'choices'; make it one of "
                "their texts"
            )
        at = listed.index(answer)
    if not 2 <= len(listed) <= _MOST_CHOICES:
        raise InputError(f"{place} has {len(listed)} 'choices'; give from 2 to {_MOST_CHOICES}")
    return listed, at
