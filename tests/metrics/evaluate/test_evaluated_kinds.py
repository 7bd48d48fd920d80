"""Metrics of choices, conversations, texts and continuations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from evaluated import losses, token_rows
from memorised import blank_model, fitted
from rouge_score import rouge_scorer

import geffect_fast as gf
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.metrics import available


def chosen(model, tokenizer, row):
    """The choice whose letter is likeliest, by running the model on each text."""
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
    # All other metrics read the right choice's text.
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
    """Every pair gives a number or one line of why not. Questions show what each metric needs."""
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
    given = {**parts, "probes": probes, "reference_model": model, "retain_model": model}

    def measured(metrics):
        reads = None if " " in kind else tokenizer
        return gf.evaluate(model, reads, **given, metrics=metrics, max_new_tokens=4)

    together = [[metric] for metric in OF_KIND[kind]]
    if kind != "question":
        together = [sorted(OF_KIND[kind])]
    for metrics in together:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GEffectWarning)
            value = measured(metrics).value
        for metric in metrics:
            place = "all" if metric == "model_utility" else "forget"
            assert value.sel(metric=metric, set=place).notnull(), metric
    for metric in set(available()) - OF_KIND[kind]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                value = measured(metric).value
            except InputError as error:
                assert "\n" not in str(error)
                assert "forget" in str(error) or metric == "model_utility"
                continue
        assert value.isnull().all() and metric in MUSE
        (line,) = {str(each.message) for each in told}
        assert line.startswith(f"metric {metric} reads ")
        assert line.endswith("forget, retain, holdout, real_authors, world_facts")


def test_what_is_written_in_a_conversation_is_its_first_answer(tokenizer, rows):
    """The turns after the first answer do not belong to the question."""
    model = fitted(blank_model(tokenizer, 5), tokenizer, rows[:1], 80)
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


@pytest.mark.slow
def test_memorisation_as_muse_has_it(tokenizer, rows):
    """Texts are continued and questions answered, each up to a length of its own."""
    texts = [{"prompt": row["question"], "gt": row["answer"]} for row in rows]
    model = fitted(blank_model(tokenizer, 5), tokenizer, texts[:1], 80)
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
    # A text has no end, so the model continues behind it.
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


def test_examples_stand_before_questions_as_muse_has_them(model, tokenizer, sets):
    """The reference is transformers' generation, one question at a time, on MUSE's prompts."""
    forget, examples = sets["forget"][:4], sets["retain"][:2]
    given = {"forget": forget, "retain": sets["retain"][2:5], "metrics": "knowledge_memorisation"}
    found = gf.evaluate(model, tokenizer, **given, probes={"forget_icl": examples})
    plain = gf.evaluate(model, tokenizer, **given)
    before = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in examples)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    wanted = []
    for row in forget:
        prompt = f"{before}Question: {row['question']}\nAnswer: "
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in ("\n\n", "\nQuestion", "Question:"):
            said = said.split(stop)[0]
        wanted.append(100 * scorer.score(row["answer"], said)["rougeL"].fmeasure)
    own = found.sample_value.isel(metric=0)[found["sample_set"].values == "forget"]
    assert own.values == pytest.approx(wanted)
    of_plain = plain.sample_value.isel(metric=0)[plain["sample_set"].values == "forget"]
    assert not np.allclose(own.values, of_plain.values), "examples change what is said"
    value = found.value.isel(metric=0)
    assert value.sel(set="retain") == plain.value.isel(metric=0).sel(set="retain")
    assert np.isnan(value.sel(set="forget_icl")), "examples are no set that is measured"


def test_examples_change_what_no_other_metric_reads(model, tokenizer, sets):
    given = {"forget": sets["forget"][:3], "retain": sets["retain"][2:4], "max_new_tokens": 32}
    both = gf.evaluate(
        model,
        tokenizer,
        **given,
        metrics="knowledge_memorisation,rouge_l",
        probes={"forget_icl": sets["retain"][:1]},
    )
    alone = gf.evaluate(model, tokenizer, **given, metrics="rouge_l")
    for name in ("forget", "retain"):
        at = {"metric": "rouge_l", "set": name}
        assert float(both.value.sel(at)) == float(alone.value.sel(at))
