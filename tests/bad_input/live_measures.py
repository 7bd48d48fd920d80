"""Metrics measured during a training: wrong times, wrong data, and wrong probes beside them."""

from __future__ import annotations

from bad_input.case import Case
from bad_input.unlearn import call, unfinished, unlearn
from models import samples

import geffect_fast as gf

HOLDOUT = samples([6, 5], 3)


def callback(every=2, **more):
    """A callback in a Trainer, with the given arguments."""

    def make(_here):
        gf.integrations.GEffectCallback({"forget": [], "retain": []}, every, **more)

    return make


CASES = [
    Case(
        "metrics measured every no update",
        unlearn(evaluate_every="0"),
        "--evaluate-every: should be",
        "greater than 0, got 0",
    ),
    Case(
        "metrics measured less often than there are steps",
        unlearn(evaluate_every="3"),
        "--evaluate-every: 3 is more than the 2 steps",
        "give at most as many",
    ),
    Case(
        "metrics measured where there is no probe",
        unlearn(steps="6", probe_every="2", evaluate_every="3"),
        "--evaluate-every: 3 is no multiple of probe_every, 2",
        "give one, so that measures stand beside effects",
    ),
    Case(
        "no rows for metrics",
        unlearn(evaluate_every="1", evaluate_rows="0"),
        "--evaluate-rows: must be a whole number of at least 1, or all",
        "got '0'",
    ),
    Case(
        "rows for metrics that are none",
        unlearn(evaluate_rows="2"),
        "--evaluate-rows: no metric is measured",
        "name metrics, or give evaluate_every",
    ),
    Case(
        "a hold-out that no metric reads",
        unlearn(holdout="retain.jsonl"),
        "--holdout: no metric is measured that could read it",
        "name metrics, or give evaluate_every",
    ),
    Case(
        "a retain model that no metric reads",
        unlearn(retain_model="model"),
        "--retain-model: no metric is measured that could read it",
        "name metrics, or give evaluate_every",
    ),
    Case(
        "an unknown metric on the way",
        unlearn(metrics="probabilty"),
        "metrics: unknown 'probabilty'",
        "did you mean 'probability'?",
    ),
    Case(
        "an unknown suite on the way",
        unlearn(suite="tofuu"),
        "suite: unknown 'tofuu'",
        "did you mean 'tofu'?",
    ),
    Case(
        "membership on the way without a hold-out",
        unlearn(metrics="min_k"),
        "metric min_k needs hold-out data",
        "give rows that no model was trained on",
    ),
    Case(
        "forget quality on the way without a retain model",
        unlearn(metrics="forget_quality"),
        "metric forget_quality needs a model trained without the forget rows",
        "give one, or its log",
    ),
    Case(
        "a metric that compares, on the way, without a reference",
        unlearn(metrics="reference", holdout="retain.jsonl"),
        "metric reference needs a reference model",
        "give one, as reference_model",
    ),
    Case(
        "a hold-out that is not there",
        unlearn(metrics="min_k", holdout="gone.jsonl"),
        "gone.jsonl",
        "give a file of JSON lines",
    ),
    Case(
        "a retain model that is not there",
        unlearn(metrics="forget_quality", retain_model="gone/model"),
        "gone/model",
        "give a folder, or check the id",
    ),
    Case(
        "resume with other metrics",
        unlearn("--resume", metrics="probability"),
        "resume: metrics is ('probability',)",
        "give that, or begin another run",
        unfinished,
    ),
    Case(
        "metrics that read text, of tokens",
        call(metrics="rouge_l"),
        "forget: metric rouge_l reads text",
        "give one (--tokenizer), or leave the metric out",
    ),
    Case(
        "membership of tokens without a hold-out",
        call(metrics="min_k"),
        "metric min_k needs hold-out data",
        "give rows that no model was trained on",
    ),
    Case(
        "a probe of the hold-out's name",
        call(metrics="min_k", holdout=HOLDOUT, probes={"holdout": HOLDOUT}),
        "probes: the name 'holdout' is taken",
        "choose another",
    ),
    Case(
        "a callback whose metrics stand beside no probe",
        callback(evaluate_every=3, metrics="probability"),
        "evaluate_every: 3 is no multiple of every, 2",
        "give one, so that measures stand beside effects",
    ),
    Case(
        "a callback of rows for metrics that are none",
        callback(evaluate_rows=3),
        "evaluate_rows: no metric is measured",
        "name metrics, or give evaluate_every",
    ),
    Case(
        "a callback that measures every no update",
        callback(evaluate_every=0),
        "evaluate_every: should be greater than 0",
        "got 0",
    ),
]
