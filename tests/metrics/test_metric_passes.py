"""Observations of a model, against the model run on one sequence at a time in plain torch."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import FIVE, build, fp64_throughout, samples
from torch import nn

from geffect_fast.data import tokenize_rows
from geffect_fast.data.samples import TokenSequence as Tokens
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.errors import GEffectWarning, InputError, NonFiniteError
from geffect_fast.metrics import Observed, Scored, Seen, extra, generation, resolved_metrics
from geffect_fast.metrics.generation import continuations
from geffect_fast.metrics.gradient_norms import gradient_norms
from geffect_fast.metrics.membership import MinKPlusPlus
from geffect_fast.metrics.memorisation import extraction_strength
from geffect_fast.metrics.observe import observe
from geffect_fast.metrics.overlap import VerbatimMemorisation
from geffect_fast.metrics.rows import metric_rows, to_be_written
from geffect_fast.metrics.scored import distinct, forward_layout, score

LENGTHS = [9, 4, 12, 4, 7]


def sequences(lengths=LENGTHS, seed=0, prompt=3):
    rows = samples(lengths, seed=seed, prompt=prompt)
    return [s.answer for s in tokenize_rows(rows, None, name="forget").samples]


def plain(model, sequence):
    """Log-probabilities `(n, vocabulary)` at the labels, in fp64, and the labels."""
    with torch.no_grad():
        logits = model(input_ids=sequence.input_ids[None]).logits[0].double()
    at = (sequence.labels[1:] != -100).nonzero().flatten()
    return torch.log_softmax(logits[at], -1), sequence.labels[1:][at]


def said(model, given, budget=1000, **more):
    places = [f"forget row {i}" for i in range(len(given))]
    layout = forward_layout(model, given)
    return score(model, given, places, TokenBudget(budget), layout, **more), layout


@pytest.mark.parametrize("architecture", [*FIVE, "mamba"])
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_scores_are_those_of_each_sequence_by_itself(architecture, budget):
    model = build(architecture, torch.float64)
    with fp64_throughout():
        found, _ = said(model, sequences(), budget, distribution=True)
        for scored, sequence in zip(found, sequences(), strict=True):
            log_p, labels = plain(model, sequence)
            own = log_p.gather(1, labels[:, None]).flatten()
            np.testing.assert_allclose(scored.log_prob, own, rtol=1e-9)
            assert scored.mean_loss == pytest.approx(-float(own.mean()))
            assert scored.greedy.tolist() == (log_p.argmax(-1) == labels).tolist()
            mean = (log_p.exp() * log_p).sum(-1)
            variance = (log_p.exp() * log_p**2).sum(-1) - mean**2
            np.testing.assert_allclose(scored.mean, mean, rtol=1e-9)
            np.testing.assert_allclose(scored.spread, variance.sqrt(), rtol=1e-6)


def test_log_probabilities_of_bf16_logits_are_taken_in_fp32():
    """Released Min-K%++ raises on bf16 logits, or rounds log-probabilities to three digits."""
    model = build("llama", torch.bfloat16)
    found, _ = said(model, sequences(), distribution=True)
    for scored, sequence in zip(found, sequences(), strict=True):
        log_p, labels = plain(model, sequence)  # from the same bf16 logits
        own = log_p.gather(1, labels[:, None]).flatten()
        # Packing may round the logits themselves otherwise, in the last of their 8 bits.
        np.testing.assert_allclose(scored.log_prob, own, rtol=0.03, atol=0.03)
        bf16 = torch.tensor(scored.log_prob).bfloat16().double().numpy()
        assert (scored.log_prob != bf16).any()
        assert np.isfinite(scored.spread).all()


def test_equal_sequences_are_run_once():
    given = sequences()
    different, which = distinct([*given, given[2], given[0]])
    assert len(different) == len(given)
    assert which == [0, 1, 2, 3, 4, 2, 0]
    model = build("llama")
    seen = []
    model.register_forward_hook(lambda _m, _a, out: seen.append(out.logits.shape))
    places = [""] * 10
    score(model, given * 2, places, TokenBudget(1000), "packed")
    assert len(seen) == 1  # one forward for all rows


def test_a_model_that_packs_is_packed():
    assert forward_layout(build("llama"), sequences()) == "packed"


class _NoPositions(nn.Module):
    """A causal model that cannot be told where sequences begin."""

    def __init__(self, mixing):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(96, 8), nn.Linear(8, 96)
        self.mixing = mixing

    def forward(self, input_ids):
        h = self.embed(input_ids).cumsum(1)
        if self.mixing:  # rows of a batch see each other
            h = h + h.mean(0, keepdim=True)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize(("mixing", "layout"), [(False, "equal_length"), (True, "single")])
def test_other_models_run_as_they_are_exact(mixing, layout):
    model = _NoPositions(mixing).eval()
    found, how = said(model, sequences())
    assert how == layout
    for scored, sequence in zip(found, sequences(), strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(model(sequence.input_ids[None])[0].double(), -1)
        own = log_p[2:-1].gather(1, sequence.labels[3:, None]).flatten()
        np.testing.assert_allclose(scored.log_prob, own, atol=1e-5)


def test_logits_that_are_not_finite_name_the_row():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(NonFiniteError, match="forget row 0: the model gives its answer"):
        said(model, sequences())


# ---- written text ----


def by_hand(model, prompt, ends, n):
    """Greedy decoding in a loop, one token a forward, without a cache."""
    ids = prompt
    for _ in range(n):
        with torch.no_grad():
            token = model(input_ids=ids[None]).logits[0, -1].argmax()
        if int(token) in ends:
            break
        ids = torch.cat([ids, token[None]])
    return ids[len(prompt) :].tolist()


def test_a_certain_models_unexpected_token_scores_as_such():
    """One logit is 150 above all others everywhere, so that any other token stands out."""
    model = build("llama")

    def certain(_model, _args, logits):
        logits = torch.zeros_like(logits)
        logits[..., 0] = 150  # no row holds this token
        return logits

    model.lm_head.register_forward_hook(certain)
    found, _ = said(model, sequences(), distribution=True)
    values = MinKPlusPlus().scores(Observed("forget", answers=found))
    assert (values < -1e4).all()


@pytest.mark.parametrize("architecture", FIVE)
def test_continuations_are_greedy(architecture):
    model = build(architecture)
    prompts = [s.input_ids for s in sequences([5, 3, 5, 7, 3])]
    plainly = [by_hand(model, prompt, set(), 6) for prompt in prompts]
    assert continuations(model, prompts, set(), 6, TokenBudget(1000)) == plainly
    ends = {plainly[0][2], plainly[1][0]}
    expected = [by_hand(model, prompt, ends, 6) for prompt in prompts]
    for budget in (1, 5, 1000):
        assert continuations(model, prompts, ends, 6, TokenBudget(budget)) == expected


def test_habits_of_a_models_generation_play_no_part():
    model = build("llama")
    prompts = [s.input_ids for s in sequences()]
    expected = continuations(model, prompts, set(), 8, TokenBudget(100))
    before = model.generation_config
    before.repetition_penalty, before.do_sample, before.temperature = 5.0, True, 3.0
    before.no_repeat_ngram_size = 1
    assert continuations(model, prompts, set(), 8, TokenBudget(100)) == expected
    assert model.generation_config is before


def test_where_memory_runs_out_fewer_rows_write_at_a_time(monkeypatch):
    model = build("llama")
    prompts = [s.input_ids for s in sequences([5, 5, 5, 5], seed=1)]
    expected = continuations(model, prompts, set(), 4, TokenBudget(1000))
    greedy, sizes = generation._greedy, []

    def small(model, ids, *more):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return greedy(model, ids, *more)

    monkeypatch.setattr(generation, "_greedy", small)
    with pytest.warns(GEffectWarning, match="out of memory where 4 rows are written"):
        assert continuations(model, prompts, set(), 4, TokenBudget(1000)) == expected
    assert sizes == [4, 2, 1, 1, 1, 1]


def test_an_adapter_writes_greedily_too():
    peft = pytest.importorskip("peft")
    base = build("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * ("lora_B" in name))
    habits = base.generation_config
    habits.repetition_penalty = 5.0
    prompts = [s.input_ids for s in sequences()]
    expected = [by_hand(model, prompt, set(), 6) for prompt in prompts]
    assert continuations(model, prompts, set(), 6, TokenBudget(100)) == expected
    assert base.generation_config is habits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_teacher_forced_extraction_is_that_of_generating_and_comparing(architecture):
    """For every prefix of the answer, decode greedily and compare the rest."""
    model = build(architecture)
    given = sequences([12, 9, 10, 7], prompt=2)
    # Answers of several lengths, whose ends the model would write itself.
    for i, sequence in enumerate(given):
        own = by_hand(model, sequence.input_ids[: 3 + i], set(), len(sequence) - 3 - i)
        sequence.input_ids[3 + i :] = torch.tensor(own)
        sequence.labels[3 + i :] = torch.tensor(own)
    found, _ = said(model, given)
    strengths = []
    for sequence in given:
        first = int((sequence.labels != -100).nonzero()[0])
        answer, n = sequence.input_ids[first:], len(sequence) - first
        k = next(
            k
            for k in range(n + 1)
            if by_hand(model, sequence.input_ids[: first + k], set(), n - k) == answer[k:].tolist()
        )
        strengths.append(1 - k / n)
    assert [extraction_strength(s.greedy) for s in found] == pytest.approx(strengths)
    assert 0 < min(strengths) < max(strengths)


# ---- gradients ----


@pytest.mark.parametrize("architecture", FIVE)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_gradient_norms(architecture, budget):
    model = build(architecture, torch.float64)
    needs = ("whole_norms", "parameter_norms", "largest_entries")
    with fp64_throughout():
        layout = forward_layout(model, sequences())
        found = gradient_norms(model, sequences(), needs, TokenBudget(budget), layout)
        whole_alone = gradient_norms(
            model, sequences(), ["whole_norms"], TokenBudget(budget), layout
        )
        parameters = list(model.parameters())
        for i, sequence in enumerate(sequences()):
            logits = model(input_ids=sequence.input_ids[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, sequence.labels[1:])
            grads = torch.autograd.grad(loss, parameters)
            norms = torch.stack([g.norm() for g in grads])
            assert found["whole_norms"][i] == pytest.approx(float(norms.norm()), rel=1e-7)
            assert whole_alone["whole_norms"][i] == pytest.approx(float(norms.norm()), rel=1e-7)
            assert found["parameter_norms"][i] == pytest.approx(float(norms.mean()), rel=1e-7)
            largest = torch.stack([g.abs().max() for g in grads]).mean()
            assert found["largest_entries"][i] == pytest.approx(float(largest), rel=1e-7)
    assert all(p.grad is None for p in parameters)


# ---- text before the written text ----


@pytest.mark.parametrize(("length", "prompt"), [(900, 200), (400, 200), (30, 15), (3, 1)])
def test_a_plain_text_begins_with_its_prompt(length, prompt):
    """A text's first 200 tokens are continued, or the first half of a short one."""
    (text,) = sequences([length], prompt=0)
    for kind in ("text", "tokens"):
        before, there, cut = to_be_written(text, kind)
        assert before.tolist() == text.input_ids[:prompt].tolist()
        assert there.tolist() == text.input_ids[prompt:].tolist()
        assert cut
    (answer,) = sequences([length], prompt=2)
    before, _, cut = to_be_written(answer, "tokens")
    assert len(before) == 2
    assert not cut
    before, there, cut = to_be_written(sequences([length], prompt=1)[0], "continuation")
    assert (len(before), len(there), cut) == (1, length - 1, True)


def test_of_a_conversation_the_first_run_of_labels_is_written():
    (whole,) = sequences([12], prompt=3)
    labels = whole.labels.clone()
    labels[6:9] = -100
    before, there, cut = to_be_written(Tokens(whole.input_ids, labels), "chat")
    assert before.tolist() == whole.input_ids[:3].tolist()
    assert there.tolist() == whole.input_ids[3:6].tolist()
    assert not cut


def test_of_a_plain_text_as_much_is_compared_as_may_be_written():
    class Tokenizer:
        all_special_ids = (0,)
        eos_token_id = 0

        def decode(self, ids, skip_special_tokens):
            return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i == 0))

    model = build("llama")
    tokens = tokenize_rows(samples([24, 10], prompt=0), None, name="forget")
    rows = metric_rows(tokens, "forget", [], {"continuations"}, lambda *_: None, lambda *_: None)
    found = observe(
        model,
        {"forget": rows},
        {"forget": {"continuations", "written"}},
        Tokenizer(),
        TokenBudget(99),
        6,
        lengths={"forget": [2, 9]},
    )["forget"]
    for k in (2, 9):
        again = observe(
            model, {"forget": rows}, {"forget": {"continuations"}}, Tokenizer(), TokenBudget(99), k
        )["forget"]
        assert found.written[k] == (again.continuations, again.truths)
    for i, n in enumerate((12, 5)):
        ids = tokens.samples[i].answer.input_ids
        own = by_hand(model, ids[:n], {0}, 6)
        assert found.continuations[i] == " ".join(f"w{k}" for k in own)
        assert found.truths[i] == " ".join(f"w{k}" for k in ids[n : n + 6].tolist())
    shared = [
        set(a.split()) & set(b.split())
        for a, b in zip(found.truths, found.continuations, strict=True)
    ]
    seen = replace(found, written={6: (found.continuations, found.truths)})
    scores = VerbatimMemorisation(max_new_tokens=6).scores(seen)
    assert [bool(s) for s in shared] == [s > 0 for s in scores.tolist()]


@pytest.mark.parametrize(
    ("module", "text", "package"),
    [
        ("rouge_score.rouge_scorer", "rouge_l", "rouge-score"),
        ("rouge_score.rouge_scorer", "knowledge_memorisation", "rouge-score"),
        ("sklearn.metrics", "loss", "scikit-learn"),
        ("scipy.stats", "forget_quality", "scipy"),
    ],
)
def test_a_missing_package_is_named_with_the_extra(monkeypatch, module, text, package):
    monkeypatch.setitem(sys.modules, module, None)
    extra.rouge_scorer.cache_clear()
    one = [Scored(1.0)] * 2
    seen = Observed(
        "forget",
        one,
        paraphrases=one,
        perturbed=[one, one],
        continuations=["a", "b"],
        truths=["a", "b"],
        written={32: (["a", "b"], ["a", "b"])},
    )
    (metric,) = resolved_metrics(text)
    with pytest.raises(InputError, match=rf"{package}: pip install 'geffect-fast\[evaluate\]'"):
        metric.measures(Seen({"forget": seen, "holdout": seen}, {"forget": seen}))
