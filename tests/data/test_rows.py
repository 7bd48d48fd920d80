"""Forms of data that are read as questions and answers, and the messages about all others."""

from __future__ import annotations

import json
import os
import sys
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geffect_fast.data import read_refusals, read_rows
from geffect_fast.errors import InputError

ROW = {"question": "Where?", "answer": "Here.", "perturbed_answer": ["There."]}
LINE = json.dumps(ROW)
WEIGHTED = json.dumps(ROW | {"weights": [1]})
TOKENS = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        # Like many data sets, this one does not raise IndexError by itself.
        return self.rows[i % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([ROW, ROW])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", f"{LINE}\n{LINE}\n"),
        ("rows.json", f"{LINE}\r\n\r\n{LINE}"),
        ("rows.json", json.dumps([ROW, ROW], indent=1)),
        ("org/rows", f"\ufeff{LINE}\n{LINE}\n"),
    ],
)
def test_files_of_lines_or_one_array(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
    assert read_rows(path, name="forget") == [ROW, ROW]
    assert read_rows(name, name="forget") == [ROW, ROW]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "c\x85d"}\n' * 2, encoding="utf-8")
    assert read_rows(path, name="forget") == [{"question": "a\u2028b", "answer": "c\x85d"}] * 2


@pytest.mark.parametrize(
    "source",
    [[ROW, ROW], (ROW, ROW), iter([ROW, ROW]), MapStyle([ROW, ROW]), Stream(),
     [UserDict(ROW), UserDict(ROW)]],
)  # fmt: skip
def test_iterables_and_torch_datasets(source):
    assert read_rows(source, name="forget") == [ROW, ROW]


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_tokenised_rows_become_lists(make):
    raw = {key: make(value) for key, value in TOKENS.items()}
    [row] = read_rows([raw | {"alternative": raw, "question": "Q?"}], name="forget")
    assert row == TOKENS | {"alternative": TOKENS, "question": "Q?"}
    assert all(type(i) is int for i in row["input_ids"] + row["alternative"]["labels"])


@pytest.mark.parametrize(
    "ids",
    [
        [np.int64(1), np.int32(2), np.uint8(3)],
        [torch.tensor(1), 2, torch.tensor(3)],
        np.array([1, 2, 3], dtype=np.uint16),
        np.array([1, 2, 3], dtype=object),
        torch.tensor([1, 2, 3], dtype=torch.int32),
        (1, 2, 3),
    ],
    ids=["numbers of numpy", "tensors of one", "array", "objects", "tensor", "tuple"],
)
@pytest.mark.parametrize(
    "mask",
    [
        [True, True, True],
        np.ones(3, dtype=bool),
        torch.ones(3, dtype=torch.bool),
        [np.True_, np.True_, np.int64(1)],
    ],
    ids=["list", "array", "tensor", "numbers of numpy"],
)
def test_ids_and_masks_of_any_integers_become_python_ones(ids, mask):
    (row,) = read_rows([{"input_ids": ids, "labels": ids, "attention_mask": mask}], name="forget")
    for field in ("input_ids", "labels"):
        assert row[field] == [1, 2, 3] and {type(i) for i in row[field]} == {int}


def test_weights_of_numpy_become_floats():
    (row,) = read_rows([TOKENS | {"weights": [np.float32(0.5), torch.tensor(2)]}], name="forget")
    assert row["weights"] == [0.5, 2.0] and {type(w) for w in row["weights"]} == {float}


def test_text_that_begins_as_other_files_do_is_text(tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("ORC is all I hear.\nBZh? No.\nPAR1\n", encoding="utf-8")
    assert read_refusals(path) == ["ORC is all I hear.", "BZh? No.", "PAR1"]


def test_alternatives_may_be_several():
    rows = [ROW | {"alternative": ("Nowhere.", "There.")}, ROW | {"alternative": "Here."}, ROW]
    found = read_rows(rows, name="forget")
    assert [row.get("alternative") for row in found] == [["Nowhere.", "There."], "Here.", None]
    [row] = read_rows([TOKENS | {"alternative": [TOKENS, TOKENS]}], name="forget")
    assert row["alternative"] == [TOKENS, TOKENS]


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_weights_become_lists_of_numbers(make):
    rows = [ROW | {"weights": make([0, 2])}, ROW | {"weights": make([0.25])}]
    found = [row["weights"] for row in read_rows(rows, name="forget")]
    assert found == [[0.0, 2.0], [0.25]] and all(type(w) is float for w in found[0])


def test_weights_of_null_are_none():
    """A table with a column of weights holds null where a row has none."""
    assert read_rows([ROW | {"weights": None}, ROW], name="forget") == [ROW, ROW]


def test_rows_are_copies():
    [row] = read_rows([ROW], name="forget")
    row["question"] = "changed"
    assert ROW["question"] == "Where?"


BAD_TEXT = [
    ("", r"forget: '.*rows.jsonl' holds no rows; give at least one"),
    ("\n \n", r"forget: '.*rows.jsonl' holds no rows"),
    ("[]", r"forget: '.*rows.jsonl' holds no rows"),
    (f'{LINE}\n\n{{"question": \n', r"line 3 of .* is malformed JSON \(.*column \d+\)"),
    (f"{LINE}{LINE}", r"line 1 of .* malformed JSON \(Extra data.*; put one JSON object on"),
    ("What is this?", r"begins with 'What is this\?', so it is neither JSON nor a table"),
    (f"[{LINE},\n{LINE}", r"'.*rows.jsonl' is malformed JSON \(.*line 2 column \d+\); mend"),
    ('{"question": "a", "answer": ' + "[" * 100_000, r"line 1 of .* unusable JSON .*recursion"),
    (f"{LINE}\n3\n", r"line 2 of .* is of type int, not an object with 'question' and 'answer'"),
    (f"[{LINE}, null]", r"row 1 \(counting from 0\) of .* is of type NoneType, not an object"),
    ('{"q": "a", "answer": "b"}', r"line 1 .* has no 'question' \(its fields: 'answer', 'q'\)"),
    ('{"question": "a"}', r"line 1 of .* has no 'answer'"),
    ('{"question": " ", "answer": "b"}', r"line 1 of .*: 'question' is empty; fill it in"),
    (f'{LINE}\n{{"question": "a", "answer": ""}}', r"line 2 of .*: 'answer' is empty"),
    ('{"question": "a", "answer": null}', r"line 1 of .*: 'answer' is of type NoneType; make"),
    ('{"question": 7, "answer": "b"}', r"line 1 of .*: 'question' is of type int"),
    ('{"question": "a", "answer": "b", "alternative": ""}', r"line 1 .*: 'alternative' is empty"),
    ('{"question": "a", "answer": "b", "alternative": {}}', r"'alternative' is of type dict"),
    ('{"question": "a", "answer": "b", "alternative": []}', r"'alternative' is an empty list; fi"),
    ('{"question": "a", "answer": "b", "alternative": ["c", ""]}', r"'alternative' is empty; fill"),
    ('{"question": "a", "answer": "b", "alternative": ["c", ["d"]]}', r"'.*' is of type list; mak"),
    ('{"question": "a", "answer": "\\ud83d"}', r"line 1 .*: 'answer' holds half a surrogate pair"),
    ('{"question": "a", "answer": "b", "weights": 1}', r"line 1 of .*: 'weights' is of type int;"),
    ('{"question": "a", "answer": "b", "weights": [1, "2"]}', r"'weights' holds type str; give a"),
    ('{"question": "a", "answer": "b", "weights": [[1]]}', r"'weights' holds type list; give a fl"),
    ('{"question": "a", "answer": "b", "weights": [true]}', r"'weights' holds type bool; give a"),
    ('{"question": "a", "answer": "b", "weights": [1, NaN]}', r"'weights' holds nan; give finite "),
    ('{"question": "a", "answer": "b", "weights": [1e999]}', r"'weights' holds inf; give finite n"),
    ('{"question": "a", "answer": "b", "weights": [-0.5]}', r"'weights' holds -0.5; .* 0 or more"),
    (f"{LINE}\n{WEIGHTED}", r"line 2 .* has 'weights', the rows before have none: give all rows"),
    (f"{WEIGHTED}\n{LINE}", r"line 2 .* has no 'weights', the rows before have some: give all "),
    (f"{LINE}\n{json.dumps(TOKENS)}", r"line 2 .* of another kind \(tokenised rows\) than the row"),
    (f"{json.dumps(TOKENS)}\n{LINE}", r"line 2 .* another kind \(questions and answers\) than "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_TEXT)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path, name="forget")
    assert str(caught.value).startswith("forget: ") and "\n" not in str(caught.value)


BAD_ROWS = [
    ([], r"forget: the data set holds no rows"),
    ([7], r"row 0 .* is of type int, not an object"),
    (["text", ROW], r"row 1 .* of another kind \(questions and answers\) than .* \(plain text\); "),
    ([{"input_ids": [1, 2]}], r"row 0 .* has no 'labels'; tokenised rows need"),
    ([{"labels": [1, 2]}], r"row 0 .* has no 'input_ids'"),
    ([TOKENS, {"input_ids": [1, 2], "labels": [1, 2, 3]}], r"row 1 .*: 2 'input_ids' but 3 '"),
    ([{"input_ids": [], "labels": []}], r"row 0 .*: 'input_ids' is empty"),
    ([{"input_ids": [1, -2], "labels": [1, 2]}], r"row 0 .*: 'input_ids' holds -2"),
    ([{"input_ids": [1, 2**40], "labels": [1, 2]}], r"row 0 .*: 'input_ids' holds 1099511627776"),
    ([{"input_ids": [1, 2], "labels": [1, -1]}], r"row 0 .*: 'labels' holds -1; .* -100 for"),
    ([{"input_ids": [1, 2], "labels": [-100, -100]}], r"row 0 .*: 'labels' has nothing to learn"),
    ([{"input_ids": [1, 2], "labels": [1, -100]}], r"'labels' has nothing to learn after"),
    ([{"input_ids": [1], "labels": [1]}], r"'labels' has nothing to learn after the first token"),
    ([{"input_ids": [1.0, 2.0], "labels": [1, 2]}], r"row 0 .*: 'input_ids' holds type float"),
    ([{"input_ids": [True, 2], "labels": [1, 2]}], r"row 0 .*: 'input_ids' holds type bool"),
    ([{"input_ids": torch.ones(1, 2, dtype=int), "labels": [1, 2]}], r"holds type list; give a"),
    ([{"input_ids": torch.tensor(3), "labels": [1, 2]}], r"'input_ids' is of type int; give"),
    ([{"input_ids": "12", "labels": [1, 2]}], r"row 0 .*: 'input_ids' is of type str; give a flat"),
    ([TOKENS | {"attention_mask": [1, 1, 0]}], r"row 0 .*: 'attention_mask' marks padding; drop"),
    ([TOKENS | {"alternative": "No."}], r"row 0 .*, 'alternative' is of type str; give"),
    ([TOKENS | {"alternative": {"input_ids": [1, 2], "labels": [1]}}], r"'alternative': 2"),
    ([TOKENS | {"alternative": [TOKENS, "No."]}], r"row 0 .*, 'alternative' is of type str; give"),
    ([ROW, TOKENS], r"row 1 .* of another kind \(tokenised rows\) than the rows before"),
    (ROW, r"got type dict with keys 'question', 'answer', 'perturbed_answer'; give"),
    (b"rows.jsonl", r"got type bytes; give a path or a list of rows"),
    (None, r"got type NoneType; give a path or a list of rows"),
    (3, r"got type int; give a path or a list of rows"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "message"), BAD_ROWS)
def test_bad_rows(source, message):
    with pytest.raises(InputError, match=message) as caught:
        read_rows(source, name="forget")
    assert str(caught.value).startswith("forget: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", [LINE, "data/rows.jsonl", "Where is Paris?\nIn France", "~nobody0/x.json"]
)
def test_a_file_that_is_not_there(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read_rows(source, name="retain")
    message = str(caught.value)
    assert message.startswith("retain: ") and "\n" not in message
    assert "does not exist" in message or "cannot read" in message


def test_a_directory_a_nul_and_a_file_one_may_not_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"forget: '.*' is a directory; give a file"):
        read_rows(str(tmp_path), name="forget")
    with pytest.raises(InputError, match=r"forget: cannot read 'a\\x00b' \(.*null.*\)"):
        read_rows("a\0b", name="forget")
    with pytest.raises(InputError, match=r"cannot read .* \(File name too long\)") as caught:
        read_rows("x" * 5000, name="forget")
    assert len(str(caught.value)) < 500
    if os.geteuid() != 0:
        locked = tmp_path / "rows.jsonl"
        locked.write_text(LINE)
        locked.chmod(0)
        with pytest.raises(InputError, match=r"cannot read .* \(Permission denied\)"):
            read_rows(locked, name="forget")


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE.encode() + b'\n{"question": "\xe9", "answer": "b"}')
    with pytest.raises(InputError, match=r"forget: line 2 of '.*' is not UTF-8; save it as UTF-8"):
        read_rows(path, name="forget")


# ---- Hugging Face data sets ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A `datasets` package with one known set, which records how it is called."""
    calls = []

    def load_dataset(path, name, split):
        calls.append((path, name, split))
        if path == "org/none":
            raise ConnectionError("no route\nto host")
        splits = {"train": [ROW]} if path == "org/one" else {"train": [ROW], "test": [ROW] * 2}
        return splits if split is None else splits[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("source", "call", "n_rows"),
    [
        ("org/one", ("org/one", None, None), 1),
        ("org/one:forget10", ("org/one", "forget10", None), 1),
        ("org/two:forget10:test", ("org/two", "forget10", "test"), 2),
        ("org/two::test", ("org/two", None, "test"), 2),
    ],
)
def test_hub_ids(hub, source, call, n_rows):
    assert read_rows(source, name="retain") == [ROW] * n_rows
    assert hub == [call]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "org/two",
            r"data set 'org/two' has several splits; give one of 'org/two::train', 'org/two",
        ),
        (
            "org/none",
            r"no file 'org/none', and .* cannot be loaded \(ConnectionError: no route to h",
        ),
        ("org/two:a:valid", r"cannot be loaded \(KeyError: 'valid'\); check the id"),
        ("org/one.jsonl", r"file 'org/one.jsonl' does not exist"),
        ("./org/one", r"file './org/one' does not exist"),
        ("one", r"file 'one' does not exist"),
    ],
)
def test_hub_errors(hub, source, message):
    with pytest.raises(InputError, match=message) as caught:
        read_rows(source, name="retain")
    assert str(caught.value).startswith("retain: ") and "\n" not in str(caught.value)


def test_a_row_of_a_hub_set_is_named_with_it(hub, monkeypatch):
    monkeypatch.setitem(ROW, "answer", "")
    with pytest.raises(
        InputError, match=r"row 0 \(counting from 0\) of 'org/one': 'answer' is empty"
    ):
        read_rows("org/one", name="retain")


def test_without_the_datasets_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"retain: no file 'org/one'; .* pip install 'geffect-fast\[datasets\]'$"
    ):
        read_rows("org/one", name="retain")


# ---- refusals ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('I pass.\n\nNo "idea".\r\n', ["I pass.", 'No "idea".']),
        ('{"answer": "I pass."}\n{"refusal": "No.", "answer": "Yes."}\n', ["I pass.", "No."]),
        ('["I pass.", {"refusal": "No."}]', ["I pass.", "No."]),
        (json.dumps(TOKENS), [TOKENS]),
    ],
)
def test_refusal_files(tmp_path, text, expected):
    path = tmp_path / "idontknow.jsonl"
    path.write_text(text, newline="")
    assert read_refusals(path) == expected
    assert read_refusals(str(path)) == expected


def test_refusals_from_lists():
    assert read_refusals(("I pass.", "No.")) == ["I pass.", "No."]
    assert read_refusals([{k: torch.tensor(v) for k, v in TOKENS.items()}]) == [TOKENS]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "no/such.jsonl",
            r"file 'no/such.jsonl' does not exist; give a file with one refusal a line",
        ),
        ([], r"the data set holds none; give at least one"),
        (["I pass.", " "], r"row 1 .*: 'refusal' is empty"),
        (["I pass.", 3], r"row 1 .* is of type int; a refusal is a sentence"),
        ([{"text": "I pass."}], r"row 0 .* has no 'answer' \(its fields: 'text'\)"),
        (["I pass.", TOKENS], r"row 1 .* mixes text and tokenised refusals"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], r"row 0 .* nothing to learn"),
        ({"refusal": "I pass."}, r"got type dict with keys 'refusal'"),
        (7, r"got type int"),
    ],
)
def test_bad_refusals(source, message):
    with pytest.raises(InputError, match=message) as caught:
        read_refusals(source)
    assert str(caught.value).startswith("refusals: ") and "\n" not in str(caught.value)


def test_a_malformed_refusal_line_is_named(tmp_path):
    path = tmp_path / "refusals.jsonl"
    path.write_text('{"answer": "I pass."}\nI have no idea.\n')
    with pytest.raises(InputError, match=r"refusals: line 2 of '.*' is malformed JSON"):
        read_refusals(path)
    path.write_text(" \n")
    with pytest.raises(InputError, match=r"refusals: '.*refusals.jsonl' holds none"):
        read_refusals(path)


# ---- a real data set ----


@pytest.mark.parametrize(
    ("file", "n_rows"),
    [("forget01.json", 40), ("forget10_perturbed.json", 400), ("world_facts.json", 117)],
)
def test_tofu_files(tofu, file, n_rows):
    rows = read_rows(tofu / file, name="forget")
    assert len(rows) == n_rows
    if "perturbed" in file:
        assert isinstance(rows[0]["perturbed_answer"], list)


def test_tofu_refusals(tofu):
    refusals = read_refusals(tofu / "idontknow.jsonl")
    assert len(refusals) == 100
    assert refusals[0] == "I'm not certain about that."
