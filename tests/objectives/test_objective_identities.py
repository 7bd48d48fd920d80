"""Relations between the objectives that hold whatever the data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gradients import assert_same, detached, gradient

from geffect_fast.data.batch import REDUCTIONS
from geffect_fast.errors import InputError
from geffect_fast.objectives import (
    CEU,
    DPO,
    GA,
    GD,
    KL,
    NLL,
    NPO,
    PDU,
    PO,
    RMU,
    RR,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    AltPO,
    Outputs,
    RMUMask,
    SatImp,
    SimNPO,
    TokenWeights,
)


def test_wga_without_a_power_is_ga(case):
    assert_same(gradient(WGA(alpha=0), case), gradient(GA(), case))


def test_wtnpo_without_a_power_is_tnpo(case):
    assert_same(gradient(WTNPO(beta=1.7, alpha=0), case), gradient(TNPO(beta=1.7), case))


def test_nll_is_ga_turned_around(case):
    assert_same(gradient(NLL(), case), -gradient(GA(), case))
    ga, nll = (o.loss(case.outputs, case.batch, None).item() for o in (GA(), NLL()))
    assert nll == -ga > 0


def with_weights(case, weights):
    return replace(case, batch=replace(case.batch, weights=weights))


def test_token_weights_of_one_are_ga_to_the_bit(case):
    ones = with_weights(case, torch.ones(case.batch.total_tokens, dtype=torch.float64))
    for method in ("loss", "token_terms"):
        found, ga = (
            getattr(o, method)(ones.outputs, ones.batch, None) for o in (TokenWeights(), GA())
        )
        assert torch.equal(found, ga)
    assert torch.equal(gradient(TokenWeights(), ones), gradient(GA(), ones))


def test_token_weights_of_a_power_of_p_are_wga(case):
    weights = (0.7 * case.outputs.token_logprob.detach()).exp()
    weighted = with_weights(case, weights)
    assert_same(gradient(TokenWeights(), weighted), gradient(WGA(0.7), case))


def test_token_weights_without_weights_is_one_clear_line(case):
    bare = with_weights(case, None)
    for method in (TokenWeights().loss, TokenWeights().token_terms):
        with pytest.raises(InputError, match=r"^objective token_weights needs a list 'weights'.*$"):
            method(bare.outputs, bare.batch, None)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_at_the_reference_is_summed_ga_over_the_samples(make_data, reduction, beta):
    data = make_data(("answer",), seed=12)
    case, summed = data.case(reduction), data.case("sum")
    at_reference = gradient(NPO(beta=beta), case, detached(case.outputs))
    b = 1 if reduction == "sum" else len(data.samples)
    assert_same(at_reference, gradient(GA(), summed) / b)


def test_tnpo_at_the_reference_is_ga(case):
    assert_same(gradient(TNPO(beta=3), case, detached(case.outputs)), gradient(GA(), case))


def test_dpo_without_a_winner_is_npo(case):
    assert_same(gradient(DPO(beta=0.4), case), gradient(NPO(beta=0.4), case))
    loss = [o.loss(case.outputs, case.batch, case.reference) for o in (DPO(0.4), NPO(0.4))]
    assert loss[0].item() == pytest.approx(loss[1].item(), rel=1e-13)


def test_dpo_at_the_reference_is_npo_minus_its_mirror_image(make_data):
    both = make_data(("answer", "alternative"), seed=13)
    case = both.case("sample")
    found = gradient(DPO(), case, detached(case.outputs))
    n_wins = torch.tensor([len(sample) - 1 for sample in both.samples]).clamp(min=1)
    win = case.batch.target_mask("alternative") / case.batch.spread(n_wins).double()
    sign = case.batch.target_mask("answer").double() - win
    summed = (sign * case.outputs.token_logprob).sum() / len(both.samples)
    assert_same(found, torch.autograd.grad(summed, case.logits)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dpo_of_several_alternatives_is_the_mean_over_each_alone(make_data, reduction):
    data = make_data(("answer", "alternative"), seed=17)
    answer, *wins = data.samples[4]
    assert len(wins) == 3
    data.samples = [[answer, *wins]]
    together = data.case(reduction)
    n = len(answer.labels)
    expected, losses = torch.zeros_like(together.logits), []
    start = n
    for win in wins:
        data.samples = [[answer, win]]
        case = data.case(reduction)
        losses.append(DPO(0.7).loss(case.outputs, case.batch, case.reference).item())
        found = gradient(DPO(0.7), case) / 3
        expected[:n] += found[:n]
        expected[start : start + len(win.labels)] = found[n:]
        start += len(win.labels)
    assert_same(gradient(DPO(0.7), together), expected)
    found = DPO(0.7).loss(together.outputs, together.batch, together.reference).item()
    assert found == pytest.approx(sum(losses) / 3, rel=1e-13)


def test_altpo_is_dpo_with_the_retain_rows():
    assert AltPO(beta=0.3, alpha=2).parts() == ((1.0, DPO(0.3)), (2.0, NLL()))
    assert (0.5 * AltPO()).parts() == ((0.5, DPO(0.1)), (0.5, NLL()))


@pytest.mark.parametrize("beta1", [0.0, 1.7])
def test_satimp_without_importance_is_wga(case, beta1):
    assert_same(gradient(SatImp(beta1, 0), case), gradient(WGA(beta1), case))
    losses = [o.loss(case.outputs, case.batch, None) for o in (SatImp(beta1, 0), WGA(beta1))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-13)


def test_simnpo_is_npo_of_mean_log_probabilities_against_a_uniform_reference(make_data):
    data = make_data(("answer",), seed=14, n_samples=2)
    case = data.case("sample")
    n = torch.tensor([len(q.logp()) for sample in data.samples for q in sample]).double()
    per_token = case.batch.spread(n)
    scaled = Outputs(case.outputs.token_logprob / per_token)
    zero = Outputs(torch.zeros_like(scaled.token_logprob))
    npo = NPO(beta=0.7).token_terms(scaled, case.batch, zero).sum()
    assert_same(gradient(SimNPO(beta=0.7), case), torch.autograd.grad(npo, case.logits)[0])


def test_kl_vanishes_at_the_reference_and_is_positive_away_from_it(case):
    at_reference = detached(case.outputs)
    assert KL().loss(case.outputs, case.batch, at_reference).item() == pytest.approx(0, abs=1e-14)
    assert gradient(KL(), case, at_reference).abs().max() < 1e-14
    assert KL().loss(case.outputs, case.batch, case.reference).item() > 0.01


def test_kl_pulls_the_logits_to_the_reference(case):
    """`d KL / d z = weight (softmax(z) - softmax(z0))` at every position that predicts a label."""
    index = case.batch.target_index
    expected = torch.zeros_like(case.logits)
    pull = case.outputs.logits.softmax(-1) - case.reference.logits.softmax(-1)
    expected[index] = case.batch.target_weight()[index, None] * pull.detach()
    assert_same(gradient(KL(), case), expected)


@pytest.mark.parametrize(
    "o",
    [
        GA(),
        WGA(),
        NPO(),
        TNPO(),
        WTNPO(),
        SimNPO(),
        DPO(),
        SatImp(),
        CEU(),
        UNDIAL(),
        TokenWeights(),
    ],
    ids=str,
)
def test_unlearning_pushes_labels_down(make_data, o):
    """A small descent step lowers the log-probability of the answers."""
    case = make_data(("answer",), seed=15).case("token")
    step = gradient(o, case)
    slope = torch.autograd.grad(case.outputs.token_logprob.sum(), case.logits)[0]
    assert (-step * slope).sum() < -1e-6


@pytest.mark.parametrize("o", [PO(), DPO()])
def test_alternatives_are_pulled_up(make_data, o):
    roles = o.roles
    case = make_data(roles, seed=16).case("token")
    mask = case.batch.target_mask("alternative")
    slope = torch.autograd.grad(
        case.outputs.token_logprob[mask].sum(), case.logits, retain_graph=True
    )[0]
    assert (-gradient(o, case) * slope).sum() > 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_rmu_target_is_drawn_alike_for_every_dtype_and_layer(seed):
    wide = RMU(seed=seed).control(torch.zeros(3, 64, dtype=torch.float64))
    single = RMU(seed=seed, layer=2).control(torch.zeros(9, 64))
    assert torch.equal(wide, single.double())
    assert (wide >= 0).all()
    assert (wide < 2).all()
    assert wide.max() > 1.5
    unit = RMU(seed=seed, normalize=True, c=20).control(torch.zeros(1, 64, dtype=torch.float64))
    assert unit.norm().item() == pytest.approx(20)
    torch.testing.assert_close(unit / 20, wide / wide.norm())


def test_rmu_target_changes_with_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = (RMU(seed=s).control(torch.zeros(1, 16)) for s in (0, 1))
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("o", [RMU(layer=9), RMUMask(layer=9), RR(layer=9)], ids=str)
def test_a_layer_beyond_the_model_is_one_clear_line(case, o):
    says = rf"^objective {o.name}: layer must be .* at most 8, the model's last, got 9$"
    for method in (o.loss, o.token_terms):
        with pytest.raises(InputError, match=says):
            method(case.outputs, case.batch, case.reference)


def test_a_reference_of_another_shape_is_one_clear_line(case):
    reference = case.reference
    few = replace(
        reference,
        logits=reference.logits[:, :-1],
        hidden_states=tuple(h[:, :-1] for h in reference.hidden_states[:-2]),
    )
    for o, says in (
        (KL(), r"objective kl: the reference model predicts 6 tokens and the model 7; give .*"),
        (UNDIAL(), r"objective undial: the reference model predicts 6 tokens and the model 7; .*"),
        (RR(8), r"objective rr: layer must be .* at most 6, the reference model's last, got 8"),
        (RR(1), r"objective rr\(layer=1\): the reference .* 4 features and the model's 5; give .*"),
    ):
        with pytest.raises(InputError, match=f"^{says}$"):
            o.token_terms(case.outputs, case.batch, few)


@pytest.mark.parametrize("o", [NPO(), TNPO(), WTNPO(), DPO(), KL(), UNDIAL(), RR()], ids=str)
def test_a_missing_reference_is_one_clear_line(case, o):
    for method in (o.loss, o.token_terms):
        with pytest.raises(InputError, match=rf"^objective {o.name} needs the reference[^\n]*$"):
            method(case.outputs, case.batch, None)


@pytest.mark.parametrize("o", [KL(), UNDIAL(), CEU(), RMU(), RMUMask(), RR()], ids=str)
def test_missing_outputs_are_one_clear_line(case, o):
    bare = replace(case.outputs, logits=None, hidden_states=None)
    with pytest.raises(InputError, match=rf"^objective {o.name} needs [^\n]*$"):
        o.token_terms(bare, case.batch, case.reference)


def test_gd_is_ascent_on_forget_and_descent_on_retain_rows():
    assert GD(gamma=2, alpha=0.5).parts() == ((2.0, GA()), (0.5, NLL()))
    assert [part.on for _, part in GD().parts()] == ["forget", "retain"]
    assert (0.5 * GD(gamma=2) + KL()).parts() == ((1.0, GA()), (0.5, NLL()), (1.0, KL()))
    with pytest.raises(TypeError, match="parts"):
        GD().loss(None, None, None)
    with pytest.raises(TypeError, match="parts"):
        (GA() + KL()).token_terms(None, None, None)


def test_needs_and_data_of_every_objective():
    elementary = [GA(), NLL(), PO(), WGA(), NPO(), TNPO(), WTNPO(), DPO(), SimNPO(), RMU(), KL()]
    elementary += [SatImp(), CEU(), UNDIAL(), RMUMask(), RR(), TokenWeights()]
    elementary += [part for _, part in PDU(eps=1).parts()]
    declared = {type(o).__name__: (o.on, o.roles, sorted(o.needs)) for o in elementary}
    assert declared == {
        "GA": ("forget", ("answer",), []),
        "NLL": ("retain", ("answer",), []),
        "PO": ("forget", ("alternative",), []),
        "WGA": ("forget", ("answer",), []),
        "NPO": ("forget", ("answer",), ["reference"]),
        "TNPO": ("forget", ("answer",), ["reference"]),
        "WTNPO": ("forget", ("answer",), ["reference"]),
        "DPO": ("forget", ("answer", "alternative"), ["reference"]),
        "SimNPO": ("forget", ("answer",), []),
        "RMU": ("forget", ("answer",), ["hidden_states"]),
        "KL": ("retain", ("answer",), ["reference_logits"]),
        "SatImp": ("forget", ("answer",), []),
        "CEU": ("forget", ("answer",), ["logits"]),
        "UNDIAL": ("forget", ("answer",), ["reference_logits"]),
        "RMUMask": ("forget", ("answer",), ["hidden_states"]),
        "RR": ("retain", ("answer",), ["hidden_states", "reference_hidden_states"]),
        "TokenWeights": ("forget", ("answer",), ["weights"]),
        "LogitFlattening": ("forget", ("answer",), ["logits"]),
        "NLLConstraint": ("retain", ("answer",), []),
    }
