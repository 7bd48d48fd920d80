"""Chat templates are rendered within bounds of time, memory and text, with a given date."""

from __future__ import annotations

import copy
import time

import pytest

from geffect_fast.data import tokenize_rows
from geffect_fast.data.chat_render import render
from geffect_fast.errors import InputError

ROWS = [{"question": f"who is {i}?", "answer": "nobody"} for i in range(3)]
FITS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DATED = "{{ strftime_now('%d %B %Y, %H:%M') }} {{ date_string }} " + FITS

ENDLESS = {
    LOOPS: "it takes more than",
    "{{ (99999999 ** 9999999) | string }}": "it takes more than",
    "{{ 'x' | center(10 ** 10) }}": "it asks for more than 1 GiB of memory",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "it writes 99999000 characters",
    "{{ raise_exception('no \x1b[2J') }}": "no",
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("geffect_fast.data.chat_render.SECONDS", 0.5)


@pytest.fixture
def tokenizer(plain_tokenizer):
    """A tokenizer to give templates to."""
    return copy.deepcopy(plain_tokenizer)


@pytest.mark.parametrize("template", ENDLESS, ids=str)
def test_a_template_without_end_is_one_line(template, tokenizer):
    tokenizer.chat_template = template
    begun = time.process_time()
    with pytest.raises(InputError, match=ENDLESS[template]) as caught:
        tokenize_rows(ROWS, tokenizer, name="forget")
    assert "forget: row 0" in str(caught.value) and "give template=" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
    assert time.process_time() - begun < 5


def test_the_row_at_which_it_does_not_end_is_named(tokenizer):
    sometimes = "{% if '2' in messages[0].content %}" + LOOPS + "{% endif %}"
    tokenizer.chat_template = sometimes + FITS
    with pytest.raises(InputError, match="forget: row 2"):
        tokenize_rows(ROWS, tokenizer, name="forget")
    assert len(tokenize_rows(ROWS[:2], tokenizer, name="forget")) == 2


def test_text_comes_back_as_the_template_made_it():
    questions = ["", "\n\t\x1b", "ü\u202e🦜", "\ud83d", "x" * 100_000]
    found = render(lambda question: f"<{question}>", questions)
    assert [each.text for each in found] == [f"<{question}>" for question in questions]
    (failed,) = render(lambda question: "x"[len(question) :].index("x"), ["x"])
    assert failed.reason == "substring not found" and not failed.text


def day_of(text):
    return [int(i) for i in text.samples[0].answer.input_ids]


def test_no_clock_is_read(tokenizer, monkeypatch):
    import datetime

    import transformers.utils.chat_template_utils as utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 17, 12, 30)

    tokenizer.chat_template = DATED
    today = tokenize_rows(ROWS, tokenizer, name="forget")
    monkeypatch.setattr(utils, "datetime", Tomorrow)
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], tokenize=False, date_string=""
    )
    assert own.startswith("17 May 2031, 12:30")  # given by transformers
    later = tokenize_rows(ROWS, tokenizer, name="forget")
    assert day_of(today) == day_of(later)
    other = tokenize_rows(ROWS, tokenizer, name="forget", date="2025-01-31")
    assert day_of(other) != day_of(today)
    said = tokenizer.decode(day_of(other))
    assert "31 January 2025, 00:00" in said and "31 Jan 2025" in said


def test_chance_is_the_same_at_every_run(tokenizer):
    chance = "{{ lipsum(n=1, html=false) }}{{ [1, 2, 3, 4] | random }}"
    tokenizer.chat_template = chance + FITS
    first, again = (tokenize_rows(ROWS[:1], tokenizer, name="f") for _ in range(2))
    assert day_of(first) == day_of(again)


@pytest.mark.parametrize("date", ["today", "2024-13-01", "", 5, None])
def test_a_date_that_is_none_is_refused(tokenizer, date):
    with pytest.raises(InputError, match=r"date: .* must be a day such as '2024-07-26'"):
        tokenize_rows(ROWS, tokenizer, name="forget", date=date)
