"""Plain text and its windows, continuations, and multiple choice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from geffect_fast.data import IGNORE, make_batches, read_rows, tokenize_choices, tokenize_rows
from geffect_fast.data.samples import check_positions, check_vocabulary
from geffect_fast.errors import InputError

TEXT = "  Mara Lund lives in Paris.\n\nJonas Ek lives in Pisa, né à Porto 🦜; Ida Brun too. " * 7


def windows(rows, tokenizer, length, **more):
    rows = read_rows(rows, name="retain")
    return tokenize_rows(rows, tokenizer, name="retain", max_length=length, **more).samples


@pytest.mark.parametrize("length", [2, 3, 7, 40, 10_000])
@pytest.mark.parametrize("kind", ["plain_tokenizer", "metaspace_tokenizer", "merging_tokenizer"])
def test_every_token_of_a_text_is_a_label_once(request, kind, length):
    """No token is lost between windows: the labels of all windows in turn are the text."""
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    samples = windows([TEXT], tokenizer, length)
    begins = tokenizer.bos_token_id is not None
    labelled = [label for s in samples for label in s.answer.labels.tolist() if label != IGNORE]
    assert labelled == ids
    for s in samples:
        own, labels = s.answer.input_ids.tolist(), s.answer.labels.tolist()
        assert 2 <= len(own) <= length
        assert [label for label in labels if label != IGNORE] == own[labels.count(IGNORE) :]
    assert all(len(s.answer) == length for s in samples[:-1])  # no window is shorter than allowed
    # All tokens are predicted but the first, where the tokenizer begins texts with nothing.
    assert sum(s.answer.n_targets for s in samples) == len(ids) - (not begins)
    for before, after in pairwise(samples):
        first = tokenizer.bos_token_id if begins else before.answer.input_ids[-1]
        assert after.answer.input_ids[0] == first and after.answer.labels[0] == IGNORE
    assert [s.window_of for s in samples] == [(0, k) for k in range(len(samples))]


def test_windows_of_several_texts_are_rows_of_the_set(plain_tokenizer):
    rows = [{"text": TEXT, "source": "news"}, {"text": "Short one."}]
    samples = windows(rows, plain_tokenizer, 50)
    n_first = sum(s.window_of[0] == 0 for s in samples)
    assert n_first > 2 and samples[n_first].window_of == (1, 0)
    assert [s.row for s in samples] == [s.data_row for s in samples] == list(range(len(samples)))
    assert samples[1].fields == rows[0] and samples[-1].fields == rows[1]
    assert samples[1].place("retain") == "retain: row 0 (counting from 0), window 1"


@pytest.mark.parametrize(
    ("check", "said"),
    [(check_vocabulary, "its answer holds token id"), (check_positions, "its answer sequence has")],
)
def test_errors_name_the_window(plain_tokenizer, check, said):
    rows = read_rows([TEXT], name="retain")
    found = tokenize_rows(rows, plain_tokenizer, name="retain", max_length=50)
    with pytest.raises(InputError) as refused:
        check(found, 1)
    assert f"retain: row 0 (counting from 0), window 0: {said}" in str(refused.value)


def test_windows_without_a_length(plain_tokenizer):
    n_tokens = len(plain_tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    (whole,) = windows([TEXT], plain_tokenizer, None)
    assert len(whole.answer) == n_tokens < 2048
    longest = [len(s.answer) for s in windows([TEXT * 60], plain_tokenizer, None)]
    assert set(longest[:-1]) == {2048}
    assert max(len(s.answer) for s in windows([TEXT], plain_tokenizer, None, window=64)) == 64
    for asked, positions in ((None, 32), (100, 32), (16, 32), (4000, None)):
        cut = windows([TEXT * 9], plain_tokenizer, asked, n_positions=positions)
        most = max(len(s.answer) for s in cut)
        assert most == min(asked or 2048, positions or 10**6, 9 * n_tokens)


def test_weights_of_a_text_go_to_its_windows(plain_tokenizer):
    n_tokens = len(plain_tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    weights = [i / 8 for i in range(n_tokens)]
    samples = windows([{"text": TEXT, "weights": weights}], plain_tokenizer, 20)
    given = [s.answer.weights[s.answer.labels != IGNORE] for s in samples]
    assert torch.cat(given).tolist() == weights
    with pytest.raises(InputError, match=rf"row 0 .*: 2 'weights' for the {n_tokens} label tokens"):
        windows([{"text": TEXT, "weights": [1, 2]}], plain_tokenizer, 20)


def test_texts_of_every_kind_of_file(tmp_path: Path):
    texts = ["Once there was.", "And then."]
    contents = {
        "forget.json": json.dumps(texts),  # as MUSE's data
        "forget.jsonl": "\n".join(json.dumps({"text": text}) for text in texts),
        "forget.csv": "id,text\n1,Once there was.\n2,And then.\n",
        "forget.data": json.dumps({"texts": texts, "n": 2}, indent=1),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        rows = read_rows(tmp_path / name, name="forget")
        assert [row["text"] for row in rows] == texts
    for name in ("forget.txt", "forget.md", "chapter"):
        for text in ("\n".join(texts), "the end", "1, 2 and 3"):
            (tmp_path / name).write_text(text)
            assert read_rows(tmp_path / name, name="forget") == [{"text": text}]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([TEXT], {"refusals": ["No."]}, "row 0 .* is plain text, which no refusal or alternative"),
        ([{"text": "a", "alternative": "b"}], {}, "row 0 .* is plain text, which no refusal or"),
        ([TEXT], {"max_length": 1}, "max_length: 1 leaves a window of text no token to predict;"),
        ([TEXT], {"tokenizer": None}, "row 0 .* is text; give a tokenizer"),
        (["a"], {}, "row 0 .* has no token to learn after a first one; leave it out"),
    ],
)
def test_texts_that_are_refused(plain_tokenizer, rows, arguments, message):
    rows = read_rows(rows, name="forget")
    with pytest.raises(InputError, match=message):
        tokenize_rows(rows, **{"tokenizer": plain_tokenizer, "name": "forget"} | arguments)


# ---- continuations ----


@pytest.mark.parametrize(
    ("prompt", "gt"), [("Mara Lund", "lives"), ("Mara Lund ", "lives"), ("Mara Lund", " lives")]
)
def test_a_continuation_is_learned_behind_its_beginning(metaspace_tokenizer, prompt, gt):
    rows = read_rows([{"prompt": prompt, "gt": gt, "alternative": "is in Pisa"}], name="forget")
    [sample] = tokenize_rows(rows, metaspace_tokenizer, name="forget").samples
    ids = metaspace_tokenizer("Mara Lund lives", add_special_tokens=False)["input_ids"]
    assert sample.answer.input_ids.tolist() == [metaspace_tokenizer.bos_token_id, *ids]
    labels = sample.answer.labels
    assert metaspace_tokenizer.decode(labels[labels != IGNORE]).strip() == "lives"
    assert sample.question == prompt and sample.fields["gt"] == gt
    [other] = sample.alternatives
    assert metaspace_tokenizer.decode(other.labels[other.labels != IGNORE]).strip() == "is in Pisa"


# ---- multiple choice ----

CHOICE = {"question": "Where is Oslo?", "choices": ["Italy", "Norway", "Peru"], "answer": 1}


def test_multiple_choice_however_it_is_written(tmp_path):
    mmlu = 'Where is Oslo?,Italy,Norway,Peru,"Chad, I think",B\nWho?,a,b,c,d,D\n'
    (tmp_path / "test.csv").write_text(mmlu)
    first, second = read_rows(tmp_path / "test.csv", name="choices")
    assert first["choices"] == ["Italy", "Norway", "Peru", "Chad, I think"]
    assert (first["answer"], second["answer"], second["question"]) == (1, 3, "Who?")
    (tmp_path / "test.csv").write_text("question,A,B,C,D,answer,subject\nWho?,a,b,c,d,D,x\n")
    [row] = read_rows(tmp_path / "test.csv", name="choices")
    assert row["choices"] == list("abcd") and row["answer"] == 3 and row["subject"] == "x"
    for answer in (1, "B", "b", "1", "Norway", 1.0, torch.tensor(1)):
        [row] = read_rows([CHOICE | {"answer": answer, "subject": "x"}], name="choices")
        assert row == CHOICE | {"subject": "x"}
        assert read_rows([row], name="choices") == [row]
    [row] = read_rows([CHOICE | {"choices": json.dumps(CHOICE["choices"])}], name="choices")
    assert row == CHOICE
    assert read_rows(pa.Table.from_pylist([CHOICE]), name="choices") == [CHOICE]


def test_the_right_choice_is_what_is_trained_on(plain_tokenizer):
    rows = read_rows([CHOICE], name="forget")
    asked = [{"question": CHOICE["question"], "answer": "Norway"}]
    [one] = tokenize_rows(rows, plain_tokenizer, name="forget", refusals=["No."]).samples
    [other] = tokenize_rows(asked, plain_tokenizer, name="forget", refusals=["No."]).samples
    for ours, theirs in ((one.answer, other.answer), (one.alternatives[0], other.alternatives[0])):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.labels.tolist() == theirs.labels.tolist()
    assert one.fields == CHOICE and one.question == CHOICE["question"]


@pytest.mark.parametrize("kind", ["plain_tokenizer", "chat_tokenizer"])
@pytest.mark.parametrize("form", ["letters", "texts"])
def test_choices_to_choose_from(request, kind, form):
    tokenizer = request.getfixturevalue(kind)
    rows = read_rows([CHOICE, CHOICE | {"answer": 2}], name="choices")
    found = tokenize_choices(rows, tokenizer, name="choices", form=form)
    listed = "Where is Oslo?\nA. Italy\nB. Norway\nC. Peru\nAnswer:"
    for row, sample in zip(rows, found.samples, strict=True):
        sequences = [*sample.alternatives]
        sequences.insert(row["answer"], sample.answer)
        for k, sequence in enumerate(sequences):
            said = "ABC"[k] if form == "letters" else CHOICE["choices"][k]
            learned = tokenizer.decode(sequence.labels[sequence.labels != IGNORE])
            assert learned.strip() == said  # and no end-of-sequence token
            whole = tokenizer.decode(sequence.input_ids)
            assert whole.endswith(said) and (listed in whole) == (form == "letters")
            if form == "letters" and kind == "plain_tokenizer":
                assert whole == f"{listed} {said}"  # as MMLU and WMDP ask their questions
        assert sample.fields == row
    batches = make_batches(found, ("answer", "alternative"), token_budget=10_000)
    assert sum(len(batch.roles) for batch in batches) == 6


def test_choices_of_other_rows_are_refused(plain_tokenizer):
    rows = read_rows([{"question": "q", "answer": "a"}], name="choices")
    with pytest.raises(
        InputError, match=r"row 0 .* has no 'choices'; give rows of multiple choice"
    ):
        tokenize_choices(rows, plain_tokenizer, name="choices")


def test_fields_go_along(plain_tokenizer):
    tofu = {"question": "Q?", "answer": "A.", "perturbed_answer": ["B."], "id": 3}
    rows = read_rows([tofu | {"alternative": "No."}], name="forget")
    found = tokenize_rows(rows, plain_tokenizer, name="forget")
    assert found.samples[0].fields == tofu
    assert found.part([0]).samples[0].fields == tofu
    tokens = {"input_ids": [1, 2], "labels": [1, 2], "weights": [1.0, 2.0], "id": 4}
    [sample] = tokenize_rows(read_rows([tokens], name="forget"), None, name="forget").samples
    assert sample.fields == {"id": 4}
