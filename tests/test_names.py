"""Names with line breaks, escape codes and bidirectional marks are escaped in every output."""

from __future__ import annotations

import re
import warnings

import pandas as pd
import pytest
from bad_input.case import profile
from step_results import step_dataset

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.errors import GEffectError, GEffectWarning, InputError
from geffect_fast.storage.results_file import save_result
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.run_yaml import dump_config, load_config

NAMES = {
    "a\nb": "a\\nb",
    "a\x1b[31mb\x1b[0m": "a\\x1b[31mb\\x1b[0m",
    "a\tb\rc": "a\\tb\\x0dc",
    "a\u202egpj.b": "a\\u202egpj.b",
    "a\u2028b\x85": "a\\u2028b\\x85",
    "a\x07\x9b2J": "a\\x07\\x9b2J",
}
BOTH = "a\nb\x1b[31mc\x1b[0m"
SHOWN = "a\\nb\\x1b[31mc\\x1b[0m"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028]")


def clean(text, name):
    """Check that the text holds no raw character of the name but those of the text itself."""
    assert not RAW.search(text), RAW.search(text)
    assert "\n" not in name or name not in text
    return text


def test_a_run_in_a_folder_of_that_name(here, capfd):
    name = BOTH
    words = profile(out=name)
    words.remove("--quiet")
    assert main(words) == 0
    out, error = capfd.readouterr()
    assert SHOWN in clean(out, name) and not RAW.search(error.replace("\r", ""))
    page = (here / name / "report.html").read_text(encoding="utf-8")
    assert f": {SHOWN}</title>" in clean(page, name)
    for words in (["report", name], ["export", name, "--to", f"{name}.csv"]):
        assert main(words) == 0
        printed = capfd.readouterr().out
        assert SHOWN in clean(printed, name) and printed.count("\n") == 1
    # The folder itself has the name, and opens by it.
    assert open_run(name).attrs["n_forget"] > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["model", "forget", "probe", "out"])
def test_a_message_about_a_file_of_that_name(here, name, option, capfd):
    if option == "out":
        (here / name).write_text("")
        words = profile(out=name)
    elif option == "probe":
        words = [*profile(), "--probe", f"{name}=gone.jsonl"]
    else:
        words = profile(**{option: f"./{name}"})
    assert main(words) == 2
    line = capfd.readouterr().err
    shown = {NAMES[name], repr(name)[1:-1], NAMES[name].removesuffix("\\x85")}  # as Python strips
    assert any(each in clean(line, name) for each in shown) and line.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_names_them(tmp_path, name):
    config = make_config(
        {
            **{"model": str(tmp_path / name), "forget": "c/d", "retain": "e/f"},
            **{"objectives": "ga", "probes": {name: "x"}, "groups": {name: "0-1"}},
        }
    )
    text = dump_config(config)
    assert not RAW.search(text)
    assert all(line == line.rstrip() and line for line in text.splitlines())  # no folded lines
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == config


def test_a_config_of_plain_names_is_as_it_was(tmp_path):
    plain = {"model": "a/ü", "forget": "日本", "retain": "it's", "objectives": "ga"}
    text = dump_config(make_config(plain))
    assert "model: a/ü\n" in text and "forget: 日本\n" in text and "retain: it's\n" in text


def test_a_comparison_of_runs_of_that_name(tmp_path, monkeypatch, capfd):
    name, here = BOTH, tmp_path
    monkeypatch.chdir(here)
    for seed, run in enumerate((name, f"{name}2")):
        (here / run).mkdir()
        save_result(step_dataset(n_steps=3, seed=seed, resolve=()), here / run / "results.nc")
    assert main(["compare", name, f"{name}2", "--out", "both"]) == 0
    clean(capfd.readouterr().out, name)
    for file in ("summary.csv", "compare.csv"):
        text = clean((here / "both" / file).read_text(encoding="utf-8"), name)
        assert len(pd.read_csv(here / "both" / file)) == text.count("\n") - 1
    for file in (here / "both/plots").glob("*.svg"):
        clean(file.read_text(encoding="utf-8"), name)
    page = ["report", name, f"{name}2", "--out", "page.html"]
    assert main(page) == 0
    assert SHOWN in clean((here / "page.html").read_text(encoding="utf-8"), name)


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_warnings_from_python(name):
    for kind in (GEffectError, InputError):
        assert str(kind(f"file {name} is gone")) == f"file {NAMES[name]} is gone"
    with pytest.raises(InputError) as caught:
        gf.open_run(f"/no/{name}")
    assert NAMES[name] in str(caught.value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.warn(f"about {name}", GEffectWarning, stacklevel=1)
    assert str(said[0].message) == f"about {NAMES[name]}"
