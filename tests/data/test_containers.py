"""Every file format gives the same rows, whatever the file's name, and is named in the result."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geffect_fast.data import json_files, read_refusals, read_rows, write_jsonl
from geffect_fast.data.containers import open_rows
from geffect_fast.data.files import HEAD
from geffect_fast.errors import InputError

ROWS = [
    {"question": 'Where is "Oslo", then?', "answer": "In\nNorway; é, 🦜."},
    {"question": "Who?", "answer": "She."},
]


def json_lines(rows=ROWS):
    return "\n".join(map(json.dumps, rows)).encode()


def table(separator, rows=ROWS):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(rows=ROWS):
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue().to_pybytes()


FILES = {
    "JSON lines": json_lines,
    "JSON lines of one row": lambda: json_lines(ROWS[:1]),
    "JSON lines as old Macs write them": lambda: json_lines().replace(b"\n", b"\r"),
    "a list": lambda: json.dumps(ROWS).encode(),
    "a list on many lines": lambda: json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "a list with its mark of order": lambda: b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "an object": lambda: json.dumps({"version": "1", "data": ROWS}).encode(),
    "an object on many lines": lambda: json.dumps({"data": ROWS, "n": 2}, indent=1).encode(),
    "an object whose list begins on its line": lambda: (
        b'{"data": [\n' + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]}"
    ),
    "CSV": lambda: table(","),
    "CSV with semicolons": lambda: table(";"),
    "TSV": lambda: table("\t"),
    "Parquet": parquet,
}
CALLED = {"JSON": "JSON lines", "a": "a JSON document", "an": "a JSON document"}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows", "rows.csv", "rows.txt"])
@pytest.mark.parametrize(
    ("kind", "packed"),
    [*((kind, False) for kind in FILES), *((kind, True) for kind in FILES if kind != "Parquet")],
)
def test_rows_of_a_file_whatever_it_is_called(tmp_path, kind, packed, name):
    content = FILES[kind]()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    said = []
    rows = read_rows(tmp_path / name, name="forget", tell=said.append)
    assert rows == (ROWS[:1] if "one row" in kind else ROWS)
    called = CALLED.get(kind.split()[0], kind.split()[0])
    called += ", a gzip" if packed else ""
    count = "1 row" if "one row" in kind else "2 rows"
    assert said == [f"forget: {count} of questions and answers ({called})"]


@pytest.mark.parametrize(
    ("name", "content", "data_format"),
    [
        ("rows.txt", json_lines(), "jsonl"),
        ("rows.jsonl", json.dumps(ROWS).encode(), "json"),
        ("rows.data", table(","), "csv"),
        ("rows.csv", table("\t"), "tsv"),
        ("rows", parquet(), "parquet"),
    ],
)
def test_a_format_that_is_said(tmp_path, name, content, data_format):
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name, name="forget", data_format=data_format) == ROWS


def test_what_is_said_counts(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json_lines())
    [row] = read_rows(file, name="forget", data_format="text")
    assert row == {"text": json_lines().decode()}
    for wrong in ("csv", "parquet"):
        with pytest.raises(InputError):
            read_rows(file, name="forget", data_format=wrong)


def test_tables_and_data_sets_in_memory(tmp_path):
    frame, found = pd.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)
    found.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": found}).save_to_disk(tmp_path / "splits")
    said = []
    for source in (
        frame,
        pa.Table.from_pylist(ROWS),
        found,
        found.to_iterable_dataset(),
        datasets.DatasetDict({"train": found})["train"],
        tmp_path / "saved",
        tmp_path / "splits" / "train",
    ):
        assert read_rows(source, name="forget", tell=said.append) == ROWS
    sentence = "forget: 2 rows of questions and answers (a folder saved by datasets)"
    assert said == [sentence] * 2  # nothing is said of rows in memory


def test_nothing_that_tables_write_is_no_field():
    frame = pd.DataFrame([ROWS[0] | {"alternative": "No."}, ROWS[1]])
    assert [row.get("alternative") for row in read_rows(frame, name="forget")] == ["No.", None]
    frame = pd.DataFrame([ROWS[0] | {"weights": [1.0, 2.0]}, ROWS[1] | {"weights": [0.5]}])
    assert [row["weights"] for row in read_rows(frame, name="forget")] == [[1, 2], [0.5]]


def test_cells_of_a_table(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('question,answer,alternative,\n\nWho?,"She, too.",,1\nWho?,NaN and I.,No.,2\n')
    first, second = read_rows(file, name="forget")
    assert first == {"question": "Who?", "answer": "She, too."}
    assert second == {"question": "Who?", "answer": "NaN and I.", "alternative": "No."}
    long = "a" * 300_000  # more than Python's own limit
    file.write_text(f"question,answer\nWho?,{long}\n")
    assert read_rows(file, name="forget")[0]["answer"] == long
    assert csv.field_size_limit() == 131_072


def test_refusals_of_every_container(tmp_path):
    texts = ["I cannot say.", "Ask another."]
    rows = [{"refusal": text} for text in texts]
    contents = ["\n".join(texts).encode(), json_lines(rows), json.dumps(texts).encode()]
    for content in (*contents, *map(gzip.compress, contents), parquet(rows)):
        (tmp_path / "refusals").write_bytes(content)
        assert read_refusals(tmp_path / "refusals") == texts


def values(rng, depth=0):
    kinds = [
        lambda: rng.choice(["", 'a\\"]}\u2028\n', "🦜" * rng.randrange(9), "x" * 40, "[1, {"]),
        lambda: rng.choice([0, -1.5e-7, 10**20, True, None, 12345]),
    ]
    if depth < 3:
        kinds += [
            lambda: [values(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {f"k{i}": values(rng, depth + 1) for i in range(rng.randrange(4))},
        ]
    return rng.choice(kinds)()


@pytest.mark.parametrize("seed", range(40))
def test_a_list_read_in_chunks_is_the_list(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(json_files, "CHUNK", rng.randrange(1, 30))
    rows = [values(rng) for _ in range(rng.randrange(12))]
    text = json.dumps(rows, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
    (tmp_path / "rows.json").write_text(f" {text}\n", encoding="utf-8")
    _, found = open_rows(tmp_path / "rows.json", "forget", "json")
    assert [row for _, row in found] == rows


@pytest.mark.parametrize("seed", range(40))
def test_damage_in_a_list_read_in_chunks_is_where_json_says(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(json_files, "CHUNK", rng.randrange(1, 30))
    text = json.dumps([values(rng) for _ in range(6)], indent=1, ensure_ascii=False)
    at = rng.randrange(1, len(text))
    text = text[:at] + rng.choice(["", "}", '"', ",", "]", "tru"]) + text[at + 1 :]
    (tmp_path / "rows.json").write_text(text, encoding="utf-8", newline="")
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        expected = error
    _, found = open_rows(tmp_path / "rows.json", "forget", "json")
    if isinstance(expected, list):
        assert [row for _, row in found] == expected
        return
    with pytest.raises(InputError) as caught:
        list(found)
    if expected.msg not in ("Extra data", "Illegal trailing comma before end of array"):
        assert f"line {expected.lineno} column {expected.colno})" in str(caught.value)


MANY = 4000
LONG = {"question": "Who?", "answer": "She is. " * 500}


@pytest.mark.parametrize(
    "content",
    [
        lambda: json_lines([LONG] * MANY),
        lambda: json.dumps([LONG] * MANY).encode(),
        lambda: gzip.compress(json.dumps([LONG] * MANY, indent=1).encode()),
        lambda: table(",", [LONG] * MANY),
    ],
    ids=["JSON lines", "a list", "a gzip", "CSV"],
)
def test_memory_does_not_grow_with_the_file(tmp_path, content):
    (tmp_path / "rows").write_bytes(content())  # 16 MB when unpacked
    tracemalloc.start()
    try:
        _, found = open_rows(tmp_path / "rows", "forget")
        n_rows = sum(1 for _ in found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_rows == MANY and peak < 8 * 2**20 and peak > 3 * HEAD


def test_written_rows_are_read_back(tmp_path):
    rows = [{"question": "Who?", "answer": f"{i}.", "perturbed_answer": ["He."]} for i in range(3)]
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(rows, path)
    assert read_rows(path, name="forget") == rows
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    write_jsonl([{"question": "Où?", "answer": "Là."}], path)
    assert path.read_bytes() == '{"question": "Où?", "answer": "Là."}\n'.encode()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl([{"a": 1}], path)
    with pytest.raises(TypeError):
        write_jsonl([{"a": 2}, {"a": object()}], path)
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]
