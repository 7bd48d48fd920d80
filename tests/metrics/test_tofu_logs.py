"""TOFU's own evaluation logs of Phi-1.5: our numbers are those of the published aggregation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import hmean, ks_2samp

from geffect_fast.cli import main
from geffect_fast.demo import Size, make_model, save, train_tokenizer
from geffect_fast.metrics.base import Seen
from geffect_fast.metrics.likelihood import TruthRatio
from geffect_fast.metrics.observed import read_log
from geffect_fast.metrics.overlap import RougeL
from geffect_fast.metrics.tofu import ForgetQuality, ModelUtility
from geffect_fast.storage.evaluation import open_evaluation

pytestmark = pytest.mark.usefixtures("undrawn")

FULL, RETAIN95 = "eval_log_phi_full.json", "eval_log_phi_retain95.json"
FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


def column(log, name, key):
    return np.array(list(log[FILES[name]][key].values()), dtype=np.float64)


def ratio(log, name):
    """TOFU's ratio: the mean probability loss of perturbed answers, beside the paraphrase's."""
    perturbed = column(log, name, "average_perturb_loss").mean(-1)
    return np.exp(perturbed - column(log, name, "avg_paraphrased_loss"))


def utility(log):
    nine = []
    for name in ("retain", "real_authors", "world_facts"):
        right = np.exp(-column(log, name, "avg_gt_loss"))
        if name != "retain":
            wrong = np.exp(-column(log, name, "average_perturb_loss")).sum(-1)
            right = right / (right + wrong)
        truth = np.maximum(0, 1 - 1 / ratio(log, name)).mean()
        nine += [right.mean(), column(log, name, "rougeL_recall").mean(), truth]
    return hmean(nine)


@pytest.fixture(params=[FULL, RETAIN95])
def saved(tofu, request):
    path = tofu / request.param
    return json.loads(path.read_text(encoding="utf-8")), read_log(path)


def test_model_utility(saved):
    log, seen = saved
    (found,) = ModelUtility().measures(Seen(seen, {})).values()
    assert found.value == pytest.approx(utility(log), abs=1e-6)
    assert found.low < found.value < found.high


def test_rouge_is_made_again_from_the_texts(saved):
    log, seen = saved
    for name in FILES:
        np.testing.assert_allclose(
            RougeL().scores(seen[name]), column(log, name, "rougeL_recall"), atol=1e-12
        )


def test_truth_ratios(saved):
    log, seen = saved
    for name in FILES:
        x = ratio(log, name)
        better = np.minimum(x, 1 / x) if name == "forget" else np.maximum(0, 1 - 1 / x)
        np.testing.assert_allclose(TruthRatio().scores(seen[name]), better, atol=1e-12)
        # The log holds the inverse, computed from losses before they were rounded.
        np.testing.assert_allclose(column(log, name, "truth_ratio"), 1 / x, rtol=1e-4)


def test_forget_quality(tofu):
    logs = [json.loads((tofu / file).read_text(encoding="utf-8")) for file in (FULL, RETAIN95)]
    seen, retrained = (read_log(tofu / file) for file in (FULL, RETAIN95))
    expected = ks_2samp(*(ratio(log, "forget") for log in logs)).pvalue
    found = ForgetQuality().measures(Seen(seen, retrained))["forget"]
    assert found.value == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert 0 < expected < 0.05
    same = ForgetQuality().measures(Seen(retrained, retrained))["forget"]
    assert same.value == 1
    assert np.isnan([same.low, same.high]).all()


def test_tofus_files_through_the_command(tofu, tmp_path):
    """The suite named tofu reads the perturbed files as they are distributed."""
    files = {
        "forget": "forget01_perturbed.json",
        "retain": "retain_perturbed.json",
        "real_authors": "real_authors_perturbed.json",
        "world_facts": "world_facts_perturbed.json",
    }
    texts = []
    for name, file in files.items():
        lines = (tofu / file).read_text(encoding="utf-8").splitlines()[:5]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        texts += lines
    tokenizer = train_tokenizer(texts, 500)
    torch.manual_seed(0)
    model = make_model(tokenizer, Size(hidden=16, n_layers=2))
    save(model, tokenizer, tmp_path / "model")
    place = {name: str(tmp_path / name) for name in [*files, "model", "run"]}
    options = ["--model", place["model"], "--retain-model", place["model"], "--suite", "tofu"]
    options += ["--forget", place["forget"], "--retain", place["retain"], "--out", place["run"]]
    options += ["--metrics", "paraphrased_extraction_strength,multiple_choice"]
    for name in ("real_authors", "world_facts"):
        options += ["--probe", f"{name}={place[name]}"]
    assert main(["evaluate", *options, "--max-new-tokens", "5", "--quiet"]) == 0
    value = open_evaluation(tmp_path / "run").value
    assert value.sel(metric="forget_quality", set="forget") == 1
    for metric in ("probability", "rouge_l", "truth_ratio", "multiple_choice"):
        assert value.sel(metric=metric).drop_sel(set="all").notnull().all()
    assert 0 <= value.sel(metric="model_utility", set="all") < 1
