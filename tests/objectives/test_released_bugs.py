"""Errors of released implementations of these objectives, which the objectives here do not have.

That batches add up, with no average that depends on their order, is in test_objective_formulas.py;
frozen parameters and effects that are lost are in tests/measure/test_profile_objectives.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gradients import detached, gradient

from geffect_fast.data.batch import IGNORE, REDUCTIONS
from geffect_fast.objectives import (
    CEU,
    DPO,
    PDU,
    RMU,
    RR,
    UNDIAL,
    AltPO,
    Outputs,
    RMUMask,
    SatImp,
    TokenWeights,
)

NEW = [SatImp(), TokenWeights(), CEU(), UNDIAL(), RMUMask(), RR(), DPO()]
NEW += [part for _, part in PDU(eps=1).parts()]


def padded(q, n):
    """The sequence with `n` unlabelled tokens behind it, whose outputs are large."""

    def grown(values, size):
        end = size * torch.arange(values.shape[-1], dtype=values.dtype)
        return torch.cat([values, end.expand(*values.shape[:-2], n, -1)], dim=-2)

    return replace(
        q,
        labels=q.labels + [IGNORE] * n,
        logits=grown(q.logits, 9.0),
        reference_logits=grown(q.reference_logits, -9.0),
        hidden=grown(q.hidden, 9.0),
        reference_hidden=grown(q.reference_hidden, -9.0),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("o", NEW, ids=str)
def test_ignored_tokens_count_nowhere(make_data, o, reduction):
    """Ignored tokens are neither in the normaliser of a mean, nor held to the reference."""
    data = make_data(o.roles, seed=21)
    plain = data.case(reduction)
    data.samples = [[padded(q, 2 + 3 * i) for q in s] for i, s in enumerate(data.samples)]
    case = data.case(reduction)
    lengths = plain.batch.cu_seqlens.diff().tolist()
    own = torch.zeros(case.batch.total_tokens, dtype=torch.bool)
    for (start, _), length in zip(pairwise(case.batch.cu_seqlens.tolist()), lengths, strict=True):
        own[start : start + length] = True
    terms = o.token_terms(case.outputs, case.batch, case.reference)
    expected = o.token_terms(plain.outputs, plain.batch, plain.reference)
    assert not terms[~own].any()
    torch.testing.assert_close(terms[own], expected, rtol=1e-13, atol=0)
    losses = [o.loss(c.outputs, c.batch, c.reference).item() for c in (case, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


def satimp_weight(o, logprob):
    return o.token_weight(Outputs(torch.tensor([logprob], dtype=torch.float64))).item()


def test_two_exponents_are_two_parameters():
    """Released code passed one exponent for both parameters."""
    p = 0.3
    logprob = torch.tensor(p, dtype=torch.float64).log().item()
    assert satimp_weight(SatImp(2, 0.5), logprob) == pytest.approx(p**2 * 0.7**0.5, rel=1e-14)
    assert satimp_weight(SatImp(0.5, 2), logprob) == pytest.approx(p**0.5 * 0.7**2, rel=1e-14)


def test_small_weights_do_not_collapse():
    """An epsilon in a quotient flattens small weights; powers that underflow lose them."""
    o = SatImp(beta1=0.5, beta2=2)
    assert satimp_weight(o, -900.0) / satimp_weight(o, -904.0) == pytest.approx(
        7.38905609893, 1e-10
    )
    assert satimp_weight(o, -1e-12) == pytest.approx(1e-24, rel=1e-10, abs=0)
    assert satimp_weight(o, 1e-9) == 0  # above 0 by rounding


def test_ceu_weights_of_rare_labels_do_not_collapse(make_data):
    data = make_data(("answer",), seed=22)
    for q in (q for sample in data.samples for q in sample):
        for t, y in enumerate(q.targets()):
            if y != IGNORE:
                q.logits[t, y] -= 200.0
    case = data.case("sum")
    found = gradient(CEU(skip=0), case)
    index = case.batch.target_index
    own = found[index, case.batch.targets[index]]
    torch.testing.assert_close(
        own, case.outputs.token_logprob.detach()[index].exp(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("o", [RMU(seed=4), RMUMask(seed=4)], ids=str)
def test_random_features_are_the_same_in_every_process(o):
    """Released code drew the features from the process's own generator."""
    method = "mask" if isinstance(o, RMUMask) else "control"
    script = (
        "import torch, sys; from geffect_fast.objectives import parse; torch.rand(9); "
        f"print(parse('{o}').{method}(torch.zeros(1, 40)).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    torch.manual_seed(77)
    assert done.stdout.strip() == str(getattr(o, method)(torch.zeros(1, 40)).tolist())


@pytest.mark.parametrize("o", [RMUMask(0), RMUMask(8), RR(0), RR(8)], ids=str)
def test_the_first_and_the_last_layer_exist(make_data, o):
    """Released code looked the layer up in a list that had no such index."""
    case = make_data(("answer",), seed=23).case("token")
    found = gradient(o, case, by="hidden")
    assert found[o.layer].any()
    found[o.layer] = 0
    assert not found.any()


def test_altpo_is_scaled_by_two_over_beta(make_data):
    """Without the factor the objective fades with beta; with it the gradient has a limit."""
    case = make_data(DPO.roles, seed=24).case("token")
    gradients = []
    for beta in (1e-6, 0.1, 5.0):
        (_, dpo), _ = AltPO(beta).parts()
        gradients.append(gradient(dpo, case, detached(case.outputs)))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-15)
