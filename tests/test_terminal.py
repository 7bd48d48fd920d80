"""A terminal obeys no printed text, whoever prints it."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.style import Style
from rich.table import Table
from rich.text import Text

import geffect_fast
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.terminal import Console, clean_output, progress_bar, visible

ROOT = Path(geffect_fast.__file__).parent
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x08\r\u202egnp\u2066\u200f\x7f\udcff\u2028"
SEEN = "\n\t -\x7e\xa0-\u200d\u2010-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff"
OBEYED = re.compile(f"[^{SEEN}]")


def shown(text):
    assert not OBEYED.search(text), ascii(text)
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\u202eb", "a\\u202eb"),
        ("\x00\x07\x7f\x85\x9b", "\\x00\\x07\\x7f\\x85\\x9b"),
        ("over\rwritten", "over\\x0dwritten"),
        ("\u061c\u200e\u200f\u202a\u2066\u2069", "\\u061c\\u200e\\u200f\\u202a\\u2066\\u2069"),
        ("file\udcff\u2028", "file\\udcff\\u2028"),
        ("line\n\ttab", "line\n\ttab"),
        *[(t, t) for t in ("Grüße \\x1b", "سلام می\u200cخوانم", "👩\u200d🚀", "\u00a0")],
    ],
)
def test_what_is_obeyed_is_shown_and_the_rest_is_as_it_was(text, expected):
    assert visible(text) == expected == visible(expected)


def test_every_print_in_a_command_is_clean_on_both_streams(capsys):
    before = sys.stdout, sys.stderr
    with clean_output():
        for stream in (sys.stdout, sys.stderr):
            print(HOSTILE, file=stream)
            stream.write(HOSTILE)
            stream.writelines([HOSTILE, "\n"])
            assert stream.isatty() is False and stream.encoding
    assert (sys.stdout, sys.stderr) == before
    for printed in capsys.readouterr():
        assert shown(printed).count(visible(HOSTILE)) == 3


def test_bars_of_downloads_move_as_they_did(capsys):
    from tqdm import tqdm

    with clean_output():
        for _ in tqdm(range(2), desc="outer\x1b[2J", mininterval=0):
            for _ in tqdm(range(2), position=1, mininterval=0, leave=False):
                pass
    printed = capsys.readouterr().err
    assert "\r" in printed and "\x1b[A" in printed and "\\x1b[2J" in printed
    shown(printed.replace("\x1b[A", "").replace("\r", ""))


def test_a_console_colours_by_styles_alone():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(Text(HOSTILE, style="red"), HOSTILE)
    console.print(HOSTILE, table, Text(HOSTILE), "[bold]as written[/] [/x] :smile:")
    console.print("x", style=Style(color="red"))
    printed = stream.getvalue()
    assert "\x1b[31mx\x1b[0m" in printed and "[bold]as written[/] [/x] :smile:" in printed
    plain = shown(re.sub(r"\x1b\[[\d;]*m", "", printed))
    assert plain.count("\\x1b]0;title") == 6 and plain.count("\\u202egnp") == 6


def test_no_other_console_is_made_anywhere():
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                names = {alias.name for alias in node.names}
                assert not names & {"Console", "console", "print", "get_console"}, file
            if isinstance(node, ast.Import) and file.name != "terminal.py":
                assert not any(alias.name.startswith("rich") for alias in node.names), file


# ---- commands ----


def a_file_name(study, here):
    return ["show", f"{here}/{HOSTILE}"]


def a_hub_id(study, here):
    return ["profile", "--model", f"./{HOSTILE}", "--forget", "f", "--retain", "r", "--out", "o"]


def a_question(study, here):
    rows = [{"question": HOSTILE[:-2], "answer": "a"}, {"question": HOSTILE[:-2], "answer": ""}]
    (here / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["check", "--model", str(study / "model"), "--data", str(here / "f.jsonl")]


def a_field(study, here):
    (here / "f.jsonl").write_text(json.dumps({HOSTILE: 1}))
    return ["check", "--model", str(study / "model"), "--data", str(here / "f.jsonl")]


def an_option(study, here):
    return ["profile", f"--{HOSTILE}"]


@pytest.mark.parametrize("case", [a_file_name, a_hub_id, a_question, a_field, an_option])
def test_a_refusal_shows_what_it_names(case, study, tmp_path, capsys):
    assert main(case(study, tmp_path)) == 2
    printed = capsys.readouterr()
    assert shown(printed.out) == "" and shown(printed.err).startswith("error: ")


def test_warnings_and_tracebacks_are_clean(monkeypatch, capsys):
    def failing(**_):
        import warnings

        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr("geffect_fast.ops.backend.build_info", failing)
    with pytest.warns(UserWarning):
        assert main(["env"]) == 1
    assert "\\x1b]0;title" in shown(capsys.readouterr().err)
    monkeypatch.setattr("geffect_fast.ops.backend.build_info", lambda: _raise(InputError(HOSTILE)))
    assert main(["env"]) == 2
    assert "\\x1b]0;title" in shown(capsys.readouterr().err)


def _raise(error):
    raise error


def test_hostile_rows_of_a_run_are_shown_by_show_and_tokens(tmp_path, capsys):
    from synthetic import make_dataset

    from geffect_fast.storage.results_file import save_result

    dataset = make_dataset(n_blocks=2, n_forget=2, n_retain=0, resolve=("group", "sample", "token"))
    text = HOSTILE.replace("\udcff", "")
    texts = dataset["token_text"].astype(object).copy()
    texts[:] = text
    dataset = dataset.assign_coords(
        question=("sample", [text, text]),
        token_text=texts.astype(str),
        objective=[text, *dataset.objective.values[1:]],
    )
    save_result(dataset, tmp_path / "results.nc")
    for command in (["show", str(tmp_path)], ["tokens", str(tmp_path)]):
        main(command)
        printed = capsys.readouterr()
        assert shown(printed.out) and not shown(printed.err)


def test_a_bar_says_a_name_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(True, "measures of the model [bold]x[/]", 3) as update:
        update(completed=1)
    assert "[bold]x[/]" in Text.from_ansi(capsys.readouterr().err).plain
