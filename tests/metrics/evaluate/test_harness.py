"""Tasks of lm-evaluation-harness beside the measures: scores, refusals, and no lasting change.

Task files and data are local, so that nothing is fetched.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import random
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import write_jsonl
from geffect_fast.demo import save
from geffect_fast.errors import GEffectWarning, InputError

QUESTIONS = 9


def choices_of(rows):
    """Questions with the right answer first or last, and one of another question."""
    asked = []
    for i, row in enumerate(rows[:QUESTIONS]):
        both = [row["answer"], row["perturbed_answer"][0]]
        asked.append(
            {
                "question": row["question"],
                "choices": both if i % 2 == 0 else both[::-1],
                "right": i % 2,
            }
        )
    return asked


def write_task(folder, name, data, **more):
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("tasks")
    write_jsonl(choices_of(rows), folder / "asked.jsonl")
    write_task(folder, "invented_authors", folder / "asked.jsonl")
    write_task(
        folder,
        "invented_answers",
        folder / "asked.jsonl",
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{choices[right]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    write_task(folder, "authors_without_data", folder / "nowhere.jsonl")
    write_task(folder, "authors_at_odds", folder / "asked.jsonl", doc_to_choice="nothing_of_it")
    return folder


@pytest.fixture(autouse=True)
def few_known(monkeypatch):
    """Leave out the harness's index of its own tasks, whose thousands of files take seconds."""
    if "lm_eval.tasks" in sys.modules:
        tasks = sys.modules["lm_eval.tasks"]
        own = functools.partial(tasks.TaskManager, include_defaults=False)
        monkeypatch.setattr(tasks, "TaskManager", own)


@pytest.fixture(scope="module")
def few(sets):
    return {"forget": sets["forget"][:3], "retain": sets["retain"][:3], "metrics": "nll"}


@pytest.fixture(scope="module")
def found(model, tokenizer, few, tasks):
    pytest.importorskip("lm_eval")
    return gf.evaluate(
        model,
        tokenizer,
        **few,
        lm_eval_tasks=["invented_authors", "invented_answers"],
        lm_eval_include=str(tasks),
    )


def right_by_hand(model, tokenizer, asked):
    """Whether the right choice has the highest log-probability, one sequence at a time."""
    right = []
    for row in asked:
        begun = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        of = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            places = range(len(begun), len(whole))
            of.append(sum(float(logits[at - 1, whole[at]]) for at in places))
        right.append(int(np.argmax(of)) == row["right"])
    return np.array(right, float)


def test_scores_are_those_of_the_model_run_by_itself(found, model, tokenizer, rows, few):
    right = right_by_hand(model, tokenizer, choices_of(rows))
    assert 0 < right.mean() < 1
    of = found.sel(metric="invented_authors/acc", set="lm_eval")
    assert float(of.value) == pytest.approx(right.mean(), abs=1e-12)
    wide = 1.96 * right.std(ddof=1) / np.sqrt(QUESTIONS)
    assert float(of.value_low) == pytest.approx(right.mean() - wide, abs=1e-9)
    assert float(of.value_high) == pytest.approx(right.mean() + wide, abs=1e-9)
    assert of.statistic == "task score"
    assert "invented_authors/acc_norm" in found["metric"].values
    assert "invented_answers/exact_match" in found["metric"].values
    about = json.loads(found.attrs["metrics"])[1]
    assert about["name"] == "invented_authors/acc"
    assert about["parameters"]["rows"] == QUESTIONS
    assert "0 examples before each, 9 rows" in about["about"]
    # The metrics are as without tasks, to the bit.
    plain = gf.evaluate(model, tokenizer, **few)
    beside = found.sel(metric=["nll"], set=["forget", "retain"])
    for name in plain:
        xr.testing.assert_identical(beside[name], plain[name])
    assert found.value.sel(metric="nll", set="lm_eval").isnull()
    assert found.value.sel(metric="invented_authors/acc", set="forget").isnull()
    assert found.sample_value.sel(metric="invented_authors/acc").isnull().all()


def test_scores_are_those_of_the_harness_itself(found, model, tokenizer, tasks):
    harness = pytest.importorskip("lm_eval")
    own = harness.simple_evaluate(
        harness.models.huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer)),
        tasks=["invented_authors"],
        task_manager=harness.tasks.TaskManager(include_path=str(tasks)),
        log_samples=False,
    )["results"]["invented_authors"]
    for score in ("acc", "acc_norm"):
        of = found.sel(metric=f"invented_authors/{score}", set="lm_eval")
        assert float(of.value) == own[f"{score},none"]
        wide = 1.96 * own[f"{score}_stderr,none"]
        assert float(of.value_high - of.value) == pytest.approx(wide, abs=1e-12)


def test_model_tokenizer_and_random_numbers_are_left_as_found(model, tokenizer, few, tasks):
    pytest.importorskip("lm_eval")
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    asked_grads = [p.requires_grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    objects = {*map(id, model.parameters())}
    settings = model.generation_config.to_dict()
    fields = {*vars(model)}
    padding = tokenizer.pad_token, len(tokenizer), tokenizer.padding_side
    logger = logging.getLogger("lm_eval")
    logging_before = logger.level, logger.propagate, list(logger.handlers)
    seeded = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    try:
        gf.evaluate(
            model,
            tokenizer,
            **few,
            lm_eval_tasks="invented_authors, invented_answers",
            lm_eval_include=str(tasks),
            lm_eval_limit=2,
        )
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
        assert asked_grads == [p.requires_grad for p in model.parameters()]
        assert all(bool((p.grad == 1).all()) for p in model.parameters())
        assert objects == {*map(id, model.parameters())}
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
    assert settings == model.generation_config.to_dict()
    assert fields == {*vars(model)}
    assert padding == (tokenizer.pad_token, len(tokenizer), tokenizer.padding_side)
    assert logging_before == (logger.level, logger.propagate, list(logger.handlers))
    assert seeded[0] == random.getstate()
    assert seeded[1] == np.random.get_state()[1].tolist()
    assert torch.equal(seeded[2], torch.get_rng_state())


def test_weights_that_were_untied_stay_so(model, tokenizer, few, tasks):
    pytest.importorskip("lm_eval")
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = True
    head = untied.lm_head.weight
    assert head is not untied.model.embed_tokens.weight
    gf.evaluate(
        untied,
        tokenizer,
        **few,
        lm_eval_tasks=["invented_authors"],
        lm_eval_include=str(tasks),
        lm_eval_limit=1,
    )
    assert untied.lm_head.weight is head
    assert untied.model.embed_tokens.weight is not head


def test_limit_is_the_first_rows(model, tokenizer, few, tasks, rows):
    pytest.importorskip("lm_eval")
    result = gf.evaluate(
        model,
        tokenizer,
        **few,
        lm_eval_tasks=["invented_authors"],
        lm_eval_include=str(tasks),
        lm_eval_limit=4,
    )
    right = right_by_hand(model, tokenizer, choices_of(rows)[:4])
    score = result.value.sel(metric="invented_authors/acc", set="lm_eval")
    assert float(score) == pytest.approx(right.mean(), abs=1e-12)


def test_texts_longer_than_the_model_are_told(model, tokenizer, few, tasks, tmp_path):
    pytest.importorskip("lm_eval")
    long = model.config.max_position_embeddings * 8
    asked = [{"question": "A. " * long, "choices": ["B.", "C."], "right": i} for i in (0, 1)]
    write_jsonl(asked, tmp_path / "long.jsonl")
    write_task(tmp_path, "long_authors", tmp_path / "long.jsonl")
    with pytest.warns(GEffectWarning, match="lm_eval cut texts that are longer than the model"):
        gf.evaluate(
            model,
            tokenizer,
            **few,
            lm_eval_tasks=["long_authors"],
            lm_eval_include=str(tmp_path),
        )


def test_command_of_two_models(
    tasks, model, retrained, tokenizer, sets, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    for name, each in (("known", model), ("retrained", retrained)):
        save(each, tokenizer, tmp_path / name)
    for name in ("forget", "retain"):
        write_jsonl(sets[name][:3], tmp_path / f"{name}.jsonl")
    command = ["evaluate", "--models", "known", "retrained", "--forget", "forget.jsonl"]
    command += ["--retain", "retain.jsonl", "--metrics", "nll", "--out", "run"]
    command += ["--lm-eval-tasks", "invented_authors", "--lm-eval-include", str(tasks)]
    assert main([*command, "--lm-eval-limit", "6"]) == 0
    printed = capsys.readouterr()
    assert "invented_authors/acc" in printed.out
    assert "1.96 of its standard errors" in " ".join(printed.out.split())
    found = gf.open_evaluation("run")
    for name, each in (("known", model), ("retrained", retrained)):
        own = gf.evaluate(
            each,
            tokenizer,
            forget="forget.jsonl",
            retain="retain.jsonl",
            metrics="nll",
            lm_eval_tasks="invented_authors",
            lm_eval_include=str(tasks),
            lm_eval_limit=6,
        )
        at = {"metric": "invented_authors/acc", "set": "lm_eval"}
        assert float(found.value.sel(model=name, **at)) == float(own.value.sel(**at))
    table = pd.read_csv("run/summary.csv")
    of = table[(table["metric"] == "invented_authors/acc") & table["value"].notna()]
    assert of["set"].tolist() == ["lm_eval", "lm_eval"]
    assert of["model"].tolist() == ["known", "retrained"]
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "invented_authors/acc_norm" in page
    assert "acc of invented_authors (lm_eval " in page
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lm_eval_tasks": "invented_autors"}, "unknown 'invented_autors'; did you mean 'invented"),
        ({"lm_eval_tasks": "xyzzy-xyzzy-xyzzy"}, "`lm_eval ls tasks` lists all tasks"),
        ({"lm_eval_tasks": "authors_without_data"}, "the data of authors_without_data cannot be"),
        ({"lm_eval_tasks": "authors_at_odds"}, "authors_at_odds cannot be "),
        ({"tokenizer": None}, "the model needs a tokenizer"),
        ({"probes": {"lm_eval": [{"question": "a", "answer": "b"}]}}, "choose another"),
        ({"lm_eval_include": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_line(changes, said, model, tokenizer, few, tasks):
    pytest.importorskip("lm_eval")
    given = {"lm_eval_tasks": "invented_authors", "lm_eval_include": str(tasks)} | changes
    reads = given.pop("tokenizer", tokenizer)
    with pytest.raises(InputError) as refused:
        gf.evaluate(model, reads, **few, **given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_package_is_told_before_anything_is_run(model, tokenizer, few, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(InputError, match=r"pip install 'geffect-fast\[lm-eval\]'"):
        gf.evaluate(model, tokenizer, **few, lm_eval_tasks=["arc_easy"])
