"""Damage anywhere in a file or a table gives one line that names file, row, field and remedy."""

from __future__ import annotations

import gzip
import json
import sys

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geffect_fast.data import read_rows
from geffect_fast.errors import InputError

ROW = {"question": "Who?", "answer": "She."}
LINE = json.dumps(ROW)
USER, SHE = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}
CHOICE = {"question": "Which?", "choices": ["red", "blue"], "answer": 1}


def lines(*rows, at=None, odd=None):
    """JSON lines of 40 good rows, or of the given rows; `odd` takes the place of line `at`."""
    several = [json.dumps(row) for row in rows or [ROW] * 40]
    if at is not None:
        several[at - 1] = odd if isinstance(odd, str) else json.dumps(odd)
    return "\n".join(several).encode()


def parquet(*rows):
    found = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), found)
    return found.getvalue().to_pybytes()


def turns(*each, field="messages"):
    return lines({field: list(each)})


MMLU = "What is 1+1?,1,2,3,4,B\nWhat is 2+2?,1,2,3,4,D\n"
PACKED = gzip.compress(b"\n".join([lines()] * 50))

CASES = {
    # ---- files ----
    "an empty file": ("rows.jsonl", b"", "'{}' holds no rows; give at least one"),
    "an empty gzip": ("rows.jsonl.gz", gzip.compress(b""), "'{}' holds no rows"),
    "an empty text": ("rows.txt", b" \n", "'{}' holds no rows"),
    "a torn gzip": ("rows.jsonl.gz", PACKED[:-30], "'{}' is a damaged gzip (.*); fetch it again"),
    "a gzip of one byte less": ("a.json", PACKED[:-1], "'{}' is a damaged gzip (.*); fetch it"),
    "a gzip with a changed byte": (
        "rows.gz",
        PACKED[:-8] + bytes([PACKED[-8] ^ 255]) + PACKED[-7:],
        "'{}' is a damaged gzip (.*); fetch it again",
    ),
    "Latin-1 in line 37": (
        "rows.jsonl",
        lines(at=37, odd=json.dumps({"question": "Où?", "answer": "là"}, ensure_ascii=False)
              ).decode().encode("latin-1"),
        "line 37 of '{}' is not UTF-8; save it as UTF-8",
    ),
    "Latin-1 in a list": (
        "rows.json", b'[\n{"question": "O\xf9?",\n "answer": "a"}]',
        "line 2 of '{}' is not UTF-8; save it as UTF-8",
    ),
    "Latin-1 in a table": (
        "rows.csv", b"question,answer\nWho?,She.\nO\xf9?,Here.\n",
        "line 3 of '{}' is not UTF-8; save it as UTF-8",
    ),
    "Latin-1 in a text": (
        "rows.txt", b"One.\nTwo.\nO\xf9.\n", "line 3 of '{}' is not UTF-8; save it as UTF-8",
    ),
    "half of a letter in a gzip": (
        "rows.jsonl", gzip.compress(lines() + b'\n{"question": "\xe2\x82'),
        "line 41 of '{}' is not UTF-8",
    ),
    # ---- JSON ----
    "a torn line 37": (
        "rows.jsonl", lines(at=37, odd='{"question": "Who?", "ans'),
        r"line 37 of '{}' is malformed JSON \(Unterminated .* column \d+\); put one JSON object on",
    ),
    "lines called JSON": (
        "rows.json", lines(at=2, odd="{'question': 1}"), "line 2 of '{}' is malformed JSON",
    ),
    "a row of another kind in line 37": (
        "rows.jsonl", lines(at=37, odd={"text": "Once."}),
        r"line 37 of '{}' is of another kind \(plain text\) than the rows before \(questions and ",
    ),
    "a list of mixed kinds": (
        "rows.json", json.dumps([ROW, "Once."]).encode(),
        r"row 1 \(counting from 0\) of '{}' is of another kind \(plain text\) than .*; use one kin",
    ),
    "a number among texts": (
        "rows.json", b'["Once.", 7]', r"row 1 .* of '{}' is of type int, not an object",
    ),
    "a list without its end": (
        "rows.json", b'[\n{"question": "q", "answer": "a"}\n',
        r"'{}' is malformed JSON \(Expecting ',' delimiter, line 3 column 1\); mend the JSON array",
    ),
    "a comma too few": (
        "rows.json", b'[\n{"question": "q", "answer": "a"}\n{"question": "q", "answer": "a"}]',
        r"'{}' is malformed JSON \(Expecting ',' delimiter, line 3 column 1\)",
    ),
    "more after a list": (
        "rows.json", b'[{"question": "q", "answer": "a"}]\n]',
        r"'{}' is malformed JSON \(Extra data, line 2 column 1\)",
    ),
    "a quote too few in a long list": (
        "rows.json", json.dumps([ROW] * 400, indent=1).replace('"She."', '"She.', 300).encode(),
        r"'{}' is malformed JSON \(Invalid control character at, line 4 column \d+\); mend",
    ),
    "an object of columns": (
        "rows.json", json.dumps({"question": ["q"] * 2, "answer": ["a"] * 2}).encode(),
        r"'question' is of type list; make it a string",
    ),
    "an object with two lists": (
        "rows.json", json.dumps({"train": [ROW], "test": [ROW]}, indent=1).encode(),
        r"'{}' is one object with several lists \('train', 'test'\); keep the one list of rows",
    ),
    "an object with no list": (
        "rows.json", json.dumps({"version": 1, "of": {}}, indent=1).encode(),
        r"'{}' is one object with no list of rows \(its fields: 'version', 'of'\)",
    ),
    "a bad row in an object's list": (
        "rows.json", json.dumps({"v": 1, "data": [ROW, {"question": "q"}]}, indent=1).encode(),
        r"row 1 \(counting from 0\) of '{}', field 'data' has no 'answer'",
    ),
    "a number of 5,000 digits": (
        "rows.jsonl", lines(ROW, at=1, odd='{"question": "q", "answer": ' + "7" * 5000 + "}"),
        r"line 1 of '{}' is unusable JSON \(Exceeds the limit .*\); put one JSON object on each li",
    ),
    "a huge number in a list": (
        "rows.json", b'[{"question": "q", "answer": ' + b"7" * 5000 + b"}]",
        r"'{}' is unusable JSON \(Exceeds the limit .*\); mend the JSON array",
    ),
    "a null for an answer": (
        "rows.jsonl", lines(at=3, odd=ROW | {"answer": None}),
        "line 3 of '{}': 'answer' is of type NoneType; make it a string",
    ),
    "a null among alternatives": (
        "rows.jsonl", lines(ROW | {"alternative": ["No.", None]}),
        "line 1 of '{}': 'alternative' is of type NoneType; make it a string",
    ),
    "a null for a text": ("rows.jsonl", lines({"text": None}), "line 1 of '{}': 'text' is of type"),
    "NaN for an answer": (
        "rows.jsonl", lines(at=2, odd='{"question": "q", "answer": NaN}'),
        "line 2 of '{}': 'answer' is NaN; fill it in or leave the row out",
    ),
    # ---- tables ----
    "NaN in a table": (
        "rows.csv", b"question,answer\nWho?,She.\nWhere?,NaN\n",
        "line 3 of '{}': 'answer' is NaN; fill it in or leave the row out",
    ),
    "an empty cell": (
        "rows.csv", b"question,answer\nWho?,\n", "line 2 of '{}': 'answer' is empty; fill it in",
    ),
    "a column twice": (
        "rows.csv", b"question,answer,answer\nWho?,She.,He.\n",
        "line 1 of '{}' has the column 'answer' twice; rename or drop one",
    ),
    "a cell too many": (
        "rows.csv", b"question,answer\nWho?,She.\nWho, then?,She.\n",
        "line 3 of '{}' has 3 cells, the first line 2; put cells that hold a separator in double",
    ),
    "a quote without its end": (
        "rows.csv", b'question,answer\nWho?,"She.\n', r"line 2 of '{}' is no row of a table \(unex",
    ),
    "columns of other names": (
        "rows.csv", b"q,a\nWho?,She.\n", r"line 2 of '{}' has no 'question' \(its fields: 'a', 'q'",
    ),
    "a letter beyond MMLU's": (
        "test.csv", (MMLU + "What is 3+3?,1,2,3,4,E\n").encode(),
        "line 3 of '{}': 'answer' 'E' is none of the 4 choices; give an index from 0 to 3, or a",
    ),
    "Parquet that is torn": (
        "rows.parquet", parquet(ROW)[:-9], r"'{}' is damaged Parquet \(.*\); fetch or write it aga",
    ),
    "Parquet with a null": (
        "rows", parquet(ROW, ROW | {"answer": None}),
        r"row 1 \(counting from 0\) of '{}': 'answer' is of type NoneType; make it a string",
    ),
    # ---- choices ----
    "an index beyond the choices": (
        "rows.jsonl", lines(CHOICE | {"answer": 2}), "'answer' 2 is none of the 2 choices; give an",
    ),
    "a huge index": (
        "rows.jsonl", lines(CHOICE | {"answer": 10**300}), "line 1 .*'answer' a huge number is non",
    ),
    "no index": ("rows.jsonl", lines(CHOICE | {"answer": True}), "'answer' is of type bool; give "),
    "an answer that may be two choices": (
        "rows.jsonl", lines(CHOICE | {"choices": ["B", "A"], "answer": "A"}),
        r"line 1 of '{}': 'answer' 'A' may be choice 0 or 1 \(counting from 0\); give the index as",
    ),
    "a text that is no choice": (
        "rows.jsonl", lines(CHOICE | {"answer": "green"}), "'answer' 'green' is none of the 2 choi",
    ),
    "a null among choices": (
        "rows.jsonl", lines(CHOICE | {"choices": ["red", None]}),
        r"line 1 of '{}': 'choices\[1\]' is of type NoneType; make it a string",
    ),
    "choices in one text": (
        "rows.jsonl", lines(CHOICE | {"choices": "red or blue"}),
        "line 1 of '{}': 'choices' is of type str; make it a list of texts, or give them in column",
    ),
    "one choice": ("rows.jsonl", lines(CHOICE | {"choices": ["red"]}), "'choices' holds 1; give 2"),
    # ---- conversations ----
    "a null for turns": (
        "rows.jsonl", lines({"messages": None}), "line 1 of '{}': 'messages' is of type NoneType; ",
    ),
    "a null among turns": (
        "rows.jsonl", turns(USER, None), "line 1 of '{}', turn 1 of 'messages' is of type NoneType",
    ),
    "an unknown speaker": (
        "rows.jsonl", turns({"from": "alien", "value": "?"}, field="conversations"),
        "line 1 of '{}', turn 0 of 'conversations' has 'from' 'alien'; use system, user, assistant",
    ),
    "a turn without a speaker": ("rows.jsonl", turns({"content": "?"}), "turn 0 .* has 'role' Non"),
    "a turn without words": (
        "rows.jsonl", turns(USER, SHE | {"content": ""}),
        "line 1 of '{}', turn 1 of 'messages': 'content' is empty; fill it in",
    ),
    "a turn of null": (
        "rows.jsonl", turns(USER, SHE | {"content": None}), "turn 1 .*: 'content' is of type NoneT",
    ),
    "a picture in a turn": (
        "rows.jsonl", turns(USER | {"content": [{"type": "image_url", "image_url": {}}]}, SHE),
        "line 1 of '{}', turn 0 of 'messages' holds parts other than text; keep the text alone",
    ),
    "nobody answers": (
        "rows.jsonl", turns(USER), "line 1 of '{}': 'messages' has no turn of the assistant's to l",
    ),
    "no answer is to be learned": (
        "rows.jsonl", turns(USER, SHE | {"weight": 0}), "'messages' has no turn of the assistant's",
    ),
    "arguments of a tool that are no JSON": (
        "rows.jsonl",
        turns(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f",
                                                                      "arguments": "{x"}}]}),
        "line 1 of '{}', turn 1 of 'messages': 'arguments' of 'f' is no JSON; mend it",
    ),
    "tools that are no list": (
        "rows.jsonl", lines({"messages": [USER, SHE], "tools": "search"}),
        "line 1 of '{}': 'tools' is no list of tools; give one, or leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), CASES.values(), ids=CASES)
def test_a_damaged_file(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=message.replace("{}", str(file))) as caught:
        read_rows(file, name="forget")
    line = str(caught.value)
    assert line.startswith("forget: ") and line.splitlines() == [line] and len(line) < 500
    assert ";" in line  # the advice


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pd: pd.DataFrame([ROW, ROW | {"answer": np.nan}]), "row 1 .*: 'answer' is NaN; fi"),
        (lambda pd: pd.DataFrame([ROW, ROW | {"answer": pd.NA}]), "row 1 .*: 'answer' is NaN; fil"),
        (lambda pd: pd.DataFrame([["q", "a", "b"]], columns=["question", "answer", "answer"]),
         "forget: the DataFrame has the column 'answer' twice; rename or drop one"),
        (lambda pd: pd.DataFrame({"q": ["?"]}), r"row 0 .* has no 'question' \(its fields: 'q'\)"),
        (lambda pd: pd.DataFrame({"question": [], "answer": []}), "the data set holds no rows; gi"),
    ],
)  # fmt: skip
def test_a_damaged_frame(make, message):
    with pytest.raises(InputError, match=message):
        read_rows(make(pd), name="forget")


def test_a_table_of_arrow_with_a_column_twice():
    table = pa.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    with pytest.raises(InputError, match="the Table has the column 'answer' twice; rename or drop"):
        read_rows(table, name="forget")


def test_damaged_parquet_names_its_column(tmp_path):
    """A column's bytes, far behind the file's head, do not match the file's own checksums."""
    content = bytearray(parquet(*[{"question": f"q{i}", "answer": "a" * 90} for i in range(900)]))
    content[8:200] = bytes(192)
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(
        InputError, match=r"rows.parquet' is damaged Parquet \(.*\); fetch or write"
    ):
        read_rows(tmp_path / "rows.parquet", name="forget")


@pytest.mark.parametrize(
    ("package", "name", "content", "message"),
    [
        ("pyarrow.parquet", "rows.parquet", b"PAR1" + bytes(60) + b"PAR1",
         r"rows.parquet' is Parquet; pip install 'geffect-fast\[parquet\]', or write its rows as "),
        ("datasets", "saved/dataset_info.json", b"{}",
         r"saved' was saved by datasets: pip install 'geffect-fast\[datasets\]'$"),
    ],
)  # fmt: skip
def test_a_package_that_is_missing(tmp_path, monkeypatch, package, name, content, message):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / name.split("/")[0], name="forget")


def test_folders_that_hold_no_rows(tmp_path):
    data = datasets.DatasetDict(
        {split: datasets.Dataset.from_list([ROW]) for split in ("train", "test")}
    )
    data.save_to_disk(tmp_path / "saved")
    with pytest.raises(
        InputError, match=r"saved' holds the splits test, train; give the folder of"
    ):
        read_rows(tmp_path / "saved", name="forget")
    with pytest.raises(
        InputError, match=r"DatasetDict holds the splits 'train', 'test'; give one,"
    ):
        read_rows(data, name="forget")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"train' is damaged \(.*\); save it again"):
        read_rows(tmp_path / "saved" / "train", name="forget")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        InputError, match="tables' is a directory of Parquet files; give one of them"
    ):
        read_rows(tmp_path / "tables", name="forget")


def test_the_table_is_large():
    assert len(CASES) >= 40
