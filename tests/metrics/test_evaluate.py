"""`gf.evaluate` and `geffect-fast evaluate`, from rows to numbers with names."""

from __future__ import annotations

import gc
import json
import re
import shutil
import warnings
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import hmean, ks_2samp

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import tokenize_rows, write_jsonl
from geffect_fast.demo import Size, make_model, save, train_tokenizer
from geffect_fast.demo.authors import make_fictitious_authors
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.measure.models import load_model
from geffect_fast.metrics import SUITES, Metric, available, register
from geffect_fast.metrics.base import Need
from geffect_fast.metrics.registry import _CLASSES
from geffect_fast.report.tables.evaluate import notes

NEEDS = get_args(Need)


def full_rows():
    """Invented rows with all the fields that TOFU's perturbed files have."""
    rows = make_fictitious_authors(3, seed=3)
    for i, row in enumerate(rows):
        wrong = [rows[(i + k) % len(rows)]["answer"] for k in (1, 2, 3)]
        row["paraphrased_answer"] = f"Indeed: {row['answer']}"
        row["perturbed_answer"] = wrong
        row["paraphrased_question"] = f"Tell me. {row['question']}"
    return rows


def without(rows, *fields):
    return [{k: v for k, v in row.items() if k not in fields} for row in rows]


@pytest.fixture(scope="module")
def rows():
    return full_rows()


@pytest.fixture(scope="module")
def tokenizer(rows):
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    return train_tokenizer([*texts, "A. B. C. D. Indeed: Tell me."], 320)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model that knows some rows: after a few steps on the first of them."""
    return trained(tokenizer, full_rows()[:8], 1)


def trained(tokenizer, rows, seed, steps=60):
    torch.manual_seed(seed)
    model = make_model(tokenizer, Size(hidden=32, n_layers=2))
    given = [s.answer for s in tokenize_rows(rows, tokenizer, name="rows").samples]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        one = given[step % len(given)]
        model(input_ids=one.input_ids[None], labels=one.labels[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def retrained(tokenizer):
    return trained(tokenizer, full_rows()[8:16], 2)


@pytest.fixture(scope="module")
def sets(rows):
    return {
        "forget": rows[:8],
        "retain": rows[8:16],
        "holdout": without(rows[16:22], "perturbed_answer", "paraphrased_answer"),
        "probes": {
            "real_authors": without(rows[22:26], "paraphrased_answer"),
            "world_facts": without(rows[24:29], "paraphrased_answer"),
        },
    }


@pytest.fixture(scope="module")
def result(model, tokenizer, retrained, sets):
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        warnings.filterwarnings(
            "ignore", "metric verbatim_memorisation reads beginnings and continuations"
        )
        return gf.evaluate(
            model,
            tokenizer,
            **sets,
            reference_model=retrained,
            retain_model=retrained,
            metrics=list(available()),
            max_new_tokens=12,
        )


def losses(model, tokenizer, asked, name="rows"):
    """Mean losses by transformers' own loss, one row at a time."""
    found = []
    for sample in tokenize_rows(asked, tokenizer, name=name).samples:
        ids, labels = sample.answer.input_ids[None], sample.answer.labels[None]
        with torch.no_grad():
            found.append(float(model(input_ids=ids, labels=labels).loss.double()))
    return np.array(found)


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


def log_ratios(model, tokenizer, rows, paraphrase="paraphrased_answer"):
    right = losses(
        model, tokenizer, [{"question": r["question"], "answer": r[paraphrase]} for r in rows]
    )
    wrong = np.mean(
        [
            losses(
                model,
                tokenizer,
                [{"question": r["question"], "answer": r["perturbed_answer"][j]} for r in rows],
            )
            for j in range(3)
        ],
        axis=0,
    )
    return wrong - right


def test_truth_ratio_and_forget_quality(result, model, retrained, tokenizer, sets):
    x = np.exp(log_ratios(model, tokenizer, sets["forget"]))
    value = float(result.value.sel(metric="truth_ratio", set="forget"))
    assert value == pytest.approx(np.minimum(x, 1 / x).mean(), rel=1e-5)
    others = np.exp(log_ratios(retrained, tokenizer, sets["forget"]))
    value = float(result.value.sel(metric="forget_quality", set="forget"))
    assert value == pytest.approx(ks_2samp(x, others).pvalue)
    # The hold-out has no perturbed answers; where no paraphrase is, the answer stands for it.
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
    model = trained(tokenizer, row, 5, steps=80)
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
    """Released gradient-norm membership runs in train mode: dropout makes its norms random."""
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


def chosen(model, tokenizer, row):
    """The choice whose letter is likeliest, by the model run on each text."""
    listed = (f"{x}. {text}" for x, text in zip("ABCD", row["choices"], strict=False))
    asked = "\n".join([row["question"], *listed, "Answer:"])
    letters = "ABCD"[: len(row["choices"])]
    ids = [tokenizer(f"{asked} {letter}")["input_ids"] for letter in letters]
    n = next(i for i in range(len(ids[0])) if len({each[i] for each in ids}) > 1)
    likely = []
    for each in ids:
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([each])).logits[0].log_softmax(-1)
        likely.append(sum(float(log_p[i - 1, each[i]]) for i in range(n, len(each))))
    return int(np.argmax(likely))


def choice_rows(rows):
    """Multiple choice of three, the right one by turns."""
    found = []
    for i, row in enumerate(rows):
        choices = [*row["perturbed_answer"][:2]]
        choices.insert(i % 3, row["answer"])
        found.append({"question": row["question"], "choices": choices, "answer": i % 3})
    return found


@pytest.mark.parametrize("how", ["index", "letter", "text"])
def test_choices_are_compared_by_their_letters(model, tokenizer, rows, how):
    asked = choice_rows(rows[:9])
    given = {
        "index": lambda row: row["answer"],
        "letter": lambda row: "ABC"[row["answer"]],
        "text": lambda row: row["choices"][row["answer"]],
    }[how]
    found = gf.evaluate(
        model,
        tokenizer,
        forget=[row | {"answer": given(row)} for row in asked],
        retain=asked[:1],
        metrics="multiple_choice, nll",
    )
    of = found.sel(sample=found.sample_set == "forget").sample_value
    expected = [float(chosen(model, tokenizer, row) == row["answer"]) for row in asked]
    assert of.sel(metric="multiple_choice").values.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    # All else is of the right choice's text.
    np.testing.assert_allclose(of.sel(metric="nll"), losses(model, tokenizer, rows[:9]), rtol=1e-5)


def test_a_question_is_chosen_among_its_perturbed_answers(model, tokenizer, rows):
    found = gf.evaluate(
        model, tokenizer, forget=rows[:8], retain=rows[8:9], metrics="multiple_choice"
    )
    expected = []
    for i, row in enumerate(rows[:8]):
        choices = list(row["perturbed_answer"])
        choices.insert(i % 4, row["answer"])
        best = chosen(model, tokenizer, {"question": row["question"], "choices": choices})
        expected.append(float(best == i % 4))
    of = found.sel(sample=found.sample_set == "forget").sample_value
    assert of.sel(metric="multiple_choice").values.tolist() == expected


def token_rows(rows, tokenizer):
    return [
        {"input_ids": s.answer.input_ids.tolist(), "labels": s.answer.labels.tolist()}
        for s in tokenize_rows(rows, tokenizer, name="rows").samples
    ]


def chat_row(row):
    turns = [("user", row["question"]), ("assistant", row["answer"])]
    turns += [("user", "And then?"), ("assistant", "No more of it.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


OF_ANY_ROWS = {
    *("probability", "nll", "extraction_strength", "exact_memorisation", "rouge_l", "zlib"),
    *("loss", "min_k", "min_k_plus_plus", "reference", "gradient_norm", "privleak"),
}
MUSE = {"verbatim_memorisation", "knowledge_memorisation"}
OF_KIND = {
    "question": set(available()) - {"verbatim_memorisation"},
    "choice": OF_ANY_ROWS | {"multiple_choice"},
    "chat": OF_ANY_ROWS,
    "text": OF_ANY_ROWS | {"verbatim_memorisation"},
    "continuation": OF_ANY_ROWS | {"verbatim_memorisation"},
    "tokens": OF_ANY_ROWS,
    "tokens without a tokenizer": OF_ANY_ROWS - {"zlib", "rouge_l"},
}


@pytest.mark.parametrize("kind", OF_KIND)
def test_every_kind_of_rows_with_every_metric(model, tokenizer, rows, kind):
    """A number, or one line that says why there is none."""
    of = {
        "question": lambda row: row,
        "choice": lambda row: choice_rows([row])[0],
        "chat": chat_row,
        "text": lambda row: {"text": f"{row['question']} {row['answer']}"},
        "continuation": lambda row: {"prompt": row["question"], "gt": row["answer"]},
    }.get(kind)
    made = list(map(of, rows[:15])) if of else token_rows(rows[:15], tokenizer)
    names = ("forget", "retain", "holdout", "real_authors", "world_facts")
    parts = {name: made[3 * i : 3 * i + 3] for i, name in enumerate(names)}
    probes = {name: parts.pop(name) for name in names[3:]}
    for metric in available():
        given = {**parts, "probes": probes, "reference_model": model, "retain_model": model}
        given |= {"metrics": metric, "max_new_tokens": 4}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = gf.evaluate(model, None if " " in kind else tokenizer, **given)
            except InputError as error:
                assert metric not in OF_KIND[kind], error
                assert "\n" not in str(error)
                assert "forget" in str(error) or metric == "model_utility"
                continue
        place = "all" if metric == "model_utility" else "forget"
        has = bool(found.value.sel(metric=metric, set=place).notnull()) if place in found.set else 0
        assert has == (metric in OF_KIND[kind]), metric
        if not has:
            assert metric in MUSE
            (line,) = {str(each.message) for each in told}
            assert line.startswith(f"metric {metric} reads ")
            assert line.endswith("forget, retain, holdout, real_authors, world_facts")


def test_what_is_written_in_a_conversation_is_its_first_answer(tokenizer, rows):
    """The turns after it are none of what was asked."""
    model = trained(tokenizer, rows[:1], 5, steps=80)
    found = gf.evaluate(
        model,
        tokenizer,
        forget=[chat_row(rows[0])],
        retain=rows[:1],
        metrics="rouge_l",
        max_new_tokens=60,
    ).value.sel(metric="rouge_l")
    assert found.sel(set="retain") == 1
    assert found.sel(set="forget") == 1


def test_memorisation_as_muse_has_it(tokenizer, rows):
    """Texts are continued and questions answered, each up to a length of its own."""
    texts = [{"prompt": row["question"], "gt": row["answer"]} for row in rows]
    model = trained(tokenizer, texts[:1], 5, steps=80)
    with pytest.warns(GEffectWarning, match="knowledge_memorisation reads questions and answers, "):
        found = gf.evaluate(
            model,
            tokenizer,
            forget=texts[:1],
            retain=texts[1:4],
            holdout=texts[4:7],
            probes={"known": rows[:2]},
            suite="muse",
            metrics=[
                "verbatim_memorisation(max_new_tokens=8)",
                "knowledge_memorisation(max_new_tokens=3)",
                "rouge_l",
            ],
        )
    value = found.value
    short = value.sel(metric="verbatim_memorisation(max_new_tokens=8)", set="forget")
    assert short == 100
    # A text has no end, so that the model goes on behind it.
    assert 50 < value.sel(metric="verbatim_memorisation", set="forget") < 100
    assert value.sel(metric="verbatim_memorisation", set="retain") < 100
    assert np.isnan(value.sel(metric="verbatim_memorisation", set="known"))
    assert np.isnan(value.sel(metric="knowledge_memorisation", set="forget"))
    assert np.isfinite(value.sel(metric="knowledge_memorisation", set="known"))
    assert np.isfinite(value.sel(metric="privleak", set="forget"))
    alone = gf.evaluate(
        model, tokenizer, forget=rows[:2], retain=rows[:1], metrics="rouge_l", max_new_tokens=3
    )
    short = value.sel(metric="knowledge_memorisation(max_new_tokens=3)", set="known")
    assert bool(short > 0) == bool(alone.value.sel(metric="rouge_l", set="forget") > 0)


def test_the_table_explains_what_it_shows(model, retrained, tokenizer, sets):
    def note(metrics, **more):
        given = {name: sets[name] for name in ("forget", "retain", "holdout")} | more
        return " ".join(notes(gf.evaluate(model, tokenizer, **given, metrics=metrics)))

    plain = note("nll")
    assert "In brackets" in plain
    for word in ("AUC", "p-value:", "privleak", "No brackets"):
        assert word not in plain
    assert "AUC: the prob" in note("min_k")
    quality = note("forget_quality", retain_model=retrained)
    assert "p-value: 1 where" in quality
    assert "No brackets" in quality
    assert "In brackets" not in quality
    leak = note("privleak")
    assert "privleak: change" in leak
    assert "AUC: the prob" not in leak


PAGE = Path(__file__).parents[2] / "docs" / "adding_a_metric.md"


def test_the_metric_of_the_page_on_adding_one(model, tokenizer, rows):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict = {"__name__": "adding_a_metric"}
    try:
        exec(compile("\n".join(blocks), str(PAGE), "exec", dont_inherit=True), namespace)
        found = gf.evaluate(
            model,
            tokenizer,
            forget=rows[:3],
            retain=rows[3:5],
            metrics=["surprise(power=3)", namespace["Surprise"](), "nll"],
        )
        nll, plain, cubed = (
            found.sample_value.sel(metric=m) for m in ("nll", "surprise", "surprise(power=3.0)")
        )
        np.testing.assert_allclose(plain, nll**2)
        np.testing.assert_allclose(cubed, nll**3)
        with pytest.raises(InputError, match="taken by"):
            register("surprise")(type("Other", (Metric,), {"scores": lambda s, x: None}))
    finally:
        _CLASSES.pop("surprise", None)
    with pytest.raises(InputError, match="must define scores"):
        register("nothing")(type("Nothing", (Metric,), {}))
    assert "nothing" not in available()


@pytest.mark.parametrize("name", NEEDS)
def test_the_page_names_every_need(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", available())
def test_the_guide_names_every_metric(name):
    guide = (PAGE.parent / "concepts.md").read_text(encoding="utf-8")
    assert f"`{name}`" in guide


def test_retain_rows_without_a_field_are_told(model, tokenizer, rows):
    plain = without(rows[8:12], "perturbed_answer", "paraphrased_answer")
    with pytest.warns(GEffectWarning, match="retain has no 'perturbed_answer', so that metric"):
        found = gf.evaluate(model, tokenizer, forget=rows[:4], retain=plain, metrics="truth_ratio")
    assert np.isnan(found.value.sel(metric="truth_ratio", set="retain"))
    assert np.isfinite(found.value.sel(metric="truth_ratio", set="forget"))


def test_forget_quality_from_a_saved_log(model, retrained, tokenizer, sets, tmp_path):
    """A log that holds what the model itself says gives the same p-value."""
    rows = sets["forget"]
    right = losses(
        retrained,
        tokenizer,
        [{"question": r["question"], "answer": r["paraphrased_answer"]} for r in rows],
    )
    wrong = np.stack(
        [
            losses(
                retrained,
                tokenizer,
                [{"question": r["question"], "answer": r["perturbed_answer"][j]} for r in rows],
            )
            for j in range(3)
        ],
        1,
    )
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


# ---- the command ----


@pytest.fixture(scope="module")
def study(tmp_path_factory, model, retrained, tokenizer, sets):
    folder = tmp_path_factory.mktemp("evaluate")
    for name, each in (("known", model), ("retrained", retrained)):
        save(each, tokenizer, folder / name)
    for name in ("forget", "retain", "holdout"):
        write_jsonl(sets[name], folder / f"{name}.jsonl")
    for name, rows in sets["probes"].items():
        write_jsonl(rows, folder / f"{name}.jsonl")
    return folder


@pytest.fixture
def here(study, tmp_path, monkeypatch):
    folder = shutil.copytree(study, tmp_path / "here")
    monkeypatch.chdir(folder)
    return folder


DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--holdout", "holdout.jsonl"]


def test_several_models_lie_along_an_axis(here, model, tokenizer, sets, capsys):
    command = ["evaluate", "--models", "known", "retrained", *DATA, "--metrics", "nll,min_k(k=0.2)"]
    assert main([*command, "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "min_k(k=0.2)" in printed
    assert "known" in printed
    found = gf.open_evaluation("run")
    assert found.value.dims == ("model", "metric", "set")
    assert found["model"].values.tolist() == ["known", "retrained"]
    own = gf.evaluate(
        model,
        tokenizer,
        **{k: sets[k] for k in ("forget", "retain", "holdout")},
        metrics="nll,min_k(k=0.2)",
    )
    np.testing.assert_allclose(found.value.sel(model="known"), own.value, rtol=1e-6)
    known, other = found.value.sel(metric="nll", set="forget").values
    assert known < other
    lines = (here / "run/summary.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "model,metric,set,statistic,value,value_low,value_high"
    assert len(lines) == 1 + 2 * (3 + 1)
    # A run folder as others: replayed to the bit, guarded, shown again.
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "run", "--quiet"]) == 2
    assert "already holds evaluation.nc" in capsys.readouterr().err
    assert main(["show", "run"]) == 0
    assert "min_k(k=0.2)" in capsys.readouterr().out
    (here / "run/evaluation.nc").write_bytes(b"torn")
    with pytest.raises(InputError, match="torn or was replaced"):
        gf.open_evaluation("run")


def test_one_model_is_in_memory_at_a_time(here, monkeypatch):
    alive = []

    def loaded(*args, **kwargs):
        gc.collect()
        assert all(each() is None for each in alive)
        found = load_model(*args, **kwargs)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr("geffect_fast.measure.execute_evaluation.load_model", loaded)
    shutil.copytree("known", "third")
    command = ["evaluate", "--models", "known", "retrained", "third", *DATA, "--metrics", "nll"]
    assert main([*command, "--out", "run", "--quiet"]) == 0
    assert len(alive) == 3
    found = gf.open_evaluation("run").value
    np.testing.assert_array_equal(found.sel(model="third"), found.sel(model="known"))


def test_the_checkpoints_of_a_run_lie_along_its_steps(here):
    for step, source in ((5, "retrained"), (20, "known")):
        shutil.copytree(here / source, here / f"run/checkpoint-{step}")
    command = ["evaluate", "--run", "run", *DATA, "--metrics", "nll", "--quiet"]
    assert main([*command, "--tokenizer", "known", "--out", "measures"]) == 0
    found = gf.open_evaluation("measures")
    assert found["step"].values.tolist() == [5, 20]
    before, after = found.value.sel(metric="nll", set="forget").values
    assert after < before


def test_an_unlearning_run_is_evaluated_from_its_beginning_to_its_end(here):
    command = ["unlearn", "--model", "known", *DATA[:4], "--objective", "ga", "--steps", "4"]
    command += ["--save-every", "2", "--probe-every", "2", "--lr", "0.01", "--keep-checkpoints"]
    assert main([*command, "--probe-rows", "2", "--out", "run", "--quiet"]) == 0
    command = ["evaluate", "--run", "run", *DATA[:4], "--metrics", "nll", "--quiet"]
    assert main([*command, "--out", "measures"]) == 0
    found = gf.open_evaluation("measures").value.sel(metric="nll", set="forget")
    assert found["step"].values.tolist() == [0, 2, 4]
    assert found.values[0] < found.values[1] < found.values[2]  # ascent forgets
    assert main([*command, "--models", "run/model", "--out", "end"]) == 2
    command = ["evaluate", "--models", "run/model", *DATA[:4], "--metrics", "nll", "--quiet"]
    assert main([*command, "--out", "end"]) == 0
    end = gf.open_evaluation("end").value.sel(metric="nll", set="forget")
    assert float(end) == found.values[2]


@pytest.mark.parametrize("suite", SUITES)
def test_suites(here, suite):
    rows = [json.loads(line) for line in Path("retain.jsonl").read_text("utf-8").splitlines()]
    write_jsonl([{"prompt": r["question"], "gt": r["answer"]} for r in rows], "books.jsonl")
    probes = [f"--probe={name}={name}.jsonl" for name in ("real_authors", "world_facts", "books")]
    command = ["evaluate", "--model", "known", *DATA, *probes, "--suite", suite, "--quiet"]
    command += ["--retain-model", "retrained", "--max-new-tokens", "8", "--out", "run"]
    assert main(command) == 0
    found = gf.open_evaluation("run")
    assert found["metric"].values.tolist() == list(SUITES[suite])
    assert found.attrs["suite"] == suite
    every = found.value.notnull().any("set")
    assert every.all()
