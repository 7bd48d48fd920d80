"""Fictitious authors are the same everywhere, and no two alike."""

from __future__ import annotations

import hashlib
import json

import pytest

from geffect_fast.data import read_refusals, read_rows
from geffect_fast.demo.authors import (
    MAX_AUTHORS,
    REFUSALS,
    make_fictitious_authors,
    split_forget,
)
from geffect_fast.errors import InputError


def digest(rows) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_the_rows_of_a_seed_never_change():
    assert (
        digest(make_fictitious_authors())
        == "cc5a2dc9b9aa4f73de8edf8cdb90792f4bc656dec0c346feb47338f57e34c2b8"
    )
    assert make_fictitious_authors(3, 7) == make_fictitious_authors(3, 7)
    assert digest(make_fictitious_authors(seed=1)) != digest(make_fictitious_authors())


@pytest.mark.parametrize(("n", "seed"), [(1, 3), (20, 0), (MAX_AUTHORS, 5)])
def test_rows_are_distinct_whole_and_of_moderate_length(n, seed):
    rows = make_fictitious_authors(n, seed)
    assert len(rows) == 10 * n and len({row["author"] for row in rows}) == n
    for field in ("question", "answer", "paraphrased_question", "paraphrased_answer"):
        assert len({row[field] for row in rows}) == len(rows), field
    names = [row["author"].split() for row in rows[::10]]
    assert len({first for first, _ in names}) == len({last for _, last in names}) == n
    for row in rows:
        texts = [row["question"], row["paraphrased_question"], row["answer"]]
        texts += [row["paraphrased_answer"], *row["perturbed_answer"]]
        assert all("{" not in text and "  " not in text for text in texts)
        assert all(text.endswith("?") for text in texts[:2])
        assert all(text.endswith(".") and text.lstrip("'")[0].isupper() for text in texts[2:])
        assert 8 <= len(row["answer"].split()) <= 30, row["answer"]
        assert len({row["paraphrased_answer"], *row["perturbed_answer"]}) == 5
        assert row["answer"] != row["paraphrased_answer"]
        assert row["author"] in row["question"] + row["answer"]


def common_start(left: list[str], right: list[str]) -> int:
    same = [a == b for a, b in zip(left, right, strict=False)]
    return same.index(False) if False in same else len(same)


def test_a_perturbed_answer_differs_in_the_fact_alone():
    for row in make_fictitious_authors(MAX_AUTHORS, 2):
        right = row["paraphrased_answer"].rstrip(".").split()
        for perturbed in row["perturbed_answer"]:
            wrong = perturbed.rstrip(".").split()
            start = common_start(right, wrong)
            end = len(right) - common_start(right[start:][::-1], wrong[start:][::-1])
            fact = " ".join(right[start:end]).strip("'")
            # The answer states this fact, so the replacement changed only what the question asks
            # for.
            assert fact and fact in row["answer"], (row["answer"], perturbed)
            assert len(wrong) - len(right) + end - start >= 1


@pytest.mark.parametrize("n", [0, -1, MAX_AUTHORS + 1])
def test_too_few_or_too_many_authors(n):
    with pytest.raises(InputError, match=rf"n_authors: {n} is not between 1 and {MAX_AUTHORS}"):
        make_fictitious_authors(n)


@pytest.mark.parametrize(
    ("n", "fraction", "n_forget"),
    [(20, 0.1, 2), (20, 0.5, 10), (20, 0.01, 1), (20, 0.99, 19), (10, 0.25, 3), (2, 0.1, 1)],
)
def test_whole_authors_are_forgotten(n, fraction, n_forget):
    rows = make_fictitious_authors(n)
    forget, retain = split_forget(rows, fraction)
    assert retain + forget == rows
    assert len({row["author"] for row in forget}) == n_forget
    assert {row["author"] for row in forget}.isdisjoint(row["author"] for row in retain)


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        (make_fictitious_authors(2), 0, r"forget_fraction: 0 is not between 0 and 1"),
        (make_fictitious_authors(2), 1.0, r"forget_fraction: 1.0 is not between"),
        (make_fictitious_authors(1), 0.5, r"rows: 1 author\(s\) cannot be split"),
        ([], 0.5, r"rows: 0 author\(s\) cannot be split"),
        ([{"author": "A"}, {"question": "Q"}], 0.5, r"rows: row 1 .* has no 'author'"),
    ],
)
def test_what_cannot_be_split(rows, fraction, message):
    with pytest.raises(InputError, match=message):
        split_forget(rows, fraction)


def test_refusals_are_sentences():
    assert 20 <= len(REFUSALS) == len(set(REFUSALS))
    assert read_refusals(REFUSALS) == list(REFUSALS)
    assert all(text.endswith(".") and 3 <= len(text.split()) <= 12 for text in REFUSALS)


def test_nothing_is_taken_from_tofu(tofu):
    assert set(REFUSALS).isdisjoint(read_refusals(tofu / "idontknow.jsonl"))
    theirs = {row["question"] for row in read_rows(tofu / "full.json", name="forget")}
    assert theirs.isdisjoint(row["question"] for row in make_fictitious_authors())
