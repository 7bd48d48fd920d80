"""Data in other forms than question and answer: compressed, by columns, other shapes, no file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import socket
import tarfile
import zipfile

import numpy as np
import torch
from bad_input.case import Case, both, check, holds, profile, row, rows, tokens
from bad_input.data import call

LINE = b'{"question": "Who?", "answer": "She."}\n'
WAY = "each with 'question' and 'answer'"


def written(write):
    """The bytes that `write` puts into a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def table():
    import pandas as pd

    return pd.DataFrame([{"question": "Who?", "answer": "She."}])


def arrow(kind):
    """The bytes of a table as Arrow's file, Arrow's stream or Parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    found = pa.Table.from_pandas(table())
    if kind == "parquet":
        return written(lambda file: pa.parquet.write_table(found, file))
    writer = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    file = io.BytesIO()
    with writer(file, found.schema) as opened:
        opened.write_table(found)
    return file.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", LINE)


def tarred(file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(LINE)
        archive.addfile(member, io.BytesIO(LINE))


FILES = {
    "a gzip in a gzip": (lambda: gzip.compress(gzip.compress(LINE)), "is gzip in gzip", "unpack"),
    "bzip2": (lambda: bz2.compress(LINE), "is bzip2", "unpack it"),
    "xz": (lambda: lzma.compress(LINE), "is xz", "unpack it"),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + bytes(9), "is zstd", "unpack it"),
    "zip": (lambda: written(zipped), "is a zip archive", "unpack it"),
    "tar": (lambda: written(tarred), "is a tar archive", "unpack it"),
    "Parquet in a gzip": (lambda: gzip.compress(arrow("parquet")), "Parquet in a gz", "unpack it"),
    "Feather": (lambda: b"FEA1" + bytes(60) + b"FEA1", "is Feather", "as JSON lines"),
    "Arrow's file": (lambda: arrow("file"), "is Arrow", "as JSON lines"),
    "Arrow's stream": (lambda: arrow("stream"), "is Arrow (a stream)", "as JSON lines"),
    "pickle": (lambda: pickle.dumps([LINE]), "is a pickle", "as JSON lines"),
    "numpy": (
        lambda: written(lambda file: np.save(file, np.arange(3))),
        "is a numpy array",
        "as JSON lines",
    ),
    "torch.save": (
        lambda: written(lambda file: torch.save([1], file)),
        "is a zip archive",
        "unpack it",
    ),
    "SQLite": (lambda: b"SQLite format 3\x00" + bytes(80), "is a SQLite database", "JSON lines"),
    "UTF-16": (lambda: LINE.decode().encode("utf-16"), "is UTF-16", "save it as UTF-8"),
    "PDF": (lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF", WAY),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(30), "is a picture", WAY),
    "a Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5599\n",
        "is a pointer of Git LFS",
        "git lfs pull",
    ),
    "a page of a hub": (
        lambda: b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        "is a web page",
        "download the raw file",
    ),
}

SHAPES = {
    "Alpaca": (
        {"instruction": "Name one.", "input": "", "output": "She."},
        "'input', 'instruction', 'output'",
        "'output' in 'answer'",
    ),
    "Dolly": (
        {"instruction": "Name one.", "context": "", "response": "She.", "category": "qa"},
        "'category', 'context', 'instruction', 'response'",
        "'response' in 'answer'",
    ),
    "prompt and completion": (
        {"prompt": "Who?", "completion": "She."},
        "'completion', 'prompt'",
        "'completion' to 'answer'",
    ),
    "a preference": (
        {"prompt": "Who?", "chosen": "No.", "rejected": "She."},
        "'chosen', 'prompt', 'rejected'",
        "the other in 'alternative'",
    ),
    "names in capitals": (
        {"Question": "Who?", "Answer": "She."},
        "'Answer', 'Question'",
        "rename 'Question' to 'question'",
    ),
    "several answers": (
        {"question": "Who?", "answers": ["She."]},
        "'answers', 'question'",
        "one of 'answers' in 'answer'",
    ),
}


def special(make):
    """Make something called `odd` that is no ordinary file."""
    return lambda here, _patch: make(here / "odd")


def bound(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path must be short
        server.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


CASES = [
    *(
        Case(f"{name} as data", profile(), says, advice, holds("forget.jsonl", make()))
        for name, (make, says, advice) in FILES.items()
    ),
    *(
        Case(f"{name} as a row", profile(), f"(its fields: {found})", advice, rows(shape))
        for name, (shape, found, advice) in SHAPES.items()
    ),
    *(
        Case(f"{name} as a row from Python", call(forget=[shape]), found, advice)
        for name, (shape, found, advice) in SHAPES.items()
    ),
    # ---- damage; more of it is in tests/data/test_damaged_data.py ----
    Case(
        "a torn gzip",
        profile(),
        "forget.jsonl' is a damaged gzip",
        "fetch it again",
        holds("forget.jsonl", gzip.compress(LINE * 90)[:-9]),
    ),
    Case(
        "a text among questions",
        profile(),
        "forget: line 3 of",
        "use one kind",
        row(3, text="Once."),
    ),
    Case(
        "Parquet that is torn",
        profile(retain="retain.parquet"),
        "retain.parquet' is damaged Parquet",
        "fetch or write it again",
        holds("retain.parquet", arrow("parquet")[:-9]),
    ),
    Case(
        "a choice that is none",
        profile(),
        "forget: line 1 of",
        "give an index from 0 to 1, or a letter",
        rows({"question": "Which?", "choices": ["a", "b"], "answer": 2}),
    ),
    Case(
        "a conversation without an answer",
        check(),
        "data: line 1 of",
        "leave the row out",
        rows({"messages": [{"role": "user", "content": "Who?"}]}),
    ),
    Case(
        "a text for which refusals are given",
        profile(objectives="po"),
        "forget: row 0 (counting from 0) is plain text",
        "give questions and answers",
        rows({"text": "Once there was a king."}),
    ),
    Case(
        "a file that could be anything",
        profile(),
        "forget.jsonl' begins with 'Once",
        "--data-format json|jsonl|csv",
        holds("forget.jsonl", "Once there was a king."),
    ),
    Case(
        "a format of another kind",
        profile(data_format="csv"),
        "forget: line 2 of",
        "has no 'question'",
    ),
    Case(
        "a format that nobody knows",
        profile(data_format="parket"),
        "--data-format: unknown 'parket'",
        "did you mean 'parquet'?",
    ),
    Case(
        "a data set of several splits",
        profile(forget="saved"),
        "saved' holds the splits test, train",
        "give the folder of one",
        both(
            holds("saved/dataset_dict.json", "{}"),
            holds("saved/train/dataset_info.json", "{}"),
            holds("saved/test/dataset_info.json", "{}"),
        ),
    ),
    # ---- paths that are no files ----
    Case("a pipe as data", profile(forget="odd"), "odd' is a pipe", "save", special(os.mkfifo)),
    Case("a socket as data", profile(forget="odd"), "odd' is a socket", "give", special(bound)),
    Case("/dev/zero as data", profile(forget="/dev/zero"), "/dev/zero' is a device", "give a file"),
    Case("/dev/null as data", profile(retain="/dev/null"), "/dev/null' is a device", "give a file"),
    Case(
        "a link to /dev/zero as data",
        profile(forget="odd"),
        "odd' is a device",
        "give a file",
        special(lambda path: path.symlink_to("/dev/zero")),
    ),
    Case(
        "/dev/zero as refusals",
        profile(objectives="po", refusals="/dev/zero"),
        "refusals: '/dev/zero' is a device",
        "give a file",
    ),
    Case(
        "/dev/zero as a probe", profile(probe="p=/dev/zero"), "p: '/dev/zero' is a device", "give a"
    ),
    Case(
        "/dev/zero as a config",
        ["profile", "--config", "/dev/zero", "--out", "run"],
        "config /dev/zero is a device",
        "give a file",
    ),
    Case(
        "a pipe as a config",
        ["sweep", "--config", "odd", "--out", "run"],
        "config odd is a pipe",
        "save",
        special(os.mkfifo),
    ),
    Case("a pipe as a result", ["show", "odd"], "odd is a pipe", "save", special(os.mkfifo)),
    Case("/dev/zero as a result", ["show", "/dev/zero"], "/dev/zero is a device", "give a file"),
    # ---- numbers that are no token ids ----
    Case(
        "a mask as labels",
        call(forget=[{"input_ids": [5, 6, 7], "labels": [False, True, True]}]),
        "'labels' is a boolean mask",
        "-100 as the label",
    ),
    Case(
        "floats of numpy as ids",
        call(forget=[{"input_ids": [np.float32(5), 6], "labels": [5, 6]}]),
        "'input_ids' holds type float",
        "give a flat list of ids",
    ),
    Case(
        "a tensor of no numbers",
        call(forget=[{"input_ids": torch.empty(3, device="meta"), "labels": [5, 6, 7]}]),
        "'input_ids' cannot be read",
        "give a flat list of ids",
    ),
    Case(
        "a mask of numpy that marks padding",
        call(forget=[tokens(5, 6, 7, attention_mask=np.array([True, True, False]))]),
        "'attention_mask' marks padding",
        "drop the padded tokens",
    ),
    Case(
        "a config without end",
        ["profile", "--config", "deep.yaml", "--out", "run"],
        "deep.yaml is",
        "mend or replace it",
        holds("deep.yaml", "[" * 20_000),
    ),
    Case(
        "a date that is none",
        ["profile", "--config", "my.yaml", "--out", "run"],
        "my.yaml is",
        "mend or replace it",
        holds("my.yaml", "model: 2024-13-45"),
    ),
    Case("an empty file name of a probe", profile(probe="p="), "'p=' must be", "NAME=DATA"),
]
