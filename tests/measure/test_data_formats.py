"""Commands on data in common formats give the numbers of the same rows given as tokens."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import read_rows, tokenize_rows
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.storage.run_yaml import load_config

pytestmark = pytest.mark.usefixtures("undrawn")

TEXT = "Mara Lund was born in Oslo. Her mother was a tailor, and so was her aunt. " * 12
CHAT = [
    {"messages": [{"role": role, "content": text} for role, text in zip(
        ("system", "user", "assistant", "user", "assistant"), says, strict=True)]}
    for says in (("Be kind.", "Who?", "Mara.", "Where?", "In Oslo."),
                 ("Be brief.", "Is it?", "No.", "Who, then?", "Nobody at all."))
]  # fmt: skip
CHOICES = [{"question": "Where is Oslo?", "choices": ["Peru", "Norway"], "answer": "B"}]


@pytest.fixture(scope="module")
def loaded(study):
    return load_model(study / "model", "auto", "cpu"), load_tokenizer(study / "model")


@pytest.mark.parametrize("rows", [[TEXT], CHAT, CHOICES], ids=["text", "chat", "choices"])
def test_a_profile_is_that_of_the_same_tokens(loaded, rows):
    model, tokenizer = loaded
    how = {"retain": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], "objectives": ["ga"]}
    found = gf.profile(model, tokenizer, forget=rows, max_length=128, **how)
    read = read_rows(rows, name="forget")
    samples = tokenize_rows(read, tokenizer, name="forget", max_length=128).samples
    tokens = [
        {"input_ids": s.answer.input_ids.tolist(), "labels": s.answer.labels.tolist()}
        for s in samples
    ]
    plain = gf.profile(model, None, forget=tokens, **how)
    assert found.sizes["sample"] == len(samples) == (len(rows) if rows != [TEXT] else len(samples))
    assert len(samples) > 1 or rows is CHOICES
    np.testing.assert_array_equal(found["g_effect"], plain["g_effect"])


def profile(**options):
    words = {"model": "model", "retain": "retain.jsonl", "objectives": "ga", "out": "run"} | options
    return ["profile", *(w for key, value in words.items() for w in (f"--{key}", value))]


def test_what_was_found_is_said_and_a_replay_reads_the_same(here, capsys):
    (here / "corpus.txt").write_bytes(gzip.compress(TEXT.encode()))
    words = profile(forget="corpus.txt", **{"max-length": "128", "probe": "chat=chat.json"})
    (here / "chat.json").write_text(json.dumps(CHAT))
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == (
        "forget: 1 row of plain text (plain text, a gzip); retain: 5 rows of questions and "
        "answers (JSON lines); chat: 2 rows of conversations (a JSON document)"
    )
    assert main(["profile", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    first, again = gf.open_run("run"), gf.open_run("again")
    np.testing.assert_array_equal(first["g_effect"], again["g_effect"])
    assert first.sizes["sample"] > 5


def test_a_format_is_an_option_and_is_recorded(here, capsys):
    (here / "odd.json").write_text("question,answer\nWho?,She.\n")
    (here / "retain.csv").write_text("question,answer\nWho?,He.\n")
    words = profile(forget="odd.json", retain="retain.csv", **{"data-format": "csv"})
    assert main([*words, "--quiet"]) == 0
    assert load_config("run/run.yaml").data_format == "csv"
    assert main([*profile(forget="odd.json", out="b"), "--data-format", "cvs", "--quiet"]) == 2
    assert "--data-format: unknown 'cvs'; did you mean 'csv'?" in capsys.readouterr().err


def test_unlearn_counts_the_windows_of_a_text(here):
    (here / "corpus.txt").write_text(TEXT)
    words = ["--model", "model", "--forget", "corpus.txt", "--retain", "retain.jsonl", "--quiet"]
    words += ["--objective", "ga", "--steps", "2", "--max-length", "128", "--batch-size", "3"]
    assert main(["unlearn", *words, "--out", "run"]) == 0
    assert gf.open_run("run").sizes["step"] == 3
    words[words.index("3")] = "900"
    assert main(["unlearn", *words, "--out", "other"]) == 2


def test_check_takes_the_first_windows(loaded):
    model, tokenizer = loaded
    found = gf.check(model, tokenizer, data=[TEXT], samples=2, max_length=32)
    assert found.exact and found.n_samples == 2


def test_a_window_is_named_by_its_text(loaded):
    _, tokenizer = loaded
    rows = read_rows([TEXT], name="forget")
    samples = tokenize_rows(rows, tokenizer, name="forget", max_length=32)
    with pytest.raises(gf.errors.InputError, match=r"forget: row 0 \(counting from 0\), window 0"):
        gf.data.make_batches(samples, ("alternative",), token_budget=64)
