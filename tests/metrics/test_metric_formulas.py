"""Every metric against its formula on made-up numbers, without the bugs of released code."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from geffect_fast.metrics import resolved_metrics
from geffect_fast.metrics.base import Seen
from geffect_fast.metrics.memorisation import extraction_strength
from geffect_fast.metrics.observed import Observed, Scored


def scored(rng, n, greedy=None):
    log_prob = -rng.exponential(size=n)
    mean, spread = -rng.exponential(size=n) - 1, rng.uniform(0.5, 2, n)
    right = rng.random(n) < 0.5 if greedy is None else np.array(greedy)
    return Scored(-log_prob.mean(), log_prob, right, mean, spread)


def observed(name="forget", n=6, seed=0):
    """A set of rows of unlike lengths, with all fields that metrics read."""
    rng = np.random.default_rng([seed, len(name)])

    def column():
        return [scored(rng, int(rng.integers(2, 9))) for _ in range(n)]

    return Observed(
        name,
        answers=column(),
        paraphrases=column(),
        perturbed=[column()[: int(rng.integers(1, 4))] for _ in range(n)],
        rephrased=column(),
        choices=[column()[:4] for _ in range(n)],
        right=[int(rng.integers(4)) for _ in range(n)],
        texts=["abc " * int(rng.integers(1, 9)) for _ in range(n)],
        continuations=["the cat sat on a mat"] * n,
        truths=["the cats sat on the mat today"] * n,
        written={
            k: (
                ["the cat sat on a mat\n\nQuestion: Who?"] * n,
                ["the cats sat on the mat today"] * n,
            )
            for k in (32, 128)
        },
        norms={
            need: rng.exponential(size=n)
            for need in ("whole_norms", "parameter_norms", "largest_entries")
        },
        reference=column(),
    )


def scores(text, seen):
    (metric,) = resolved_metrics(text)
    return metric.scores(seen)


def losses(scoreds):
    return np.array([np.mean(-s.log_prob) for s in scoreds])


def test_of_the_answers_likelihood():
    seen = observed()
    np.testing.assert_allclose(scores("nll", seen), losses(seen.answers))
    np.testing.assert_allclose(scores("probability", seen), np.exp(-losses(seen.answers)))
    p = np.exp(-losses(seen.answers))
    wrong = np.array([np.exp(-losses(of)).sum() for of in seen.perturbed])
    np.testing.assert_allclose(scores("option_probability", seen), p / (p + wrong))
    best = [np.argmax([c.log_prob.sum() for c in of]) for of in seen.choices]
    assert scores("multiple_choice", seen).tolist() == [
        float(b == r) for b, r in zip(best, seen.right, strict=True)
    ]


@pytest.mark.parametrize("name", ["forget", "retain", "world_facts"])
def test_of_the_truth_ratio(name):
    seen = observed(name)
    wrong = np.array([losses(of).mean() for of in seen.perturbed])
    x = np.exp(wrong - losses(seen.paraphrases))
    assert (x > 1).any()
    assert (x < 1).any()
    closer, true = np.minimum(x, 1 / x), np.maximum(0, 1 - 1 / x)
    tofu = closer if name == "forget" else true
    np.testing.assert_allclose(scores("truth_ratio", seen), tofu)
    for how, expected in {
        "closer_to_one": closer,
        "true_better": true,
        "probability": x / (1 + x),
    }.items():
        np.testing.assert_allclose(scores(f"truth_ratio(aggregation={how})", seen), expected)


def test_the_truth_ratio_of_losses_that_no_probability_holds():
    """Released code divides probabilities, plus 1e-10: beyond 700 nats that is 0 / 1e-10."""
    seen = Observed("forget", paraphrases=[Scored(900.0)], perturbed=[[Scored(901.0)]])
    assert scores("truth_ratio", seen) == pytest.approx(np.exp(-1))
    assert scores("truth_ratio(aggregation=probability)", seen) == pytest.approx(
        1 / (1 + np.exp(-1))
    )
    far = Observed("retain", paraphrases=[Scored(900.0)], perturbed=[[Scored(1.0)]])
    assert scores("truth_ratio", far) == 0
    seen = Observed("x", answers=[Scored(900.0)], perturbed=[[Scored(900.0), Scored(901.0)]])
    assert scores("option_probability", seen) == pytest.approx(1 / (2 + np.exp(-1)))


@pytest.mark.parametrize(
    ("greedy", "strength", "floored"),
    [
        ([1, 1, 1, 1], 1, 1),
        ([0, 1, 1, 1], 3 / 4, 3 / 4),
        ([1, 0, 1, 1], 2 / 4, 2 / 4),
        ([1, 1, 1, 0], 0, 1 / 4),
        ([0, 0, 0, 0], 0, 1 / 4),
        ([0], 0, 1),
        ([1], 1, 1),
        ([], 0, 0),
    ],
)
def test_extraction_strength_is_the_longest_right_suffix(greedy, strength, floored):
    """Released code gives an answer that is never right 1/n; ours 0, unless told to `floor`."""
    right = np.array(greedy, dtype=bool)
    assert extraction_strength(right) == strength
    assert extraction_strength(right, floor=True) == floored
    # By definition: the shortest prefix after which everything is right.
    n = len(greedy)
    shortest = next(k for k in range(n + 1) if right[k:].all())
    assert strength == (1 - shortest / n if n else 0)


def test_of_memorisation():
    seen = observed()
    expected = [extraction_strength(s.greedy) for s in seen.answers]
    assert scores("extraction_strength", seen).tolist() == expected
    floored = [extraction_strength(s.greedy, floor=True) for s in seen.answers]
    assert scores("extraction_strength(floor=true)", seen).tolist() == floored
    assert floored != expected
    expected = [extraction_strength(s.greedy) for s in seen.rephrased]
    assert scores("paraphrased_extraction_strength", seen).tolist() == expected
    expected = [s.greedy.mean() for s in seen.answers]
    assert scores("exact_memorisation", seen).tolist() == expected


def test_of_membership():
    seen = observed()
    nll = losses(seen.answers)
    np.testing.assert_allclose(scores("loss", seen), -nll)
    bits = [len(zlib.compress(text.encode())) for text in seen.texts]
    np.testing.assert_allclose(scores("zlib", seen), -nll / bits)
    np.testing.assert_allclose(scores("reference", seen), losses(seen.reference) - nll)
    for k in (0.2, 0.4, 1.0):

        def lowest(values, k=k):
            return np.mean(sorted(values)[: max(1, int(k * len(values)))])

        expected = [lowest(s.log_prob) for s in seen.answers]
        np.testing.assert_allclose(scores(f"min_k(k={k})", seen), expected)
        expected = [lowest((s.log_prob - s.mean) / s.spread) for s in seen.answers]
        np.testing.assert_allclose(scores(f"min_k_plus_plus(k={k})", seen), expected)
    np.testing.assert_allclose(scores("gradient_norm", seen), -seen.norms["whole_norms"])
    np.testing.assert_allclose(
        scores("gradient_norm(convention=open_unlearning)", seen), -seen.norms["parameter_norms"]
    )
    np.testing.assert_allclose(
        scores("gradient_norm(convention=mimir)", seen), seen.norms["largest_entries"]
    )


def test_a_certain_token_is_no_division_by_zero():
    certain = Scored(0.0, np.zeros(3), np.ones(3, bool), np.zeros(3), np.zeros(3))
    assert scores("min_k_plus_plus", Observed("forget", answers=[certain])) == [0.0]


def test_a_token_that_a_certain_model_does_not_expect_is_no_ordinary_one():
    """With a gap of 150 nats the distribution's own spread is 0 in fp32."""
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 150
    log_p = torch.log_softmax(logits, -1)[0].double()
    mean = float((log_p.exp() * log_p).sum())

    def token(label):
        zero, one = np.zeros(1), np.ones(1)
        return Scored(0.0, log_p[label].numpy() * one, one > 0, mean * one, zero)

    ordinary = Scored(2.0, np.full(1, -2.0), np.zeros(1, bool), np.full(1, -1.5), np.ones(1))
    seen = Observed("forget", answers=[token(5), ordinary, token(0)])
    unexpected, middle, expected = scores("min_k_plus_plus", seen)
    assert unexpected == pytest.approx(-150 / 1e-3)
    assert middle == pytest.approx(-0.5)
    assert expected == pytest.approx(0)


def test_the_number_of_a_set_is_the_area_under_the_curve():
    forget, holdout = observed("forget", 9, seed=1), observed("holdout", 7, seed=2)
    seen = Seen({"forget": forget, "holdout": holdout}, {})
    for text in ("loss", "min_k", "min_k_plus_plus", "zlib", "reference", "gradient_norm"):
        (metric,) = resolved_metrics(text)
        both = metric.scores(forget), metric.scores(holdout)
        labels = [1] * 9 + [0] * 7
        (found,) = metric.measures(seen).values()
        assert found.value == pytest.approx(roc_auc_score(labels, np.concatenate(both)))
        pairs = (both[0][:, None] > both[1]) + 0.5 * (both[0][:, None] == both[1])
        assert found.value == pytest.approx(pairs.mean())
        assert found.low < found.value < found.high


def apart(shift):
    """Forget rows that look like members, and hold-out rows that do not, by `shift` nats."""
    rng = np.random.default_rng(0)
    rows = [Scored(x, np.full(4, -x)) for x in rng.uniform(1, 2, 8)]
    others = [Scored(x, np.full(4, -x)) for x in rng.uniform(1, 2, 8) + shift]
    return {"forget": Observed("forget", rows), "holdout": Observed("holdout", others)}


def test_separable_scores_have_an_area_of_one():
    (loss,) = resolved_metrics("loss")
    for shift, area in ((5, 1), (-5, 0)):
        found = loss.measures(Seen(apart(shift), {}))["forget"]
        assert found.value == area
        assert np.isnan([found.low, found.high]).all()  # the possible distance from 1 is unknown
    same = apart(0)["forget"]
    found = loss.measures(Seen({"forget": same, "holdout": same}, {}))["forget"]
    assert found.value == 0.5


def test_privleak():
    """MUSE's table: the model that was trained on the rows leaks -100 %, a retrained one 0."""
    (privleak,) = resolved_metrics("privleak")
    (min_k,) = resolved_metrics("min_k")
    retrained = apart(0.1)
    a0 = 1 - min_k.measures(Seen(retrained, {}))["forget"].value
    assert 0 < a0 < 0.5
    for shift in (5, 0.3, -5):
        a = 1 - min_k.measures(Seen(apart(shift), {}))["forget"].value
        found = privleak.measures(Seen(apart(shift), retrained))["forget"]
        assert found.value == pytest.approx(100 * (a - a0) / a0)
        if shift == 0.3:
            assert found.low < found.value < found.high
        else:
            assert np.isnan([found.low, found.high]).all()
        without = privleak.measures(Seen(apart(shift), {}))["forget"]
        assert without.value == pytest.approx(100 * (a - 0.5) / 0.5)
    assert privleak.measures(Seen(apart(5), retrained))["forget"].value == -100
    found = privleak.measures(Seen(retrained, retrained))["forget"]
    assert (found.value, found.low, found.high) == (0, 0, 0)
    rounded = {
        name: replace(of, answers=[replace(s, log_prob=s.log_prob + 1e-7) for s in of.answers])
        for name, of in retrained.items()
    }
    found = privleak.measures(Seen(rounded, retrained))["forget"]
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_privleak_draws_the_same_rows_of_both_models():
    """A model close to the retrained one leaks little for certain, however few the rows."""
    (privleak,) = resolved_metrics("privleak")
    retrained = apart(0.1)
    near = {
        name: replace(of, answers=[replace(s, log_prob=s.log_prob * 1.001) for s in of.answers])
        for name, of in retrained.items()
    }
    near["forget"].answers[0] = Scored(0.0, np.full(4, -0.01))
    found = privleak.measures(Seen(near, retrained))["forget"]
    apart_by = privleak.measures(Seen(near, {}))["forget"]
    assert found.high - found.low < 0.5 * (apart_by.high - apart_by.low)


def test_of_what_is_written():
    seen = observed(n=1)
    # Longest common subsequences: the cat(s) sat on mat with stems, the sat on mat without.
    assert scores("rouge_l", seen) == pytest.approx(5 / 7)
    f1 = 2 * (4 / 6) * (4 / 7) / (4 / 6 + 4 / 7)
    assert scores("knowledge_memorisation", seen) == pytest.approx(100 * f1)
    whole = 2 * (4 / 8) * (4 / 7) / (4 / 8 + 4 / 7)
    assert scores("verbatim_memorisation", seen) == pytest.approx(100 * whole)
    assert scores('knowledge_memorisation(stops="")', seen) == pytest.approx(100 * whole)
    the = 2 * (1 / 1) * (1 / 7) / (1 / 1 + 1 / 7)
    assert scores("knowledge_memorisation(stops=sat|cat)", seen) == pytest.approx(100 * the)


@pytest.mark.parametrize(
    "text", ['knowledge_memorisation(stops="\\n\\n|A: ")', "truth_ratio(aggregation=true_better)"]
)
def test_a_metric_is_written_as_it_is_read(text):
    (metric,) = resolved_metrics(text)
    (again,) = resolved_metrics(str(metric))
    assert again == metric
    assert again != type(metric)()


def test_forget_quality_has_no_bounds():
    """A model against itself has 1; p-values of drawn rows do not spread about the rows' own."""
    seen, other = {"forget": observed(n=40)}, {"forget": observed(n=40, seed=3)}
    (quality,) = resolved_metrics("forget_quality")
    for against, is_one in ((seen, True), (other, False)):
        found = quality.measures(Seen(seen, against))["forget"]
        assert (found.value == 1) == is_one
        assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("n", [2, 40])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_rows_that_score_alike_have_no_bounds(n, value):
    rows = [Scored(-np.log(max(value, 1e-300)), greedy=np.arange(10) < 10 * value)] * n
    seen = Seen({"forget": Observed("forget", answers=rows)}, {})
    for text in ("probability", "exact_memorisation"):
        (metric,) = resolved_metrics(text)
        found = metric.measures(seen)["forget"]
        assert found.value == pytest.approx(value)
        assert np.isnan([found.low, found.high]).all()


def test_an_interval_is_a_bootstrap_over_rows():
    """The interval of a mean of many rows is the normal distribution's, the same every time."""
    rng = np.random.default_rng(0)
    n = 400
    seen = Observed("forget", [Scored(x) for x in rng.normal(5, 2, n)])
    (nll,) = resolved_metrics("nll")
    one, again = (nll.measures(Seen({"forget": seen}, {}))["forget"] for _ in range(2))
    assert one == again
    half = 1.96 * seen.losses.std(ddof=1) / np.sqrt(n)
    assert one.high - one.value == pytest.approx(half, rel=0.15)
    assert one.value - one.low == pytest.approx(half, rel=0.15)
    alone = nll.measures(Seen({"forget": Observed("forget", [Scored(1.0)])}, {}))["forget"]
    assert alone.value == 1
    assert np.isnan([alone.low, alone.high]).all()
