"""Spellings of options: several values behind one option, help in panels, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from geffect_fast.cli import app, main
from geffect_fast.cli.options import spread

COMMANDS = typer.main.get_command(app)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("profile --objectives ga wga -m x", "profile --objectives ga --objectives wga -m x"),
        (
            "profile --objective=ga wga npo",
            "profile --objective=ga --objective wga --objective npo",
        ),
        ("sweep -m x more --objectives a b", "sweep -m x more --objectives a --objectives b"),
        ("profile --objectives a b -- c", "profile --objectives a --objectives b -- c"),
        (
            "evaluate --models A B --metrics p q",
            "evaluate --models A --models B --metrics p --metrics q",
        ),
        ("unlearn --objective ga wga", "unlearn --objective ga wga"),
        ("show run", "show run"),
        ("unknown --objectives a b", "unknown --objectives a b"),
        ("", ""),
    ],
)
def test_words_behind_a_repeatable_option_each_have_it(written, read):
    assert spread(written.split(), COMMANDS) == read.split()


@pytest.mark.parametrize("name", ["--objective", "--objectives"])
@pytest.mark.parametrize("command", ["profile", "sweep", "check"])
def test_objectives_go_by_either_name_with_spaces_or_commas(command, name, monkeypatch, tmp_path):
    taken = []
    for place in ("execute", "execute_check"):
        monkeypatch.setattr(
            f"geffect_fast.measure.execute.{place}",
            lambda config, *more, **options: taken.append(config) or sys.exit(0),
        )
    data = ["--data", "f"] if command == "check" else ["--forget", "f", "--retain", "r"]
    out = [] if command == "check" else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main([command, "-m", "m", *data, name, "ga,npo(beta=0.5)", "wga(alpha=2)", "-q", *out])
    assert [*taken[0].objectives] == ["ga", "npo(beta=0.5)", "wga(alpha=2)"]


def test_a_word_behind_an_option_of_one_value_is_named(tmp_path, capsys):
    given = ["-m", "m", "--forget", "f", "--retain", "r", "--out", str(tmp_path / "run")]
    assert main(["unlearn", *given, "--steps", "1", "--objective", "ga", "wga"]) == 2
    assert "unexpected extra argument(s) (wga)" in capsys.readouterr().err


def test_help_has_panels_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["unlearn", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    panels = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert panels == [
        *("Options", "Models and data", "Reading", "Effects", "Machine", "Metrics", "Training"),
    ]
    text = " ".join(" ".join(lines).replace("│", " ").split())
    assert "sum: not at all. Default: token." in text and "--steps" in text


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("geffect-fast prof", {"profile"}),
        ("geffect-fast profile --reduc", {"--reduction"}),
        ("geffect-fast profile --reduction s", {"sample", "sum"}),
    ],
)
def test_a_shell_completes(typed, offered):
    done = subprocess.run(
        [sys.executable, "-m", "geffect_fast"],
        env=os.environ
        | {
            "_GEFFECT_FAST_COMPLETE": "complete_bash",
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(typed.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == offered
