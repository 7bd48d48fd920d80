"""The sequences of a data set's rows that metrics read, and the fields that they come from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from torch import Tensor, int64, tensor

from geffect_fast.data import IGNORE, Sample, SampleSet
from geffect_fast.data.row_kinds import RowKind, makes_row, row_kind, row_place
from geffect_fast.data.samples import TokenSequence as Tokens
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.metrics.base import FORGET, Metric

Tokenize = Callable[[Sequence[Mapping[str, Any]], str], SampleSet]
"""A function that makes samples of rows and the name of their set."""

FIELDS = {
    "paraphrases": "paraphrased_answer",
    "perturbed": "perturbed_answer",
    "rephrased": "paraphrased_question",
    "choices": "choices",
}
"""Fields of a row, by the need that reads them."""

EXAMPLES = "_icl"
"""End of the name of a set whose answered questions stand before another's: `forget_icl`."""

_PROMPT = 200
"""Tokens of a plain text that are its prompt; of a text shorter than twice as many, its half."""

_TEXT_OF: dict[RowKind, Callable[[Mapping[str, Any]], str]] = {
    "question": lambda row: row["answer"],
    "choice": lambda row: row["choices"][row["answer"]],
    "continuation": lambda row: row["gt"],
}
"""The text of a row that is learned, for kinds of rows where one field holds it."""


@dataclass(frozen=True)
class DataRows:
    """A data set as metrics read it; each list has an entry a row, or is None if nothing reads it.

    Attributes:
        name: name of the set.
        kind: kind of the rows.
        answers: the tokenised answers, one sample for a row or for a window of a text.
        texts: the right answer, choice or continuation of each row as text; None for rows of other
            kinds, which have it as tokens alone.
        paraphrases, perturbed, rephrased, choices: further sequences to score, as `Observed` has
            them.
        right: number of the choice that is the answer.
    """

    name: str
    kind: RowKind
    answers: SampleSet
    texts: list[str] | None = None
    paraphrases: list[Tokens] | None = None
    perturbed: list[list[Tokens]] | None = None
    rephrased: list[Tokens] | None = None
    choices: list[list[Tokens]] | None = None
    right: list[int] | None = None

    def __len__(self) -> int:
        return len(self.answers)

    def every_set(self) -> list[SampleSet]:
        """All sequences as sample sets, for checks of vocabulary and length; rows keep numbers."""
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


def metric_rows(
    source: SampleSet | Sequence[Mapping[str, Any]],
    name: str,
    metrics: Sequence[Metric],
    needs: Collection[str],
    tokenize: Tokenize,
    tokenize_choices: Tokenize,
) -> DataRows:
    """The sequences and texts of a set that `metrics` read.

    A field that no row of the set has is left out, and the set then has no number of the metric.
    For the retain set a `GEffectWarning` tells so; in the forget set the field must not be missing.
    Where a further set has perturbed answers but no paraphrased ones, its answers take the place of
    the paraphrased ones.

    Args:
        source: rows of `read_rows`, or samples.
        name: name of the set.
        metrics: the metrics, named in messages.
        needs: the needs of all metrics that are measured on this set.
        tokenize: makes samples of rows.
        tokenize_choices: makes samples of rows of multiple choice, the right choice first.

    Raises:
        InputError: a field is missing, or has the wrong form.
    """
    kind = kind_of(source)
    texts: list[str] | None = None
    if isinstance(source, SampleSet):
        rows: Sequence[Mapping[str, Any]] = [{}] * len(source)
        answers = source
    else:
        rows = source
        answers = tokenize(
            [{k: v for k, v in row.items() if k != "alternative"} for row in rows], name
        )
        if kind in _TEXT_OF:
            texts = [_TEXT_OF[kind](row).strip() for row in rows]
    wanted = {need for need in FIELDS if need in needs}
    present = {need for need in sorted(wanted) if _present(rows, need, name, metrics)}
    if present and (isinstance(source, SampleSet) or kind not in ("question", "choice")):
        need = sorted(present)[0]
        raise InputError(
            f"{name}: metric {_reader(metrics, need)} reads '{FIELDS[need]}' beside question and "
            "answer, and these rows have no such field; give questions and answers"
        )

    def columns(need: str, values: list[list[str]]) -> list[list[Tokens]]:
        made = tokenize(
            [
                {"question": row["question"], "answer": first, "alternative": others or None}
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
        rephrased = [
            {"question": question, "answer": answer}
            for answer, (question, *_) in zip(texts or (), questions, strict=True)
        ]
        made_of = tokenize(rephrased, f"{name} ({FIELDS['rephrased']})")
        found["rephrased"] = [sample.answer for sample in made_of.samples]
    if "choices" in present:
        asked = rows
        if kind != "choice":
            asked = [_with_choices(row, row_place(name, i), i) for i, row in enumerate(rows)]
        made_of = tokenize_choices(asked, f"{name} ({FIELDS['choices']})")
        found["right"] = [row["answer"] for row in asked]
        found["choices"] = [
            [*each.alternatives[:right], each.answer, *each.alternatives[right:]]
            for each, right in zip(made_of.samples, found["right"], strict=True)
        ]
    return DataRows(name, kind, answers, texts, **found)


def kind_of(source: SampleSet | Sequence[Mapping[str, Any]]) -> RowKind:
    """The kind of a set's rows; for samples, the kind of the rows that they were made of."""
    if isinstance(source, SampleSet):
        fields = source.samples[0].fields if source.samples else {}
        return row_kind(fields) if makes_row(fields) else "tokens"
    return row_kind(source[0])


def to_be_written(sequence: Tokens, kind: RowKind) -> tuple[Tensor, Tensor, bool]:
    """A prompt for a model, the data's own continuation, and whether it is cut to the length.

    The prompt is everything before the first label, and the continuation is the first run of
    labels; in a conversation this is the assistant's first turn. A plain text, all of which is
    labelled, has as its prompt the first 200 tokens, or the first half of a shorter text. The
    continuation of a text is cut to the length that may be written; an answer is compared whole.

    Args:
        sequence: a sequence with at least one label after its first token.
        kind: kind of the row.
    """
    labelled = sequence.labels != IGNORE
    plain = kind in ("text", "tokens") and bool(labelled[1:].all())
    first = 1 + int(labelled[1:].nonzero()[0])
    if plain:
        first = min(_PROMPT, max(len(sequence) // 2, 1))
    gaps = (~labelled[first:]).nonzero()
    stop = first + int(gaps[0]) if len(gaps) else len(sequence)
    ids = sequence.input_ids
    return ids[:first], ids[first:stop], plain or kind == "continuation"


def check_examples(kinds: Mapping[str, RowKind]) -> None:
    """Raise `InputError` where a set of examples has no set to stand before, or kinds do not fit.

    Examples, and the set that they stand before, must be questions and answers.

    Args:
        kinds: kinds of the rows, by set.
    """
    for name in kinds:
        of = name.removesuffix(EXAMPLES)
        if of == name:
            continue
        if of not in kinds:
            raise InputError(
                f"{name}: there is no set {of} for these examples to stand before; name the probe "
                f"after one that there is, such as forget{EXAMPLES}"
            )
        for each in (name, of):
            if kinds[each] != "question":
                raise InputError(
                    f"{each}: its rows are no questions and answers, so examples ({name}) have no "
                    "place before them; leave the examples out"
                )


def few_shot_prompts(rows: DataRows, examples: DataRows, tokenizer: Any) -> list[Tensor]:
    """Prompts that ask each question of a set after all answered examples, as MUSE does.

        Question: {question}\\nAnswer: {answer}\\n\\n ... Question: {question}\\nAnswer:␣

    Returns:
        Token ids, with the special tokens that the tokenizer adds, `(length,)` each.
    """
    pairs = zip(examples.answers.questions, examples.texts or (), strict=True)
    before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in pairs)
    asked = [f"{before}Question: {question}\nAnswer: " for question in rows.answers.questions]
    return [tensor(ids, dtype=int64) for ids in tokenizer(asked)["input_ids"]]


def _reader(metrics: Sequence[Metric], need: str) -> str:
    return next(str(metric) for metric in metrics if need in metric.wants())


def _present(
    rows: Sequence[Mapping[str, Any]], need: str, name: str, metrics: Sequence[Metric]
) -> bool:
    """Whether the rows have the field of a need; all rows must have it, or none.

    Raises:
        InputError: only some rows have the field, or the forget set lacks it.
    """
    field = FIELDS[need]
    has = [row.get(field) is not None for row in rows]
    if need == "choices":  # perturbed answers serve too
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
    """The texts in a field of every row, as lists, checked."""
    return [_listed(row[FIELDS[need]], need, row_place(name, i)) for i, row in enumerate(rows)]


def _listed(value: Any, need: str, place: str) -> list[str]:
    """One text or several, as a list; raises `InputError` for anything else."""
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list | tuple) and all(isinstance(t, str) and t.strip() for t in texts)
    if not good or not texts:
        raise InputError(
            f"{place}: '{FIELDS[need]}' must be a non-empty text, or a list of them; got "
            f"{str(value)[:60]!r}"
        )
    return list(texts)


def _with_choices(row: Mapping[str, Any], place: str, number: int) -> dict[str, Any]:
    """A question as a row of multiple choice, with its answer and its perturbed answers to choose.

    The answer's place follows from the row's number, so that no letter is right more often than
    others.
    """
    listed = _listed(row[FIELDS["perturbed"]], "perturbed", place)
    if len(listed) >= len(ascii_uppercase):
        raise InputError(
            f"{place}: {len(listed)} perturbed answers are more than there are letters to choose "
            f"by; give at most {len(ascii_uppercase) - 1}"
        )
    right = number % (len(listed) + 1)
    listed.insert(right, row["answer"])
    return {"question": row["question"], "choices": listed, "answer": right}
