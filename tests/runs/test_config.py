"""Configs: checked when made, written and read back unchanged, one clear line where wrong."""

import pytest

from geffect_fast.errors import InputError
from geffect_fast.runs.config import ProfileConfig, dump_config, load_config, make_config

GOOD = {
    "model": "someone/model",
    "forget": "org/data:main:train",
    "retain": "org/other",
    "objectives": "ga, npo(beta=0.10)+kl",
}


def test_every_field_is_described():
    assert all(field.description for field in ProfileConfig.model_fields.values())


def test_objectives_become_canonical_strings():
    assert make_config(GOOD).objectives == ("ga", "npo(beta=0.1) + kl")
    assert make_config(GOOD | {"objectives": ["ga", "wga( alpha = 2 )"]}).objectives == (
        "ga",
        "wga(alpha=2)",
    )


def test_paths_become_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    (tmp_path / "forget.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = make_config(GOOD | {"forget": "forget.jsonl", "probes": {"p": "./forget.jsonl"}})
    assert config.forget == config.probes["p"] == str(tmp_path / "forget.jsonl")
    assert config.model == "someone/model"


def test_round_trip_through_yaml(tmp_path):
    config = make_config(
        GOOD
        | {
            "probes": {"general": "org/général"},
            "reduction": "sample",
            "resolve": ["sample"],
            "norms": False,
            "template": "Q: {question}\nA: {answer}",
            "token_budget": 77,
            "threads": 2,
            "dtype": "float64",
        }
    )
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == config


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make_config(GOOD).model = "another"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reductoin": "sum"}, ["unknown field 'reductoin'", "did you mean 'reduction'"]),
        ({"xyzzy": 1}, ["unknown field 'xyzzy'", "known: model,"]),
        ({"reduction": "tokens"}, ["reduction", "'tokens'", "did you mean 'token'"]),
        ({"objectives": "gaa"}, ["objectives", "unknown objective 'gaa'", "'ga'"]),
        ({"objectives": []}, ["objectives", "at least 1"]),
        ({"objectives": ["ga", "ga"]}, ["objective ga is listed twice"]),
        ({"objectives": 3}, ["objectives", "got 3"]),
        ({"objectives": "npo(beta=-1)"}, ["beta must be", "-1"]),
        ({"risk": "nlll"}, ["risk", "'nlll'", "'nll'"]),
        ({"threads": 0}, ["threads", "greater than 0", "got 0"]),
        ({"token_budget": "many"}, ["token_budget", "'many'"]),
        ({"probes": {"retain": "x"}}, ["probes", "'retain' is taken"]),
        ({"device": "gpu"}, ["device 'gpu'", "cuda:N"]),
        ({"model": ""}, ["model", "empty"]),
        ({"resolve": ["token"]}, ["resolve", "'token'"]),
    ],
)
def test_a_wrong_field_is_one_line_with_place_field_and_remedy(change, words):
    with pytest.raises(InputError) as caught:
        make_config(GOOD | change, "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ") and "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="'forget' is missing"):
        make_config({k: v for k, v in GOOD.items() if k != "forget"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not valid YAML at line 2"),
        ("- a\n- b\n", "must hold fields"),
        ("", "must hold fields"),
        ("1: 2\n", "field 1 must be text"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML at line 1"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n" * (text == "model: ["))
    with pytest.raises(InputError, match=words) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)
