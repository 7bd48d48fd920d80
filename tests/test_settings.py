"""Configs: made canonical, written and read back unchanged; wrong ones are in `bad_input`."""

import pytest
from pydantic import model_validator

from geffect_fast.arguments import checked_config, make_config, with_settings
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.settings import ProfileConfig, Reading, Settings
from geffect_fast.storage.run_yaml import dump_config, load_config

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


def test_commas_within_an_objective_part_no_list(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = []

    def unlearn(config, *_args, **_kwargs):
        found.append(config)
        raise InputError("enough")

    monkeypatch.setattr("geffect_fast.training.execute.execute_unlearn", unlearn)
    words = ["unlearn", "-m", "a/b", "-f", "c/d", "-r", "e/f", "--steps", "1", "--out", "run"]
    more = ["--objectives", "satimp(beta1=5,beta2=1),wga", "--objectives", "npo(beta=0.5)"]
    assert main([*words, "--objective", "ga", *more]) == 2
    assert found[0].measured == ("ga", "satimp(beta1=5, beta2=1)", "wga", "npo(beta=0.5)")
    assert found[0].objective == "ga"


def test_tasks_are_names_and_own_task_files_are_inputs(tmp_path):
    (tmp_path / "own.yaml").write_text("task: own", encoding="utf-8")
    config = EvaluateConfig(
        models="a/b",
        forget="c/d",
        retain="e/f",
        lm_eval_tasks=["own , arc_easy", "mmlu"],
        lm_eval_include=str(tmp_path),
        lm_eval_limit=3,
    )
    assert config.lm_eval_tasks == ("own", "arc_easy", "mmlu")
    assert config.inputs()["--lm-eval-include own.yaml"] == str(tmp_path / "own.yaml")
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml") == config


def test_settings_are_in_a_docstring_however_python_keeps_it():
    def documented(text):
        def function(**settings): ...

        function.__doc__ = text
        return with_settings(Reading)(function).__doc__

    text = "One.\n\n    Args:\n        settings:\n        other: last.\n    "
    dedented = "One.\n\nArgs:\n    settings:\n    other: last.\n"  # from Python 3.13 on
    assert documented(text) == documented(dedented)
    assert "\n    max_length: " in documented(text)


def test_a_problem_without_a_field_keeps_its_text():
    class Own(Settings):
        @model_validator(mode="after")
        def check(self):
            raise ValueError("no two of these go together")

    with pytest.raises(InputError, match=r"^no two of these go together$"):
        checked_config(Own, {})
