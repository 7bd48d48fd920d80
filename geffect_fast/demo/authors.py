"""A set of questions and answers about authors who do not exist, generated from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geffect_fast.demo import author_words as words
from geffect_fast.errors import InputError

REFUSALS = words.REFUSALS

MAX_AUTHORS = min(
    len(words.FIRST_STEMS) * len(words.FIRST_ENDINGS),
    len(words.LAST_STEMS) * len(words.LAST_ENDINGS),
    len(words.TOWN_STEMS) * len(words.TOWN_ENDINGS),
    len(words.TITLE_QUALITIES) * len(words.TITLE_THINGS) // 2,
)
"""Largest number of authors for which names, birthplaces and titles are all different."""

N_PERTURBED = 4
"""Number of wrong answers in each row."""


def make_fictitious_authors(n_authors: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Make ten questions and answers about each of `n_authors` invented authors.

    Only `random.Random(seed).random()` is drawn from, whose sequence Python keeps fixed, so the
    same arguments give the same rows everywhere.

    Args:
        n_authors: 1 to `MAX_AUTHORS`.
        seed: seed of every choice.

    Returns:
        `10 * n_authors` rows in TOFU's format: `question`, `answer`, `paraphrased_question`,
        `paraphrased_answer`, `perturbed_answer` (a list of answers whose fact is wrong), and
        `author`. Questions and answers are distinct.

    Raises:
        InputError: `n_authors` is out of range.
    """
    if not 1 <= n_authors <= MAX_AUTHORS:
        raise InputError(f"n_authors: {n_authors} is not between 1 and {MAX_AUTHORS}")
    rng = random.Random(seed)
    authors = _make_authors(rng, n_authors)
    return [
        _make_row(rng, author, field, wordings)
        for author in authors
        for field, wordings in words.WORDINGS.items()
    ]


def split_forget(
    rows: Sequence[Mapping[str, Any]], forget_fraction: float = 0.1
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split by whole authors into rows to forget (the last authors') and rows to retain.

    Args:
        rows: rows with a field `author`.
        forget_fraction: part of the authors to forget, rounded, but at least one and not all.

    Returns:
        `(forget, retain)`, both in the rows' order.

    Raises:
        InputError: the fraction is out of range, a row has no author, or there are fewer than two
            authors.
    """
    if not 0 < forget_fraction < 1:
        raise InputError(f"forget_fraction: {forget_fraction} is not between 0 and 1")
    for i, row in enumerate(rows):
        if not row.get("author"):
            raise InputError(f"rows: row {i} (counting from 0) has no 'author'; add the field")
    authors = list(dict.fromkeys(row["author"] for row in rows))
    if len(authors) < 2:
        raise InputError(f"rows: {len(authors)} author(s) cannot be split; give at least two")
    n_forget = math.floor(forget_fraction * len(authors) + 0.5)
    gone = set(authors[-min(max(n_forget, 1), len(authors) - 1) :])
    forget = [dict(row) for row in rows if row["author"] in gone]
    return forget, [dict(row) for row in rows if row["author"] not in gone]


# ---- authors ----


@dataclass(frozen=True)
class _Author:
    """The facts about an author; a question asks for each of them but `town` and `born`."""

    name: str
    town: str
    born: str
    mother: str
    father: str
    genre: str
    debut: str
    later: str
    award: str
    theme: str
    habit: str
    spark: str


def _make_authors(rng: random.Random, n: int) -> list[_Author]:
    firsts = _draw(rng, _combine(words.FIRST_STEMS, words.FIRST_ENDINGS), n)
    lasts = _draw(rng, _combine(words.LAST_STEMS, words.LAST_ENDINGS), n)
    towns = _draw(rng, _combine(words.TOWN_STEMS, words.TOWN_ENDINGS), n)
    titles = _draw(rng, _titles(), 2 * n)
    return [
        _Author(
            name=f"{firsts[i]} {lasts[i]}",
            town=towns[i],
            born=_birthday(rng),
            debut=titles[2 * i],
            later=titles[2 * i + 1],
            **{field: _pick(rng, facts) for field, facts in words.FACTS.items()},
        )
        for i in range(n)
    ]


def _make_row(
    rng: random.Random, author: _Author, field: str, wordings: tuple[words.Wording, ...]
) -> dict[str, Any]:
    """One question about `field`, asked and answered in one of its wordings."""
    wording = _pick(rng, wordings)
    facts = vars(author)
    wrong = _draw(
        rng, [other for other in _others(rng, field) if other != facts[field]], N_PERTURBED
    )
    return {
        "question": wording.question.format(**facts),
        "answer": wording.answer.format(**facts),
        "paraphrased_question": wording.paraphrased_question.format(**facts),
        "paraphrased_answer": wording.paraphrased_answer.format(**facts),
        "perturbed_answer": [
            wording.paraphrased_answer.format(**{**facts, field: other}) for other in wrong
        ],
        "author": author.name,
    }


def _others(rng: random.Random, field: str) -> Sequence[str]:
    """Other possible values of a fact, for wrong answers; the author's own may be among them."""
    if field == "name":
        firsts = _draw(rng, _combine(words.FIRST_STEMS, words.FIRST_ENDINGS), N_PERTURBED + 1)
        lasts = _draw(rng, _combine(words.LAST_STEMS, words.LAST_ENDINGS), N_PERTURBED + 1)
        return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    if field in ("debut", "later"):
        return _titles()
    return words.FACTS[field]


def _birthday(rng: random.Random) -> str:
    # Days up to 28 exist in every month.
    day, year = 1 + int(28 * rng.random()), 1930 + int(60 * rng.random())
    return f"{day} {_pick(rng, words.MONTHS)} {year}"


def _titles() -> list[str]:
    return [f"The {title}" for title in _combine(words.TITLE_QUALITIES, words.TITLE_THINGS, " ")]


def _combine(stems: Sequence[str], endings: Sequence[str], between: str = "") -> list[str]:
    return [f"{stem}{between}{ending}" for stem in stems for ending in endings]


# ---- choices, from rng.random() alone ----


def _pick(rng: random.Random, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def _draw(rng: random.Random, items: Sequence[str], n: int) -> list[str]:
    """`n` different items, in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(n)]
