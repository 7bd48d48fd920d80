"""Losses and token weights against the published formulas, written out sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from geffect_fast.data.batch import IGNORE, REDUCTIONS
from geffect_fast.objectives import GD, PDU, AltPO, available, parse

# every registered objective, with parameters away from their defaults and from each other
STRINGS = [
    "ga",
    "nll",
    "po",
    "wga",
    "wga(alpha=0.7)",
    "npo",
    "npo(beta=0.5)",
    "tnpo",
    "tnpo(beta=1.3)",
    "wtnpo",
    "wtnpo(beta=1.3, alpha=0.4)",
    "dpo",
    "dpo(beta=0.6)",
    "simnpo",
    "simnpo(beta=2.5, delta=0.8)",
    "rmu",
    "rmu(layer=0, c=0.5, normalize=true, seed=3)",
    "rmu(layer=8, seed=1)",
    "kl",
    "satimp",
    "satimp(beta1=0.7, beta2=1.6)",
    "token_weights",
    "undial",
    "undial(beta=1.5)",
    "ceu",
    "ceu(skip=0)",
    "ceu(skip=2)",
    "rmu_mask",
    "rmu_mask(layer=8, seed=2)",
    "rr",
    "rr(layer=0)",
]
COMPOSITES = [GD(), AltPO(), PDU(eps=0.6)]
# the two parts of pdu have no names of their own
CASES = [*map(parse, STRINGS), *(part for _, part in PDU(eps=0.6).parts())]
TOKEN_LEVEL = (
    "ga",
    "nll",
    "NLLConstraint",
    "po",
    "wga",
    "tnpo",
    "wtnpo",
    "satimp",
    "token_weights",
)
each_case = pytest.mark.parametrize("o", CASES, ids=str)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mean(values, reduction):
    """Mean of a list of numbers a sample: over all of them, per sample first, or the bare sum."""
    if reduction == "token":
        return sum(sum(v) for v in values) / sum(len(v) for v in values)
    if reduction == "sample":
        return sum(sum(v) / len(v) for v in values if v) / len(values)
    return sum(sum(v) for v in values)


def factor(n_i, values, reduction):
    """The weight in `mean` of one of the `n_i` numbers of a sample."""
    n = sum(len(v) for v in values)
    return {"token": 1 / n, "sample": 1 / (len(values) * max(n_i, 1)), "sum": 1.0}[reduction]


def logprobs(data, role):
    """`(log p, log p0)` of the label tokens of every sample, as lists of floats."""
    mine = [[q for q in sample if q.role == role] for sample in data.samples]
    model = [[x for q in sample for x in q.logp()] for sample in mine]
    frozen = [[x for q in sample for x in q.logp0()] for sample in mine]
    return model, frozen


def log_ratio(data):
    return [sum(m) - sum(f) for m, f in zip(*logprobs(data, "answer"), strict=True)]


def margins(data):
    """`r_win - r_lose` of every pair of every sample; without a winner, of one pair with 0."""
    found = []
    for sample, lose in zip(data.samples, log_ratio(data), strict=True):
        wins = [sum(q.logp()) - sum(q.logp0()) for q in sample if q.role == "alternative"]
        found.append([win - lose for win in wins or [0.0]])
    return found


def predicted(data, role="answer", skip=0):
    """`(sequence, position, label)` of every sample's label tokens that are predicted."""
    for sample in data.samples:
        found = []
        for q in (q for q in sample if q.role == role):
            known = [(q, t, y) for t, y in enumerate(q.targets()) if y != IGNORE]
            found += known[skip:]
        yield found


def labelled(data):
    """`(sequence, position)` of every sample's positions that hold a label of an answer."""
    for sample in data.samples:
        answers = [q for q in sample if q.role == "answer"]
        yield [(q, t) for q in answers for t, y in enumerate(q.labels) if y != IGNORE]


def cross_entropy(target, logits):
    return -sum(float(q * (z - logits.logsumexp(0))) for q, z in zip(target, logits, strict=True))


def own_weights(data, role):
    """The weights that the data gives the label tokens of every sample."""
    return [[w for q in sample if q.role == role for w in q.weights] for sample in data.samples]


def token_weight(o, logp, logp0, own):
    """The table's `w` of a label token without the mean's factor; `w > 0` pushes it down."""
    if o.name == "token_weights":
        return own
    if o.name == "ga":
        return 1.0
    if o.name in ("nll", "NLLConstraint", "po"):
        return -1.0
    p = math.exp(logp)
    if o.name == "wga":
        return p**o.alpha
    if o.name == "satimp":
        return p**o.beta1 * (1 - p) ** o.beta2
    w = 2 * sigmoid(o.beta * (logp - logp0))
    return w if o.name == "tnpo" else w * p**o.alpha


def expected_loss(o, data, reduction):
    per_sample = (lambda v: sum(v)) if reduction == "sum" else (lambda v: sum(v) / len(v))
    role = "alternative" if o.name == "po" else "answer"
    model, frozen = logprobs(data, role)
    if o.name in TOKEN_LEVEL:
        weighted = [
            [token_weight(o, a, *b) * a - getattr(o, "eps", 0) for a, *b in zip(*each, strict=True)]
            for each in zip(model, frozen, own_weights(data, role), strict=True)
        ]
        return mean(weighted, reduction)
    if o.name == "npo":
        return per_sample([-2 / o.beta * math.log(sigmoid(-o.beta * r)) for r in log_ratio(data)])
    if o.name == "dpo":
        pairs = [[-2 / o.beta * math.log(sigmoid(o.beta * m)) for m in ms] for ms in margins(data)]
        return per_sample([sum(values) / len(values) for values in pairs])
    if o.name == "simnpo":
        nll = [-sum(m) / len(m) if m else 0.0 for m in model]
        return per_sample([-2 / o.beta * math.log(sigmoid(o.beta * (s - o.delta))) for s in nll])
    if o.name in ("rmu", "rmu_mask", "rr"):
        missed = [[hidden_error(o, q, t) for q, t in sample] for sample in labelled(data)]
        return mean([[sum(e**2 for e in es) / 5 for es in sample] for sample in missed], reduction)
    at = predicted(data, skip=getattr(o, "skip", 0))
    return mean([[divergence(o, q, t, y) for q, t, y in sample] for sample in at], reduction)


def hidden_error(o, q, t):
    """The distance of a hidden state from its target, one number for each of five features."""
    h, h0 = q.hidden[o.layer, t].tolist(), q.reference_hidden[o.layer, t].tolist()
    if o.name == "rr":
        return [a - b for a, b in zip(h, h0, strict=True)]
    u = torch.rand(5, generator=torch.Generator().manual_seed(o.seed)).tolist()
    if o.name == "rmu_mask":
        return [a - (a if x > 0.5 else 0.0) for a, x in zip(h, u, strict=True)]
    size = math.hypot(*u) if o.normalize else 1.0
    return [a - o.c * x / size for a, x in zip(h, u, strict=True)]


def divergence(o, q, t, y):
    """The summand at position `t`, with label `y`, of an objective of whole distributions."""
    z, z0 = q.logits[t], q.reference_logits[t]
    if o.name == "LogitFlattening":
        return (max(z.tolist()) - sum(z.tolist()) / len(z)) ** 2
    if o.name == "ceu":
        p = z.softmax(0)
        target = [0.0 if v == y else float(p[v]) / (1 - float(p[y])) for v in range(len(z))]
        return cross_entropy(torch.tensor(target, dtype=z.dtype), z)
    if o.name == "undial":
        lowered = [float(x) - o.beta * (v == y) for v, x in enumerate(z0)]
        return cross_entropy(torch.tensor(lowered, dtype=z.dtype).softmax(0), z)
    assert o.name == "kl"
    p0 = z0.softmax(0)
    return float((p0 * (p0 / z.softmax(0)).log()).sum())


def evaluate(o, case):
    return o.loss(case.outputs, case.batch, case.reference)


def share(o, case):
    return evaluate(o, case).item()


def test_every_registered_objective_is_covered():
    names = {parse(text).name for text in STRINGS} | {o.name for o in COMPOSITES}
    assert set(available()) == names
    elementary = {type(o) for o in CASES}
    assert all(type(part) in elementary for o in COMPOSITES for _, part in o.parts())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_case
def test_loss_is_the_published_formula(make_data, o, reduction):
    for seed in range(3):
        data = make_data(o.roles, seed=seed)
        found = share(o, data.case(reduction))
        assert found == pytest.approx(expected_loss(o, data, reduction), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_case
def test_terms_have_the_gradient_of_the_loss(make_data, o, reduction):
    for seed in range(3):
        case = make_data(o.roles, seed=seed).case(reduction)
        terms = o.token_terms(case.outputs, case.batch, case.reference)
        assert terms.shape == (case.batch.total_tokens,)
        of_terms = torch.autograd.grad(
            terms.sum(), case.leaves, retain_graph=True, materialize_grads=True
        )
        of_loss = torch.autograd.grad(evaluate(o, case), case.leaves, materialize_grads=True)
        size = max(g.abs().max() for g in of_loss)
        assert size > 1e-9
        for a, b in zip(of_terms, of_loss, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("o", [o for o in CASES if o.needs <= {"reference", "weights"}], ids=str)
def test_token_weights_are_those_of_the_table(make_data, o, reduction):
    data = make_data(o.roles, seed=1)
    case = data.case(reduction)
    logprob = case.outputs.token_logprob.detach().requires_grad_()
    outputs = type(case.outputs)(logprob)
    terms = o.token_terms(outputs, case.batch, case.reference)
    found = torch.autograd.grad(terms.sum(), logprob)[0]

    expected = []
    lose, pairs = log_ratio(data), margins(data)
    b = 1.0 if reduction == "sum" else 1 / len(data.samples)
    for i, sample in enumerate(data.samples):
        up = (
            [b / len(pairs[i]) * 2 * sigmoid(-o.beta * m) for m in pairs[i]]
            if o.name == "dpo"
            else []
        )
        for j, q in enumerate(sample):
            numbers = zip(q.logp(), q.logp0(), q.weights, strict=True)
            n_i = len(q.logp())
            for y in q.targets():
                if y == IGNORE:
                    expected.append(0.0)
                    continue
                own = next(numbers)
                if o.name in TOKEN_LEVEL:
                    f = factor(n_i, logprobs(data, q.role)[0], reduction)
                    expected.append(token_weight(o, *own) * f)
                elif o.name == "npo":
                    expected.append(b * 2 * sigmoid(o.beta * lose[i]))
                elif o.name == "dpo":
                    expected.append(sum(up) if q.role == "answer" else -up[j - 1])
                else:
                    nll = -sum(q.logp()) / n_i
                    expected.append(2 * b / n_i * sigmoid(-o.beta * (nll - o.delta)))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert not terms[case.batch.targets == IGNORE].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_case
def test_batches_add_up_to_the_data_set(make_data, o, reduction):
    data = make_data(o.roles, seed=2)
    whole = data.case(reduction)
    whole_terms = o.token_terms(whole.outputs, whole.batch, whole.reference)
    loss, terms = 0.0, []
    for rows in ([0, 1, 2], [3], [4, 5]):
        case = data.case(reduction, rows)
        loss += share(o, case)
        terms.append(o.token_terms(case.outputs, case.batch, case.reference))
    assert loss == pytest.approx(share(o, whole), rel=1e-12)
    torch.testing.assert_close(torch.cat(terms), whole_terms, rtol=1e-12, atol=1e-15)


@each_case
def test_forward_mode_sees_the_same_gradient(make_data, o):
    case = make_data(o.roles, seed=4).case("token")
    leaves = [case.outputs.token_logprob, case.outputs.logits, case.hidden]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def total(logprob, logits, hidden):
        outputs = type(case.outputs)(logprob, logits, tuple(hidden))
        return o.token_terms(outputs, case.batch, case.reference).sum()

    gradients = torch.autograd.grad(total(*leaves), leaves, materialize_grads=True)
    generator = torch.Generator().manual_seed(0)
    tangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves]
    _, found = torch.func.jvp(total, tuple(x.detach() for x in leaves), tuple(tangents))
    along = sum((g * v).sum() for g, v in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(found, along, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_case
def test_extreme_logits_stay_finite(make_data, o, dtype):
    data = make_data(o.roles, seed=5, scale=2000.0)
    for sample in data.samples:
        for q in sample:
            q.logits, q.reference_logits = q.logits.to(dtype), q.reference_logits.flip(0).to(dtype)
            q.hidden, q.reference_hidden = q.hidden.to(dtype), q.reference_hidden.to(dtype)
    case = data.case("token")
    for value in (
        o.token_terms(case.outputs, case.batch, case.reference).sum(),
        evaluate(o, case),
    ):
        gradients = torch.autograd.grad(
            value, case.leaves, retain_graph=True, materialize_grads=True
        )
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("o", [o for o in CASES if o.needs - {"reference", "weights"}], ids=str)
def test_half_precision_outputs_are_evaluated_in_single(make_data, o):
    data = make_data(o.roles, seed=6)
    for sample in data.samples:
        for q in sample:
            q.logits = q.logits.bfloat16().double()
            q.reference_logits = q.reference_logits.bfloat16().double()
            q.hidden = q.hidden.bfloat16().double()
            q.reference_hidden = q.reference_hidden.bfloat16().double()
    exact = data.case("token")

    def half(outputs):
        hidden = outputs.hidden_states
        return type(outputs)(
            outputs.token_logprob.float(),
            outputs.logits.bfloat16(),
            hidden and tuple(h.bfloat16() for h in hidden),
        )

    outputs, reference = half(exact.outputs), half(exact.reference)
    expected = share(o, exact)
    assert o.loss(outputs, exact.batch, reference).item() == pytest.approx(expected, rel=1e-5)
    terms = o.token_terms(outputs, exact.batch, reference)
    expected = o.token_terms(exact.outputs, exact.batch, exact.reference)
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=1e-7)
