"""Gradients of objectives on logits and hidden states, in closed form."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gradients import assert_same, detached, gradient
from torch.nn.functional import one_hot

from geffect_fast.data.batch import IGNORE
from geffect_fast.errors import InputError
from geffect_fast.objectives import CEU, KL, NLL, PDU, RMU, RR, UNDIAL, RMUMask


def test_ceu_is_ga_weighted_by_the_odds(make_data, reduction):
    """`d L / d z_t = p / (1 - p) (onehot - p) / N`, whichever form of the terms serves a token."""
    case = make_data(("answer",), seed=11, scale=4.0).case(reduction)
    logprob = case.outputs.token_logprob
    p = logprob.detach().exp()
    mask = case.batch.target_mask()
    assert (p[mask] < 0.5).any()
    assert (p[mask] > 0.5).any()
    odds = torch.where(mask, p / (1 - p), 0.0)
    ga = (case.batch.target_weight() * odds * logprob).sum()
    expected = torch.autograd.grad(ga, case.logits, retain_graph=True)[0]
    assert_same(gradient(CEU(skip=0), case), expected)


@pytest.mark.parametrize("margin", [40.0, 12.0, 0.0, -12.0, -40.0])
def test_ceu_keeps_its_digits_in_single_precision(make_data, margin):
    """The weight p / (1 - p) is not finite where p is 1 up to rounding.

    Where p is tiny, its target and its own distribution are the same up to rounding.
    """
    data = make_data(("answer",), seed=11)
    for q in (q for sample in data.samples for q in sample):
        q.logits = q.logits.float().double()
        for t, y in enumerate(q.targets()):
            if y != IGNORE:
                q.logits[t, y] = margin
    exact = gradient(CEU(skip=0), data.case("sum"))
    for q in (q for sample in data.samples for q in sample):
        q.logits = q.logits.float()
    found = gradient(CEU(skip=0), data.case("sum")).double()
    size = exact.abs().amax(1, keepdim=True)
    assert ((found - exact).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("skip", [1, 2])
def test_ceu_leaves_out_the_first_tokens_and_counts_the_others(make_data, reduction, skip):
    data = make_data(("answer",), seed=11)
    case = data.case(reduction)
    found = gradient(CEU(skip), case).abs().sum(1) > 0
    mask = case.batch.target_mask()
    starts = case.batch.cu_seqlens.tolist()
    kept = []
    for start, end in pairwise(starts):
        known = [t for t in range(start, end) if mask[t]]
        kept.append(known[skip:])
    assert found.nonzero().flatten().tolist() == [t for known in kept for t in known]
    # the kept tokens count as without any skipping, apart from the normaliser
    n = {"token": sum(map(len, kept)) / int(mask.sum()), "sum": 1.0}
    if reduction in n:
        every = gradient(CEU(0), case) / n[reduction]
        assert_same(gradient(CEU(skip), case)[found], every[found])


def test_ceu_without_a_token_left_is_one_clear_line(case):
    with pytest.raises(InputError, match=r"^objective ceu\(skip=99\): no answer has more than 99"):
        CEU(skip=99).token_terms(case.outputs, case.batch, None)


def test_undial_pulls_the_logits_to_the_adjusted_ones(case):
    """`d L / d z = weight (softmax(z) - softmax(z0 - beta onehot))`."""
    index = case.batch.target_index
    adjusted = case.reference.logits.clone()
    adjusted[torch.arange(len(index)), case.batch.targets[index]] -= 2.5
    expected = torch.zeros_like(case.logits)
    pull = case.outputs.logits.softmax(-1) - adjusted.softmax(-1)
    expected[index] = case.batch.target_weight()[index, None] * pull.detach()
    assert_same(gradient(UNDIAL(beta=2.5), case), expected)


def test_undial_without_an_adjustment_is_kl_to_the_reference(case):
    """Both differ by the entropy of the reference, a constant."""
    assert_same(gradient(UNDIAL(beta=0), case), gradient(KL(), case))
    assert gradient(UNDIAL(beta=0), case, detached(case.outputs)).abs().max() < 1e-14


def test_undial_with_a_great_adjustment_is_ceu_at_the_reference(case):
    """Both aim at a distribution without the label: here the reference's, there the model's."""
    at_reference = gradient(UNDIAL(beta=1e3), case, detached(case.outputs))
    assert_same(at_reference, gradient(CEU(skip=0), case))


def test_pdu_is_its_lagrangian(case):
    parts = PDU(gamma=2, eps=0.4, step=3, dual=0.5).parts()
    assert [(c, part.on) for c, part in parts] == [(2.0, "forget"), (0.5, "retain")]
    _, constraint = parts[1]
    assert_same(gradient(constraint, case), gradient(NLL(), case))
    missed, nll = (o.loss(case.outputs, case.batch, None).item() for o in (constraint, NLL()))
    total = case.batch.target_weight().sum().item()
    assert missed == pytest.approx(nll - 0.4 * total, rel=1e-13)


def test_pdu_flattens_logits(case):
    """`d L / d z = weight 2 (max z - mean z) (onehot of the greatest - 1/V)`."""
    (_, flatten), _ = PDU(eps=1).parts()
    index = case.batch.target_index
    z = case.outputs.logits.detach()
    excess = z.max(1).values - z.mean(1)
    top = one_hot(z.argmax(1), z.shape[1]).double() - 1 / z.shape[1]
    expected = torch.zeros_like(case.logits)
    expected[index] = (case.batch.target_weight()[index] * 2 * excess)[:, None] * top
    assert_same(gradient(flatten, case), expected)
    shifted = replace(case.outputs, logits=case.outputs.logits + 9.0)
    plain, moved = (flatten.loss(x, case.batch, None).item() for x in (case.outputs, shifted))
    assert moved == pytest.approx(plain, rel=1e-12)


def test_pdu_s_multiplier_rises_while_the_constraint_is_violated():
    o = PDU(gamma=2, eps=0.5, step=3)
    assert o.updated(0.75) == PDU(2, 0.5, 3, dual=1.75)
    assert o.updated(0.75).updated(0.5) == o.updated(0.75)
    assert o.updated(0.25).updated(0.0) == PDU(2, 0.5, 3, dual=0)
    assert o.dual == 1


def test_rmu_mask_pulls_the_features_outside_the_mask_to_zero(case):
    """`d L / d h = weight 2 h (1 - m) / d` at the layer, nothing elsewhere."""
    o = RMUMask(layer=4, seed=2)
    mask = o.mask(case.hidden[4])
    assert set(mask.tolist()) == {0.0, 1.0}
    expected = torch.zeros_like(case.hidden)
    pull = 2 * case.hidden[4].detach() * (1 - mask) / 5
    expected[4] = case.batch.label_weight()[:, None] * pull
    assert_same(gradient(o, case, by="hidden"), expected)


def test_rmu_mask_keeps_half_of_the_features_drawn_as_rmu_draws():
    wide = torch.zeros(2, 4096)
    mask = RMUMask(seed=5).mask(wide)
    assert abs(mask.mean().item() - 0.5) < 0.03
    assert torch.equal(mask, (RMU(seed=5, c=1).control(wide) > 0.5).float())
    assert not torch.equal(mask, RMUMask(seed=6).mask(wide))


def test_rr_vanishes_at_the_reference_and_pulls_to_it_elsewhere(case):
    o = RR(layer=2)
    at_reference = detached(case.outputs)
    assert o.loss(case.outputs, case.batch, at_reference).item() == 0
    assert not gradient(o, case, at_reference, by="hidden").any()
    expected = torch.zeros_like(case.hidden)
    pull = 2 * (case.hidden - torch.stack(case.reference.hidden_states)).detach() / 5
    expected[2] = case.batch.label_weight()[:, None] * pull[2]
    assert_same(gradient(o, case, by="hidden"), expected)
