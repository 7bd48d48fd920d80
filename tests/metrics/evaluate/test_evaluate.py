"""`gf.evaluate` and `geffect-fast evaluate`, from rows to numbers with names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from evaluated import losses, token_rows, without
from memorised import blank_model, fitted
from scipy.stats import hmean, ks_2samp

import geffect_fast as gf
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.metrics import available


def test_names_on_every_axis(result, rows, sets):
    assert result.value.dims == ("metric", "set")
    assert result.sample_value.dims == ("metric", "sample")
    assert result["metric"].values.tolist() == list(available())
    names = ["forget", "retain", "holdout", "real_authors", "world_facts"]
    assert result["set"].values.tolist() == [*names, "all"]
    sizes = dict(zip(names, [8, 8, 6, 4, 5], strict=True))
    assert json.loads(result.attrs["n_rows"]) == sizes
    assert result.sample_set.values.tolist() == [n for n, k in sizes.items() for _ in range(k)]
    assert result["sample"].values.tolist() == [i for k in sizes.values() for i in range(k)]
    assert result.question.values[9] == rows[9]["question"]
    assert result.statistic.sel(metric="loss") == "AUC"
    assert result.attrs["interval_level"] == 0.95
    assert set(json.loads(result.attrs["digests"])) == set(names)


def test_likelihood_is_transformers_own_loss(result, model, tokenizer, sets):
    for name in ("forget", "retain", "holdout"):
        expected = losses(model, tokenizer, sets[name])
        of = result.sel(sample=result.sample_set == name)
        np.testing.assert_allclose(of.sample_value.sel(metric="nll"), expected, rtol=1e-5)
        value = float(result.value.sel(metric="probability", set=name))
        assert value == pytest.approx(np.exp(-expected).mean(), rel=1e-5)
    known, unknown = result.value.sel(metric="nll", set=["forget", "retain"]).values
    assert known < unknown


def right_and_wrong(model, tokenizer, rows, paraphrase="paraphrased_answer"):
    """Losses of paraphrases `(n,)`, and of three perturbed answers `(n, 3)`."""
    asked = [row["question"] for row in rows]
    answers = [[row[paraphrase] for row in rows]]
    answers += [[row["perturbed_answer"][j] for row in rows] for j in range(3)]
    found = [
        losses(
            model,
            tokenizer,
            [{"question": q, "answer": a} for q, a in zip(asked, each, strict=True)],
        )
        for each in answers
    ]
    return np.array(found[0]), np.stack(found[1:], 1)


def log_ratios(model, tokenizer, rows, paraphrase="paraphrased_answer"):
    right, wrong = right_and_wrong(model, tokenizer, rows, paraphrase)
    return wrong.mean(1) - right


def test_truth_ratio_and_forget_quality(result, model, retrained, tokenizer, sets):
    x = np.exp(log_ratios(model, tokenizer, sets["forget"]))
    value = float(result.value.sel(metric="truth_ratio", set="forget"))
    assert value == pytest.approx(np.minimum(x, 1 / x).mean(), rel=1e-5)
    others = np.exp(log_ratios(retrained, tokenizer, sets["forget"]))
    value = float(result.value.sel(metric="forget_quality", set="forget"))
    assert value == pytest.approx(ks_2samp(x, others).pvalue)
    # The hold-out has no perturbed answers; without a paraphrase, the answer takes its place.
    assert np.isnan(result.value.sel(metric="truth_ratio", set="holdout"))
    facts = sets["probes"]["world_facts"]
    x = np.exp(log_ratios(model, tokenizer, facts, "answer"))
    value = float(result.value.sel(metric="truth_ratio", set="world_facts"))
    assert value == pytest.approx(np.maximum(0, 1 - 1 / x).mean(), rel=1e-5)


def test_model_utility_is_the_harmonic_mean_of_nine(result):
    at = {("probability", "retain")}
    at |= {("option_probability", name) for name in ("real_authors", "world_facts")}
    for name in ("retain", "real_authors", "world_facts"):
        at |= {("rouge_l", name), ("truth_ratio", name)}
    nine = [float(result.value.sel(metric=m, set=s)) for m, s in at]
    assert len(nine) == 9
    expected = hmean(nine) if min(nine) > 0 else 0
    value = float(result.value.sel(metric="model_utility", set="all"))
    assert value == pytest.approx(expected)


def test_a_memorised_answer_has_an_extraction_strength_of_one(tokenizer, rows):
    row = rows[:1]
    model = fitted(blank_model(tokenizer, 5), tokenizer, row, 80)
    found = gf.evaluate(
        model,
        tokenizer,
        forget=row,
        retain=rows[20:21],
        metrics="extraction_strength, exact_memorisation, rouge_l, probability",
        max_new_tokens=60,
    ).value.sel(set="forget")
    assert found.sel(metric="extraction_strength") == 1
    assert found.sel(metric="exact_memorisation") == 1
    assert found.sel(metric="rouge_l") == 1
    assert found.sel(metric="probability") > 0.9


@pytest.mark.parametrize("budget", [1, 90])
def test_no_number_depends_on_the_token_budget(result, model, tokenizer, retrained, sets, budget):
    again = gf.evaluate(
        model,
        tokenizer,
        **sets,
        reference_model=retrained,
        retain_model=retrained,
        metrics=list(available()),
        max_new_tokens=12,
        token_budget=budget,
    )
    np.testing.assert_allclose(again.sample_value, result.sample_value, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(again.value, result.value, rtol=2e-4, atol=1e-4)


def test_the_same_call_gives_the_same_bits(result, model, tokenizer, retrained, sets):
    again = gf.evaluate(
        model,
        tokenizer,
        **sets,
        reference_model=retrained,
        retain_model=retrained,
        metrics=list(available()),
        max_new_tokens=12,
    )
    xr.testing.assert_identical(again, result.assign_attrs(created=again.attrs["created"]))


def test_a_model_in_training_is_measured_in_eval_mode_and_left_as_it_was(model, tokenizer, sets):
    """Released gradient-norm membership runs in train mode, where dropout makes norms random."""
    import copy

    training = copy.deepcopy(model)
    training.add_module("dropout", torch.nn.Dropout(0.5))
    plain = training.forward

    def dropping(*args, **kwargs):
        answer = plain(*args, **kwargs)
        answer.logits = training.dropout(answer.logits)
        return answer

    training.forward = dropping
    training.train()
    given = {**sets, "metrics": "nll, loss"}
    found = gf.evaluate(training, tokenizer, **given)
    expected = gf.evaluate(model, tokenizer, **given)
    np.testing.assert_allclose(found.sample_value, expected.sample_value, rtol=1e-5)
    assert all(module.training for module in training.modules())


def test_a_frozen_model_is_measured_too(model, tokenizer, sets):
    import copy

    frozen = copy.deepcopy(model).requires_grad_(False)
    found = gf.evaluate(frozen, tokenizer, **sets)
    assert found["metric"].values.tolist() == [
        *("probability", "extraction_strength", "exact_memorisation")
    ]
    assert not any(p.requires_grad for p in frozen.parameters())


def test_tokenised_rows_need_no_tokenizer(model, tokenizer, rows):
    tokens = token_rows(rows, tokenizer)
    given = {"forget": tokens[:4], "retain": tokens[4:8], "holdout": tokens[8:12]}
    metrics = "probability, min_k, min_k_plus_plus, extraction_strength"
    found = gf.evaluate(model, None, **given, metrics=metrics)
    texts = {"forget": rows[:4], "retain": rows[4:8], "holdout": rows[8:12]}
    expected = gf.evaluate(model, tokenizer, **texts, metrics=metrics)
    np.testing.assert_array_equal(found.value, expected.value)
    with pytest.raises(InputError, match="need a tokenizer"):
        gf.evaluate(model, None, **given, metrics="rouge_l")


def test_retain_rows_without_a_field_are_told(model, tokenizer, rows):
    plain = without(rows[8:12], "perturbed_answer", "paraphrased_answer")
    with pytest.warns(GEffectWarning, match="retain has no 'perturbed_answer', so that metric"):
        found = gf.evaluate(model, tokenizer, forget=rows[:4], retain=plain, metrics="truth_ratio")
    assert np.isnan(found.value.sel(metric="truth_ratio", set="retain"))
    assert np.isfinite(found.value.sel(metric="truth_ratio", set="forget"))


def test_forget_quality_from_a_saved_log(model, retrained, tokenizer, sets, tmp_path):
    """A log with the model's own measures gives the same p-value."""
    rows = sets["forget"]
    right, wrong = right_and_wrong(retrained, tokenizer, rows)
    log = {
        "avg_paraphrased_loss": {str(i): float(x) for i, x in enumerate(right)},
        "average_perturb_loss": {str(i): x.tolist() for i, x in enumerate(wrong)},
        "generated_text": {
            str(i): [f"Question: {r['question']}\n", "?", r["answer"]] for i, r in enumerate(rows)
        },
    }
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"eval_log_forget.json": log}), encoding="utf-8")
    given = {"forget": rows, "retain": sets["retain"], "metrics": "forget_quality"}
    by_log = gf.evaluate(model, tokenizer, **given, retain_model=path)
    by_model = gf.evaluate(model, tokenizer, **given, retain_model=retrained)
    np.testing.assert_allclose(by_log.value, by_model.value)
    moved = {**given, "forget": [*rows[1:], rows[0]]}
    with pytest.raises(InputError, match=r"row 0 of log .* give the log of the same split"):
        gf.evaluate(model, tokenizer, **moved, retain_model=path)
    fewer = {**given, "forget": rows[:5]}
    with pytest.raises(InputError, match="of 8 forget rows, and there are 5; give the log"):
        gf.evaluate(model, tokenizer, **fewer, retain_model=path)


def test_a_retain_model_against_itself(retrained, tokenizer, sets):
    found = gf.evaluate(
        retrained,
        tokenizer,
        **sets,
        retain_model=retrained,
        metrics="forget_quality, privleak",
    ).sel(set="forget")
    assert found.value.sel(metric="forget_quality") == 1
    for name in ("value", "value_low", "value_high"):
        assert found[name].sel(metric="privleak") == 0
