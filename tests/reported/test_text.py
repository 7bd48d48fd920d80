"""Publicly reported errors of text: escapes, formulas, clocks, keys, code."""

from __future__ import annotations

import copy
import json

import pytest

from geffect_fast.data import read_rows, tokenize_rows
from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model
from geffect_fast.storage.csv_cells import csv_cell
from geffect_fast.terminal import clean_output, visible

PRINTED = [
    ("EONRaider/RootWire#53", "\x1b[2J\x1b[31m", "\\x1b[2J\\x1b[31m"),
    ("microsoft/PyRIT#2694", "\x9b8m\x9d0;t\x07 done\rok", "\\x9b8m\\x9d0;t\\x07 done\\x0dok"),
    ("opena2a-org/hackmyagent#272", "evil\x1b[2m\x1b[0mdir", "evil\\x1b[2m\\x1b[0mdir"),
]


@pytest.mark.parametrize(("source", "text", "shown"), PRINTED, ids=[row[0] for row in PRINTED])
def test_escapes_are_shown_and_not_obeyed(source, text, shown, capsys):
    with clean_output():
        print(text)
    assert capsys.readouterr().out == f"{shown}\n" and visible(text) == shown


CELLS = [
    ("hhurz/tableExport.jquery.plugin#230", "=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
    ("hhurz/tableExport.jquery.plugin#230, negative values", "-12.5", "-12.5"),
    ("PostHog/posthog#54162", "\t=1+1", "'\t=1+1"),
]


@pytest.mark.parametrize(("source", "cell", "written"), CELLS, ids=[row[0] for row in CELLS])
def test_cells_are_no_formulas_and_numbers_stay(source, cell, written):
    assert csv_cell(cell) == written


def test_lmstudio_bug_tracker_577_a_template_asks_for_hours_and_minutes(study):
    from transformers import AutoTokenizer

    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(study / "model"))
    clock = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"
    tokenizer.chat_template = clock + "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = {"question": "q", "answer": "a"}
    (sample,) = tokenize_rows([row], tokenizer, name="forget", date="2026-01-02").samples
    assert tokenizer.decode(sample.answer.input_ids).startswith("2026-01-02 00:00:00")


@pytest.mark.parametrize("source", ["cityjson/specs#2", "brimdata/super#2523"])
def test_a_key_that_comes_twice_is_not_the_last_in_silence(source, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n{"question": "q", "answer": 1, "answer": 2}')
    with pytest.raises(InputError, match=r"line 2 .* field 'answer' comes twice"):
        read_rows(file, name="forget")


def test_winml_cli_451_custom_code_is_refused_with_what_allowing_it_means(tmp_path):
    config = {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(InputError, match=r"with all your rights; .* --trust-remote-code"):
        load_model(tmp_path)
