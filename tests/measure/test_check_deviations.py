"""`check` finds a rule that is wrong, by its name, and tells rounding from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from architectures import ARCHITECTURES
from check_runs import by_kind, printed, run
from models import build

from geffect_fast.capture import Plan
from geffect_fast.capture import layer_rules as rules
from geffect_fast.measure import check as module
from geffect_fast.measure.by_capture import CapturedNumbers
from geffect_fast.measure.plain_autograd import plain_numbers
from geffect_fast.measure.precision import TOLERANCE
from geffect_fast.report.tables.check import verdict


def scaled(rule, which, by):
    """A rule's `factors` with one parameter's factor scaled, as by a wrong formula."""
    original = rule.factors

    def factors(self, g, segments):
        for name, factor in original(self, g, segments):
            if which in name:
                field = "sums" if isinstance(factor, rules.RowSum) else "g"
                factor = dataclasses.replace(factor, **{field: getattr(factor, field) * by})
            yield name, factor

    return factors


SLIGHTLY = (torch.float32, 1.001)


@pytest.mark.parametrize(
    ("architecture", "rule", "which", "kind", "dtype", "by"),
    [
        ("llama_tied", rules.LinearCall, "up_proj.weight", "up_proj", *SLIGHTLY),
        ("llama_tied", rules.LinearCall, "up_proj.weight", "up_proj", torch.bfloat16, 1.5),
        ("llama_tied", rules.LinearCall, "layers.1.self_attn.v_proj.bias", "v_proj.bias",
         *SLIGHTLY),
        ("llama_tied", rules.NormCall, "post_attention_layernorm", "post_attention_layernorm",
         torch.float64, 1 + 1e-8),
        ("llama_tied", rules.NormCall, "post_attention_layernorm", "post_attention_layernorm",
         torch.bfloat16, 1.5),
        ("llama_tied", rules.EmbeddingCall, "embed_tokens", "embed_tokens", *SLIGHTLY),
        ("gpt2", rules.LinearCall, "c_fc.weight", "c_fc", torch.float64, 1 + 1e-8),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_rule_is_found_and_named(architecture, rule, which, kind, dtype, by, monkeypatch):
    monkeypatch.setattr(rule, "factors", scaled(rule, which, by))
    found = run(build(architecture, dtype))
    assert not found.exact
    wrong = [row for row in found.kinds if row.excess > 1]
    assert [row.kind for row in wrong] == [kind] and which in wrong[0].worst
    message = verdict(found)
    assert message.startswith(f"Deviation: {kind} (captured by ") and wrong[0].worst in message
    assert message in printed(found)
    assert ("Check in float32" in message) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("quantity", ["effects", "norms", "products"])
def test_each_quantity_is_compared(quantity, monkeypatch):
    original = CapturedNumbers.compute

    def compute(self, tick):
        found = original(self, tick)
        getattr(found, quantity)[..., 3, 1] *= 1.001
        return found

    monkeypatch.setattr(CapturedNumbers, "compute", compute)
    found = run(build("llama"))
    assert not found.exact
    row = max(found.kinds, key=lambda row: row.excess)
    assert [q for q in row.judged if row.judged[q] > row.limit[q]] == [quantity]
    assert f": {quantity} off by" in verdict(found)


@pytest.mark.parametrize("quantity", ["effects", "products"])
def test_small_shares_are_compared_too(quantity, monkeypatch):
    """In a fresh model attention's share is tiny beside the largest; it is checked all the same."""
    original = CapturedNumbers.compute
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().eval()
    p = [name for name, _ in model.named_parameters()].index(
        "model.layers.1.self_attn.q_proj.weight"
    )

    def compute(self, tick):
        found = original(self, tick)
        numbers = getattr(found, quantity)
        shares = numbers.abs().amax((0, 2) if quantity == "effects" else (1, 2))
        assert 0 < shares[p] < 1e-4 * shares.max()
        numbers.select(1 if quantity == "effects" else 0, p).mul_(1.01)
        return found

    monkeypatch.setattr(CapturedNumbers, "compute", compute)
    found = run(model)
    assert [row.kind for row in found.kinds if row.excess > 1] == ["q_proj"]


def test_numbers_that_are_not_finite_deviate(monkeypatch):
    monkeypatch.setattr(
        rules.NormCall, "factors", scaled(rules.NormCall, "model.norm", float("nan"))
    )
    found = run(build("llama"))
    assert not found.exact and by_kind(found)["norm"].excess == float("inf")


def test_a_parameter_that_no_rule_captured_is_named(monkeypatch):
    original = Plan.of.__func__

    def of(cls, model, **given):
        plan = original(cls, model, **given)
        owners = {k: v for k, v in plan.owners.items() if k != "lm_head"}
        return cls(plan.model, plan.parameters, owners)

    monkeypatch.setattr(Plan, "of", classmethod(of))
    model = build("llama")
    found = run(model)
    assert not found.exact and found.uncovered == ("lm_head.weight",)
    assert by_kind(found)["lm_head"].rules == ()
    c, missed = found.coverage, model.lm_head.weight.numel()
    assert (c.covered_parameters, c.trainable_elements - c.covered_elements) == (
        c.trainable_parameters - 1,
        missed,
    )
    assert "no rule captured lm_head.weight" in verdict(found)
    assert f"Covered: {c.covered_parameters} of {c.trainable_parameters} " in printed(found)


def test_fp32_rounding_is_told_from_a_deviation_by_fp64(monkeypatch):
    """Deep models round by more than the tolerance; a wrong rule is found even then."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-7)
    found = run(build("llama"))
    assert found.exact and found.wider == "float64"
    assert "float64 on the same weights" in printed(found)
    monkeypatch.setattr(rules.NormCall, "factors", scaled(rules.NormCall, "model.norm", 1.00001))
    found = run(build("llama"))
    assert [row.kind for row in found.kinds if row.excess > 1] == ["norm"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_plain_autograd_in_16_bits_runs_where_errors_are_more_than_the_tolerance(
    dtype, monkeypatch
):
    ran = []

    def plain_numbers_of(model, *args):
        ran.append(next(model.parameters()).dtype)
        return plain_numbers(model, *args)

    monkeypatch.setattr(module, "plain_numbers", plain_numbers_of)
    monkeypatch.setitem(TOLERANCE, dtype, 0.05)
    model = build("llama", dtype)
    found = run(model)
    errors = [row.judged[q] for row in found.kinds for q in module.QUANTITIES]
    assert found.exact and 0 < max(errors) < 0.05
    assert ran == [torch.float32] and not found.rounding_measured
    assert "of its numbers in float32" in verdict(found) and "which is rounding" in printed(found)
    monkeypatch.setitem(TOLERANCE, dtype, max(errors) / 2)
    ran.clear()
    again = run(model)
    assert again.exact and ran == [torch.float32, dtype] and again.rounding_measured
    assert f"as plain autograd does in {again.dtype}" in verdict(again)
    for before, after in zip(found.kinds, again.kinds, strict=True):
        assert before.judged == after.judged
        assert all(after.limit[q] > TOLERANCE[dtype] for q in module.QUANTITIES)
