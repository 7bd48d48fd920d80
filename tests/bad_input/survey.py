"""The survey's assessment: unusable objectives, originals and relearnings."""

from __future__ import annotations

from bad_input.case import Case, both, holds
from bad_input.evaluate import evaluate

from geffect_fast.arguments import checked_config
from geffect_fast.storage.run_yaml import dump_config
from geffect_fast.unlearn_settings import UnlearnConfig


def survey(*more: str, **changes: str | None) -> list[str]:
    """An assessment that works, with some options changed."""
    given = {"metrics": None, "suite": "survey", "holdout": "general.jsonl"}
    return evaluate(*more, **given | changes)


def made_by_po(here, _patch):
    """Make the model look as if a run of `po` wrote it, without the refusals that the run read."""
    config = checked_config(
        UnlearnConfig,
        {
            "model": str(here / "model"),
            "forget": str(here / "forget.jsonl"),
            "retain": str(here / "retain.jsonl"),
            "objective": "po",
            "steps": 1,
        },
    )
    (here / "po").mkdir()
    (here / "po/run.yaml").write_text(dump_config(config), encoding="utf-8")
    (here / "model").rename(here / "po/model")


CASES = [
    Case(
        "an original without the survey",
        evaluate("--original", "model"),
        "original: goes with suite survey",
        "leave it out",
    ),
    Case(
        "objectives of an evaluation without the survey",
        evaluate("--objectives", "ga"),
        "objectives: goes with suite survey",
        "leave it out",
    ),
    Case(
        "refusals without the survey",
        evaluate("--refusals", "refusals.txt"),
        "refusals: goes with suite survey",
        "leave it out",
    ),
    Case(
        "a relearning without the survey",
        evaluate("--relearn", "steps=2"),
        "relearn: goes with suite survey",
        "leave it out",
    ),
    Case(
        "an unknown objective of the survey",
        survey("--objectives", "gaa", original="model"),
        "--objectives: unknown",
        "did you mean 'ga'?",
    ),
    Case(
        "an objective of the survey twice",
        survey("--objectives", "npo,npo(beta=0.1)", original="model"),
        "--objectives: 'npo(beta=0.1)' is listed twice",
        "leave one out",
    ),
    Case(
        "objectives of a survey without an original",
        survey("--objectives", "ga"),
        "objectives: their effects are those at the model before unlearning",
        "give it (--original)",
    ),
    Case(
        "an objective of the survey that needs refusals",
        survey("--objectives", "po", original="model"),
        "needs refusals",
        "--refusals FILE",
    ),
    Case(
        "an original that is not there",
        survey(original="./gone/model"),
        "original ./gone/model",
        "give a folder or a hub id",
    ),
    Case(
        "a setting of relearning without a value",
        survey("--relearn", "steps"),
        "--relearn 'steps' must be FIELD=VALUE",
        "such as steps=20",
    ),
    Case(
        "a relearning of no steps in the survey",
        survey("--relearn", "steps=0"),
        "relearn: steps: should be greater than 0",
        "got 0",
    ),
    Case(
        "a setting of relearning with a typo",
        survey("--relearn", "n_row=2"),
        "relearn: unknown setting 'n_row'",
        "did you mean 'n_rows'?",
    ),
    Case(
        "a preset of relearning with a typo",
        survey("--relearn", "preset=sam-wmpd"),
        "relearn: preset: unknown 'sam-wmpd'",
        "did you mean 'sam-wmdp'?",
    ),
    Case(
        "metrics of the survey's relearning",
        survey("--relearn", "metrics=nll"),
        "relearn: unknown setting 'metrics'",
        "known: ",
    ),
    Case(
        "the survey without a hold-out",
        survey(holdout=None),
        "metric min_k needs hold-out data",
        "give rows that no model was trained on",
    ),
    Case(
        "a model of a run whose config is damaged",
        survey(models="made/model"),
        "made/run.yaml",
        "not valid YAML at line 1",
        both(
            holds("made/run.yaml", "["),
            lambda here, _: (here / "model").rename(here / "made/model"),
        ),
    ),
    Case(
        "a model of a run that needs refusals",
        survey(models="po/model", original="po/model"),
        "needs refusals",
        "--refusals FILE",
        made_by_po,
    ),
]
