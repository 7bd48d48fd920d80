"""The forward engine against the reverse engine, for every architecture of the table.

The two engines share the objectives and the data, but not the way derivatives are taken. Rows that
forward mode cannot pass name the module, and the reverse engine serves them.
"""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from models import FIVE, build, fp64_throughout, samples

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.batches import passes_for
from geffect_fast.engines.forward import ParameterPass, forward_effects
from geffect_fast.engines.forward_check import forward_mode_problem
from geffect_fast.engines.known_models import choose_layout
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.objectives import resolve

pytestmark = pytest.mark.slow

FORGET = [
    row | {"alternative": other}
    for row, other in zip(samples([2, 7, 7], 1, 2), samples([4, 5, 5], 3), strict=True)
]
RETAIN = samples([5, 5], 2, 2)
SETS = {
    name: tokenize_rows(rows, None, name=name)
    for name, rows in {"forget": FORGET, "retain": RETAIN}.items()
}

ON_ANSWERS = ("wga", "rmu(layer=1)")
ON_OTHERS = ("kl", "dpo(beta=0.5)")
"""Like `ON_ANSWERS`, one of each kind: a reference, pairs. `forward_cases.py` has the others."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative to the objective's largest effect on a sample: rounding of a forward and a backward."""

N_RISKS = 2
PASSED = [name for name, row in ARCHITECTURES.items() if row.forward is None]
REFUSED = [name for name in ARCHITECTURES if name not in PASSED]


def passes(names, layout):
    def batches_of(name, roles):
        return make_batches(SETS[name], roles, token_budget=60, layout=layout)

    return passes_for([resolve(name) for name in names], batches_of, {"forget": 0, "retain": 3})


def directions(plan, dtype):
    """Directions of noise, along which no parameter is small beside the others."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(N_RISKS, *p.shape, generator=generator).to(dtype)
        for name, p in plan.parameters.items()
    }


def forward(plan, wanted, reference, dtype, per_token):
    """The effects of every batch by sample, and the objectives' values."""
    found = []

    def keep(_task, batch, effects):
        ends = batch.cu_samples.tolist()[1:-1] if per_token else range(1, batch.n_samples)
        pieces = effects.tensor_split(list(ends), dim=-1)
        found.append(torch.stack([piece.sum(-1) for piece in pieces], dim=-1))

    whole = ParameterPass(0, tuple(plan.parameters), tuple(range(N_RISKS)))
    n = sum(len(data_pass.parts) for data_pass in wanted)
    values, _ = forward_effects(
        plan,
        wanted,
        directions(plan, dtype),
        n,
        reference,
        keep,
        parameter_passes=[whole],
        per_token=per_token,
        tick=lambda _: None,
    )
    return found, values


def reverse(plan, wanted, reference):
    found = []
    n = sum(len(data_pass.parts) for data_pass in wanted)
    totals = reverse_effects(
        plan,
        wanted,
        directions(plan, torch.float64),
        n,
        reference,
        lambda _task, _batch, effects: found.append(effects),
        columns=[0] * len(plan.parameters),
        norms=False,
        tick=lambda _: None,
    )
    return found, totals.values


def close(found, expected, wanted, dtype):
    """Compare batch by batch: the effect of one sample may be a difference of large numbers."""
    largest = {}
    batches = [(data_pass, batch) for data_pass in wanted for batch in data_pass.batches]
    for (data_pass, _), effects in zip(batches, expected, strict=True):
        for k, own in zip(data_pass.parts, effects, strict=True):
            largest[k] = max(largest.get(k, 0.0), float(own.abs().max()))
    for (data_pass, _), own, effects in zip(batches, found, expected, strict=True):
        for k, ours, exact in zip(data_pass.parts, own, effects, strict=True):
            error = float((ours - exact).abs().max()) / largest[k]
            assert error <= TOLERANCE[dtype], (data_pass.parts[k], error)


@pytest.mark.parametrize("name", PASSED)
def test_forward_equals_reverse(name):
    with fp64_throughout():
        plan = Plan.of(build(name, torch.float64))
        layout = choose_layout(plan, SETS["forget"])
        assert forward_mode_problem(plan, SETS["forget"], layout) is None
        # Restrictions of pairs do not depend on the architecture.
        others = ON_OTHERS if name in FIVE else ON_OTHERS[:1]
        wanted = passes(ON_ANSWERS + others, layout)
        reference = Reference(build(name, torch.float64, seed=1))
        reference.prepare(wanted, torch.device("cpu"))
        exact, values = reverse(plan, wanted, reference)
        found, own_values = forward(plan, wanted, reference, torch.float64, per_token=True)
        close(found, exact, wanted, torch.float64)
        torch.testing.assert_close(own_values, values, rtol=1e-12, atol=1e-12)
    wanted = passes(ON_ANSWERS, layout)
    plan = Plan.of(build(name))
    found, _ = forward(plan, wanted, Reference(), torch.float32, per_token=False)
    n_batches = len(wanted[0].batches)
    close(found, [e[: len(ON_ANSWERS)] for e in exact[:n_batches]], wanted, torch.float32)


@pytest.mark.parametrize("name", REFUSED)
def test_what_forward_mode_cannot_pass_is_named_and_served_by_the_reverse_engine(name):
    model = build(name)

    def run(**settings):
        objectives = ["ga", "wga", "npo", "tnpo", "simnpo", "satimp"]  # forward would cost less
        return gf.profile(
            model, None, forget=FORGET, retain=RETAIN, objectives=objectives, **settings
        )

    auto = run(resolve=["sample"])
    assert auto.attrs["engine"] == "reverse"
    where = ARCHITECTURES[name].forward
    assert f"({where}) has no forward-mode derivative" in auto.attrs["engine_reason"]
    expected = run(resolve=["sample"], engine="reverse")
    assert (auto.g_effect.values == expected.g_effect.values).all()
    for settings in ({"resolve": ["sample"], "engine": "forward"}, {"resolve": ["token"]}):
        with pytest.raises(UnsupportedModelError, match=rf"^engine forward: module '.*{where}"):
            run(**settings)
