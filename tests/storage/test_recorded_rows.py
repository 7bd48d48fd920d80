"""A run records its rows, whatever the day; a replay or resumed run of other rows says so."""

from __future__ import annotations

import datetime
import json
import shutil
import warnings

import numpy as np
import pytest
from interrupted import interrupted_at
from models import build, samples

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.errors import GEffectWarning
from geffect_fast.storage.run_yaml import load_config

pytestmark = pytest.mark.usefixtures("undrawn")

DATED = (
    "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}"
)


@pytest.fixture
def dated(study, tmp_path, monkeypatch):
    """A copy of the study, whose tokenizer has a template that reads the clock."""
    here = shutil.copytree(study, tmp_path / "here")
    (here / "model" / "chat_template.jinja").write_text(DATED)
    monkeypatch.chdir(here)
    return here


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 17)


def options(out):
    data = ["--model", "model", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    return [*data, "--quiet", "--out", out]


def test_a_replay_on_another_day_is_the_same(dated, monkeypatch, capsys):
    assert main(["profile", *options("run"), "--objectives", "ga"]) == 0
    config = load_config("run/run.yaml")
    assert config.date == "2024-07-26" and set(config.rows) == {"forget", "retain"}
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert main(["profile", "--config", "run/run.yaml", "--quiet", "--out", "again"]) == 0
    first, again = gf.open_run("run"), gf.open_run("again")
    assert first.attrs["digests"] == again.attrs["digests"] and first.attrs["date"] == config.date
    np.testing.assert_array_equal(first["g_effect"], again["g_effect"])
    assert capsys.readouterr().err == ""
    words = ["profile", "--config", "run/run.yaml", "--quiet", "--date", "2025-01-02"]
    assert main([*words, "--out", "later"]) == 0
    assert gf.open_run("later").attrs["digests"] != first.attrs["digests"]
    assert capsys.readouterr().err == ""  # another day was asked for


def test_a_replay_of_other_rows_is_told(dated, capsys):
    assert main(["profile", *options("run"), "--objectives", "ga"]) == 0
    (dated / "model" / "chat_template.jinja").write_text(DATED.replace("%Y", "%y"))
    assert main(["profile", "--config", "run/run.yaml", "--quiet", "--out", "again"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: the rows of forget are other tokens than the config recorded")
    rows, template = said.splitlines()
    assert "its chat template has changed" in rows
    assert template.startswith("warning: chat_template.jinja of --model is not what the run in")


def test_a_training_goes_on_with_its_own_rows_alone(dated, monkeypatch, capsys):
    words = ["unlearn", *options("run"), "--objective", "ga", "--steps", "2", "--batch-size", "2"]
    with interrupted_at(2):
        assert main(words) == 130
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    resume = ["unlearn", "--resume", "--quiet", "--out", "run"]
    capsys.readouterr()
    row = json.loads((dated / "forget.jsonl").read_text().splitlines()[0])
    before = (dated / "forget.jsonl").read_text()
    changed = before.replace(row["answer"], "Nobody.", 1)
    (dated / "forget.jsonl").write_text(changed)
    assert main(resume) == 2
    said = capsys.readouterr().err
    assert "resume: forget.jsonl of --forget is not what the run" in said
    (dated / "forget.jsonl").write_text(before)
    assert main(resume) == 0


def test_rows_beyond_the_positions_of_a_model_are_named():
    model, rows = build("llama"), samples([5, 9], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        gf.profile(model, None, forget=rows, retain=rows, objectives=["ga"])
    model.config.max_position_embeddings = 8
    with pytest.warns(GEffectWarning, match=r"forget: row 1 .* has 9 tokens, .* 8 positions"):
        gf.profile(model, None, forget=rows, retain=rows[:1], objectives=["ga"])
