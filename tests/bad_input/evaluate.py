"""Evaluations: data and models that metrics need, unknown names, saved logs of other splits."""

from __future__ import annotations

import json
import sys

from bad_input.case import Case, holds, weight
from models import build, samples

import geffect_fast as gf


def evaluate(*more: str, **changes: str | None) -> list[str]:
    """An `evaluate` command line that works, with some options changed; None leaves one out."""
    options = {
        "models": "model",
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "metrics": "probability",
        "out": "run",
    } | changes
    pairs = [(f"--{key.replace('_', '-')}", value) for key, value in options.items()]
    words = (w for pair in pairs if pair[1] is not None for w in pair)
    return ["evaluate", "--quiet", *words, *more]


def changed(change, name="forget.jsonl"):
    """Change the rows of a data file; the change is also given each row's number."""

    def put(here, _patch):
        lines = (here / name).read_text(encoding="utf-8").splitlines()
        rows = [change(i, json.loads(line)) for i, line in enumerate(lines)]
        (here / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    return put


def rows_with(**fields):
    """Add fields to every forget row."""
    return changed(lambda _i, row: row | fields)


def rows_without(*fields, only=None):
    """Take fields out of all forget rows, or of one of them."""
    return changed(
        lambda i, row: {k: v for k, v in row.items() if k not in fields or only not in (None, i)}
    )


def with_log(text):
    return holds("log.json", text)


def log_of(n, prompt="Question: something else\n"):
    column = {str(i): 1.0 for i in range(n)}
    return json.dumps(
        {
            "eval_log_forget.json": {
                "avg_paraphrased_loss": column,
                "average_perturb_loss": {key: [1.0, 2.0] for key in column},
                "generated_text": {key: [prompt, "x", "y"] for key in column},
            }
        }
    )


def other_vocabulary(here, _patch):
    from geffect_fast.demo import Size, make_model, save, train_tokenizer

    tokenizer = train_tokenizer(["an altogether different text of few words"], 280)
    save(make_model(tokenizer, Size(hidden=16, n_layers=1)), tokenizer, here / "other")


def call(**changes):
    """A call from Python on tokenised rows."""
    rows = samples([6, 5, 7])

    def run(_here):
        given = {"model": build("llama"), "forget": rows, "retain": rows, "metrics": "nll"}
        given |= {key: value() if callable(value) else value for key, value in changes.items()}
        return gf.evaluate(given.pop("model"), given.pop("tokenizer", None), **given)

    return run


def nan_logits():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda _m, _a, out: out * float("nan"))
    return model


def measured(here, _patch):
    """A folder of measures."""
    from geffect_fast.cli import main

    assert main(evaluate(out="measured")) == 0


FORGET_QUALITY = {"metrics": "forget_quality", "retain_model": "log.json"}

CASES = [
    # ---- names ----
    Case(
        "a metric with a typo",
        evaluate(metrics="probabilty"),
        "'probabilty'",
        "did you mean 'probability'?",
    ),
    Case(
        "a format that the data of an evaluation do not have",
        evaluate("--data-format", "csv"),
        "forget.jsonl",
        "has no 'question'",
    ),
    Case("a metric that is none", evaluate(metrics="xyzzy"), "'xyzzy'", "known: "),
    Case("a suite with a typo", evaluate("--suite", "tofuu"), "'tofuu'", "did you mean 'tofu'?"),
    Case(
        "a task of lm-evaluation-harness without the package",
        evaluate("--lm-eval-tasks", "arc_easy"),
        "lm_eval_tasks needs the package lm_eval",
        "pip install 'geffect-fast[lm-eval]'",
        lambda _here, patch: patch.setitem(sys.modules, "lm_eval.tasks", None),
    ),
    Case(
        "a task twice",
        evaluate("--lm-eval-tasks", "arc_easy,arc_easy"),
        "'arc_easy' is listed twice",
        "leave one out",
    ),
    Case(
        "a limit of tasks and no tasks",
        evaluate("--lm-eval-limit", "5"),
        "lm-eval-limit",
        "goes with lm_eval_tasks",
    ),
    Case(
        "a folder of tasks and no tasks",
        evaluate("--lm-eval-include", "model"),
        "lm-eval-include",
        "goes with lm_eval_tasks",
    ),
    Case(
        "no row of a task",
        evaluate("--lm-eval-tasks", "arc_easy", "--lm-eval-limit", "0"),
        "--lm-eval-limit",
        "greater than 0",
    ),
    Case("tasks that are no names", call(lm_eval_tasks=[3]), "lm_eval_tasks", "valid string"),
    Case("a metric twice", evaluate(metrics="nll,nll"), "'nll' is listed twice", "leave one out"),
    Case(
        "a hyper-parameter with a typo",
        evaluate("--holdout", "general.jsonl", metrics="min_k(kk=0.2)"),
        "unknown field 'kk'",
        "did you mean 'k'?",
    ),
    Case(
        "a hyper-parameter out of range",
        evaluate(metrics="min_k(k=0)"),
        "metric min_k: k",
        "greater than 0",
    ),
    Case(
        "a hyper-parameter above its range",
        evaluate(metrics="min_k(k=1.5)"),
        "metric min_k: k",
        "less than or equal to 1",
    ),
    Case(
        "a hyper-parameter that is no pair",
        evaluate(metrics="min_k(0.2)"),
        "'0.2'",
        "such as k=0.2",
    ),
    Case(
        "a hyper-parameter's unknown word",
        evaluate(metrics="truth_ratio(aggregation=toful)"),
        "'toful'",
        "did you mean 'tofu'?",
    ),
    Case(
        "parentheses that do not close",
        evaluate(metrics="min_k(k=0.2"),
        "'min_k(k=0.2'",
        "must be a name",
    ),
    Case("metrics that are no names", call(metrics=[3]), "got 3", "give names"),
    # ---- data that metrics need ----
    Case(
        "membership without a hold-out",
        evaluate(metrics="min_k"),
        "metric min_k needs hold-out data (--holdout FILE)",
        "give rows that no model was trained on",
    ),
    Case(
        "the hold-out is not there",
        evaluate("--holdout", "no.jsonl", metrics="loss"),
        "holdout",
        "no.jsonl",
    ),
    Case(
        "no perturbed answers",
        evaluate(metrics="truth_ratio"),
        "forget: row 0 (counting from 0) has no 'p",
        "forget01_perturbed.json",
        rows_without("perturbed_answer"),
    ),
    Case(
        "a paraphrased question is missing in one row",
        evaluate(metrics="paraphrased_extraction_strength"),
        "forget: row 1 (counting from 0) has no 'paraphrased_question'",
        "every row of the set",
        rows_without("paraphrased_question", only=1),
    ),
    Case(
        "no paraphrased question",
        evaluate(metrics="paraphrased_extraction_strength"),
        "forget: row 0 (counting from 0) has no 'paraphrased_question'",
        "leave the metric out",
        rows_without("paraphrased_question"),
    ),
    Case(
        "perturbed answers of the wrong form",
        evaluate(metrics="option_probability"),
        "forget: row 0 (counting from 0): 'perturbed_answer'",
        "non-empty text",
        rows_with(perturbed_answer=[3]),
    ),
    Case(
        "an empty list of perturbed answers",
        evaluate(metrics="option_probability"),
        "forget: row 0 (counting from 0): 'perturbed_answer'",
        "non-empty text",
        rows_with(perturbed_answer=[]),
    ),
    Case(
        "choices without the answer",
        evaluate(metrics="multiple_choice"),
        "none of the 2 choices",
        "give an index from 0 to 1",
        rows_with(choices=["a", "b"]),
    ),
    Case(
        "choices from nothing",
        evaluate(metrics="multiple_choice"),
        "forget: row 0 (counting from 0) has no 'choices'",
        "leave the metric out",
        rows_without("perturbed_answer"),
    ),
    Case("an empty forget set", evaluate(), "forget", "at least one", holds("forget.jsonl", "")),
    Case("no forget set", evaluate(forget=None), "--forget", "give it"),
    Case(
        "model utility without its sets",
        evaluate(metrics="model_utility"),
        "real_authors",
        "--probe real_authors=",
    ),
    Case(
        "a probe with a taken name",
        evaluate("--probe", "holdout=general.jsonl"),
        "'holdout' is taken",
        "choose another",
    ),
    Case("tokenised rows and a text metric", call(metrics="rouge_l"), "tokenizer", "give one"),
    Case(
        "tokenised rows and zlib",
        call(metrics="zlib", holdout=samples([5, 6])),
        "forget: metric zlib reads text",
        "give one (--tokenizer)",
    ),
    Case(
        "a perturbed answer for every letter",
        evaluate(metrics="multiple_choice"),
        "forget: row 0 (counting from 0): 26 perturbed answers",
        "give at most 25",
        rows_with(perturbed_answer=[f"answer {i}" for i in range(26)]),
    ),
    Case(
        "a stop with a comma",
        evaluate(metrics="knowledge_memorisation(stops='a,b')"),
        "metrics",
        "such as k=0.2",
    ),
    Case(
        "tokenised rows and paraphrases",
        call(metrics="paraphrased_extraction_strength"),
        "paraphrased_question",
        "leave the metric out",
    ),
    Case(
        "examples for a set that is not there",
        evaluate("--probe", "general_icl=general.jsonl"),
        "general_icl: there is no set general",
        "such as forget_icl",
    ),
    Case(
        "examples that are no questions",
        evaluate("--probe", "forget_icl=plain.txt"),
        "forget_icl: its rows are no questions and answers",
        "leave the examples out",
        holds("plain.txt", "one text alone\n"),
    ),
    # ---- models ----
    Case("no model", evaluate(models=None), "models", "give exactly one of --models, --run"),
    Case("models and a run", evaluate("--run", "model"), "models", "give exactly one of --models"),
    Case("a model twice", evaluate("model"), "listed twice", "leave one out"),
    Case("the second model is not there", evaluate("nowhere"), "model nowhere", "no such folder"),
    Case(
        "a run without checkpoints",
        evaluate("--run", "model", models=None),
        "checkpoint-*",
        "give a pattern",
    ),
    Case(
        "the metric reference without one",
        evaluate("--holdout", "general.jsonl", metrics="reference"),
        "metric reference needs a reference model",
        "--reference MODEL",
    ),
    Case(
        "forget quality without a model",
        evaluate(metrics="forget_quality"),
        "metric forget_quality needs a model trained without the forget rows (--retain-model",
        "give one, or its log",
    ),
    Case(
        "models of different vocabularies",
        evaluate("other"),
        "first model",
        "different vocabularies",
        other_vocabulary,
    ),
    Case(
        "a reference of another vocabulary",
        evaluate("--holdout", "general.jsonl", "--reference", "other", metrics="reference"),
        "reference_model",
        "vocabular",
        other_vocabulary,
    ),
    Case(
        "a weight of a model to evaluate that is NaN",
        evaluate(),
        "NaN",
        "healthy checkpoint",
        weight("model.norm.weight", float("nan")),
    ),
    Case("logits that are NaN", call(model=nan_logits), "forget: row 0", "logits are finite"),
    Case(
        "a model that is a path",
        call(model="model"),
        "model: expected a loaded model",
        "from_pretrained",
    ),
    Case(
        "a text longer than the model",
        call(model=lambda: build("gpt2"), forget=samples([300])),
        "forget: row 0",
        "shorten or drop the row",
    ),
    Case(
        "a text longer than max_length",
        evaluate("--max-length", "4"),
        "more than max_length=4",
        "shorten or drop the row",
    ),
    Case(
        "a continuation longer than the model",
        evaluate("--max-new-tokens", "100000", metrics="rouge_l"),
        "max_new_tokens: 100000",
        "give at most",
    ),
    Case("no new tokens", evaluate("--max-new-tokens", "0"), "--max-new-tokens", "greater than 0"),
    Case(
        "gradient norms of a frozen model",
        call(
            model=lambda: build("llama").requires_grad_(False),
            metrics="gradient_norm",
            holdout=samples([5, 6]),
        ),
        "nothing in it can be trained",
        "leave the metric out",
    ),
    Case(
        "largest entries of a frozen model's gradients",
        call(
            model=lambda: build("llama").requires_grad_(False),
            metrics="gradient_norm(convention=mimir)",
            holdout=samples([5, 6]),
        ),
        "nothing in it can be trained",
        "leave the metric out",
    ),
    # ---- runs against effects ----
    Case(
        "a model where runs are set against effects",
        evaluate("--against-effects", "model", models=None),
        "model is not a run and holds no runs",
        "give folders of unlearn",
    ),
    Case(
        "a run that is nowhere against effects",
        evaluate("--against-effects", "nowhere", models=None),
        "nowhere",
        "give its folders",
    ),
    Case(
        "a folder of no runs against effects",
        evaluate("--against-effects", "none", models=None),
        "none is not a run and holds no runs",
        "give folders of unlearn",
        lambda here, _patch: (here / "none").mkdir(),
    ),
    Case(
        "runs of a config against effects",
        evaluate("--config", "e.yaml", models=None),
        "model is not a run and holds no runs",
        "give folders of unlearn",
        holds("e.yaml", "command: evaluate\nagainst_effects: [model]\n"),
    ),
    Case(
        "measures that are none against effects",
        lambda _here: gf.against_effects(["a", "b"], "model"),
        "holds no evaluation.nc",
        "made by evaluate, control or relearn",
    ),
    # ---- saved logs ----
    Case(
        "a log of another split",
        evaluate(**FORGET_QUALITY),
        "of 9 forget rows, and there are 4",
        "of the same split",
        with_log(log_of(9)),
    ),
    Case(
        "a log of other questions",
        evaluate(**FORGET_QUALITY),
        "is not the question of forget row 0",
        "of the same split",
        with_log(log_of(4)),
    ),
    Case(
        "a log that is no JSON",
        evaluate(**FORGET_QUALITY),
        "log.json is no JSON",
        "TOFU's",
        with_log("{"),
    ),
    Case(
        "a log of something else",
        evaluate(**FORGET_QUALITY),
        "eval_log_forget.json",
        "TOFU's",
        with_log("[1, 2]"),
    ),
    Case(
        "a log of odd columns",
        evaluate(**FORGET_QUALITY),
        "not of TOFU's form",
        "aggregate_eval_stat.py",
        with_log(json.dumps({"eval_log_forget.json": {"avg_paraphrased_loss": 3}})),
    ),
    Case(
        "a log where a model is needed",
        evaluate(
            "--holdout", "general.jsonl", metrics="privleak,forget_quality", retain_model="log.json"
        ),
        "privleak",
        "retain_model itself",
        with_log(log_of(4)),
    ),
    # ---- folders ----
    Case(
        "a config of evaluate for profile",
        ["profile", "--config", "e.yaml", "--out", "run"],
        "is of a run of evaluate",
        "geffect-fast evaluate",
        holds("e.yaml", "command: evaluate\n"),
    ),
    Case(
        "a config of profile for evaluate",
        ["evaluate", "--config", "p.yaml", "--out", "run"],
        "is of a run of profile",
        "geffect-fast profile",
        holds("p.yaml", "command: profile\n"),
    ),
    Case(
        "measures where effects are read",
        ["tokens", "measured"],
        "measures of evaluate",
        "open_evaluation",
        measured,
    ),
    Case(
        "no folder of measures",
        lambda _here: gf.open_evaluation("model"),
        "holds no evaluation.nc",
        "made by evaluate, control or relearn",
    ),
]
