"""`check` of models that are served exactly; `test_check_deviations.py` has wrong rules."""

from __future__ import annotations

import types

import pytest
import torch
from architectures import VOCAB
from check_runs import LENGTHS, by_kind, printed, run
from engines.small_models import Routed, WithoutPositions
from models import build, fp64_throughout, samples
from reference import effects_of_each, gradients, mean_over, token_logprobs
from torch import nn

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.errors import GEffectError, InputError, NonFiniteError, UnsupportedModelError
from geffect_fast.measure import check as module
from geffect_fast.measure import plain_autograd as plain
from geffect_fast.measure.by_capture import CapturedNumbers
from geffect_fast.measure.execute import checked_bytes
from geffect_fast.measure.plain_autograd import BLOCK, dots, plain_numbers, plain_tokens
from geffect_fast.measure.precision import TOLERANCE, WIDER, computing_in, widened_copy
from geffect_fast.objectives import parse
from geffect_fast.report.tables.check import verdict

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# ---- models that are served exactly ----


@pytest.mark.parametrize(
    ("architecture", "dtype"),  # `test_check_and_profile.py` has every kind in fp32
    [
        *(("llama_tied", dtype) for dtype in DTYPES),
        ("gpt2", torch.float16),
        *(("mixtral", dtype) for dtype in (torch.float64, torch.bfloat16)),
    ],
    ids=str,
)
def test_exact_models_pass(architecture, dtype):
    model = build(architecture, dtype)
    found = run(model)
    assert found.exact, verdict(found)
    assert verdict(found).startswith("Exact: all ")
    assert found.layout == "packed" and (found.n_samples, found.n_tokens) == (4, sum(LENGTHS))
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.wider == (None if dtype.itemsize > 2 else "float32")
    parameters = dict(model.named_parameters())
    assert sum(row.n_parameters for row in found.kinds) == len(parameters)
    assert found.coverage.covered_parameters == found.coverage.trainable_parameters
    assert found.coverage.covered_parameters == len(parameters)
    assert found.coverage.covered_elements == sum(p.numel() for p in parameters.values())
    assert found.coverage.frozen_parameters == 0 and found.uncovered == ()
    assert any(row.absolute["effects"] > 0 for row in found.kinds)


def test_several_objectives_their_sums_and_their_data():
    rows = samples(LENGTHS, prompt=3)
    others = samples([9, 4, 6, 11], 5, prompt=2)
    rows = [row | {"alternative": other} for row, other in zip(rows, others, strict=True)]
    wanted = "ga,npo(beta=0.5)+0.5*kl,dpo(beta=0.2),rmu(layer=1),gd"
    found = run(
        build("llama"), data=rows, objectives=wanted, reference_model=build("llama", seed=1)
    )
    assert found.exact, verdict(found)
    assert found.objectives == tuple(str(parse(text)) for text in wanted.split(","))


def test_which_rule_captured_each_kind():
    found = by_kind(run(build("llama_tied")))
    assert found["embed_tokens"].rules == ("embedding", "linear")
    assert found["q_proj"].rules == found["q_proj.bias"].rules == ("linear",)
    assert found["input_layernorm"].rules == ("norm",) and found["norm"].n_parameters == 1
    assert by_kind(run(build("gpt2")))["c_attn"].rules == ("conv1d",)
    mixture = by_kind(run(build("mixtral")))
    assert mixture["experts.gate_up_proj"].rules == mixture["gate"].rules == ("generic",)


@pytest.mark.parametrize(
    ("architecture", "layout"), [(WithoutPositions, "equal_length"), (Routed, "single")]
)
def test_models_that_cannot_be_packed(architecture, layout):
    found = run(build(architecture), data=samples([6, 9, 6, 9]), objectives="ga,gd")
    assert found.exact, verdict(found)
    assert found.layout == layout
    assert f"Layout: {layout}," in printed(found)


def test_parameters_that_no_sample_reaches_are_named():
    rows = [{"input_ids": [3, 6, 9, 12], "labels": [-100, 6, 9, 12]}] * 2
    found = run(build(Routed), data=rows)
    idle = [f"experts.experts.{e}.{leaf}" for e in (1, 2) for leaf in ("weight", "bias")]
    assert found.exact and list(found.unreached) == idle
    assert f"Without a gradient on these samples: {', '.join(idle)}." in printed(found)


def test_frozen_parameters_are_counted_apart_and_tied_ones_named():
    model = build("llama_tied")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name or "embed" in name)
    found = run(model)
    assert found.exact
    c = found.coverage
    assert c.covered_parameters + c.frozen_parameters == len(list(model.parameters()))
    assert c.covered_elements + c.frozen_elements == sum(p.numel() for p in model.parameters())
    assert c.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    text = printed(found)
    assert f"left out: {c.frozen_parameters} frozen ones, {c.frozen_elements:,} elements" in text
    assert "Tied: model.embed_tokens.weight = lm_head.weight." in text


def test_samples_are_the_first_rows():
    model = build("gpt2")
    assert run(model, samples=2).n_tokens == sum(LENGTHS[:2])
    assert run(model, samples=9).n_samples == len(LENGTHS)


def test_the_model_is_left_as_it_was():
    model = build("mixtral").double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = model.get_experts_implementation()
    run(model)
    assert model.get_experts_implementation() == experts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- the reference of the comparison ----


def test_plain_autograd_is_that_of_the_formulas():
    rows = samples(LENGTHS, prompt=3)
    objectives = {
        "ga": [(1.0, "ga", {})],
        "wga(alpha=1.5) + 0.5*nll": [(1.0, "wga", {"alpha": 1.5}), (0.5, "nll", {})],
        "npo(beta=0.5) + kl": [(1.0, "npo", {"beta": 0.5}), (1.0, "kl", {})],
        "rmu(layer=2)": [(1.0, "rmu", {"layer": 2, "c": 2.0, "seed": 0, "normalize": False})],
    }
    sample_set = gf.data.tokenize_rows(rows, None, name="data")
    with fp64_throughout():
        model, other = build("llama", torch.float64), build("llama", torch.float64, seed=1)
        found = plain_numbers(model, sample_set, [parse(o) for o in objectives], other, [].append)
        plain = effects_of_each(model, other, objectives.values(), rows, rows, None)
        for own, expected in zip(found.effects, plain, strict=True):
            torch.testing.assert_close(own, expected[0], rtol=1e-9, atol=1e-15)
        shares = [
            gradients(mean_over("token", rows, -token_logprobs(model, row)), model) for row in rows
        ]
        for p in range(found.norms.shape[0]):
            flat = torch.stack([share[p].flatten() for share in shares])
            torch.testing.assert_close(found.products[p], flat @ flat.T, rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(found.norms[p], flat.norm(dim=1), rtol=1e-9, atol=1e-12)


def test_products_are_summed_in_fp64():
    size = 3 * BLOCK["cpu"] + 5
    x = torch.full((size,), 0.1)
    exact = size * float(x[0].double()) ** 2
    assert float(dots([x, None], [x, x])[0]) == pytest.approx(exact, rel=1e-9)
    assert float(dots([x, None], [x, x])[1]) == 0


@pytest.mark.parametrize("free", [2**40, 0], ids=["held", "two at a time"])
def test_progress_ends_where_it_was_said_to(free, monkeypatch):
    monkeypatch.setattr(plain, "free_memory", lambda _: free)
    rows = samples(LENGTHS, prompt=3)
    sample_set = gf.data.tokenize_rows(rows, None, name="data")
    objectives = [parse("ga"), parse("gd")]
    model = build("llama", torch.float64)  # the two ways sum in different orders
    ticks: list[int] = []
    found = plain_numbers(model, sample_set, objectives, None, ticks.append)
    assert sum(ticks) == plain_tokens(model, sample_set, objectives)
    n = len(rows)
    # Both terms of gd, one of which is ga, read the rows that the risk reads.
    assert len(ticks) == (n if free else n * (n + 1) // 2 + n + 2 * n)
    monkeypatch.setattr(plain, "free_memory", lambda _: 2**40 - free)
    other = plain_numbers(model, sample_set, objectives, None, [].append)
    for name, numbers in vars(found).items():
        torch.testing.assert_close(numbers, getattr(other, name), rtol=1e-12, atol=1e-14)
    ticks.clear()
    captured = CapturedNumbers(Plan.of(model), sample_set, objectives, None, "packed", None)
    captured.compute(ticks.append)
    assert sum(ticks) == captured.n_tokens


def test_fp64_is_kept_and_other_precisions_are_left_alone():
    model = build("llama", torch.float64)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with computing_in(torch.float64, model):
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64
        (grad,) = torch.autograd.grad(x.float().square().sum(), x)
    assert torch.equal(grad, 2 * x)
    assert x.float().dtype == torch.float32
    with computing_in(torch.float32, model):
        assert x.float().dtype == torch.float32


# ---- bad input ----

BAD = {
    "no samples": ({"samples": 0}, "samples"),
    "no data": ({"data": []}, "data"),
    "missing file": ({"data": "gone.jsonl"}, "gone.jsonl"),
    "unknown objective": ({"objectives": "gaa"}, "gaa"),
    "no objective": ({"objectives": []}, "objectives"),
    "no refusals": ({"objectives": "po"}, "refusals"),
    "no tokenizer": ({"data": [{"question": "a?", "answer": "b"}]}, "tokenizer"),
    "vocabulary": ({"data": [{"input_ids": [1, 999], "labels": [-100, 999]}]}, "999"),
    "nothing but rounding": ({"objectives": "ga,kl"}, "'kl' has no gradient"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_culprit(case):
    change, named = BAD[case]
    with pytest.raises(InputError) as caught:
        run(build("llama"), **change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_objective_without_a_gradient_is_refused_in_every_precision(dtype):
    with pytest.raises(InputError, match="'kl' has no gradient"):
        run(build("llama", dtype), objectives="kl")


class Opaque(Routed):
    """A module that returns an object no hook can look into."""

    def __init__(self):
        super().__init__()
        self.scale = ScaleInABox()

    def forward(self, input_ids, position_ids=None):
        return self.scale(super().forward(input_ids).logits).content


class ScaleInABox(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(VOCAB))

    def forward(self, x):
        return types.SimpleNamespace(content=x * self.scale)


def test_a_model_that_the_engine_refuses_is_named():
    with pytest.raises(UnsupportedModelError, match="module 'scale' returns no tensor"):
        run(build(Opaque))


def test_models_that_are_none_or_broken():
    with pytest.raises(InputError, match="model"):
        run("some/folder")
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e30)
        model.model.norm.weight.mul_(1e30)
    with pytest.raises(NonFiniteError, match="not finite"):
        run(model)


def test_a_copy_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("geffect_fast.measure.precision.free_memory", lambda device: 1000)
    assert run(build("llama")).exact
    with pytest.raises(GEffectError, match="float32 and two gradients"):
        run(build("llama", torch.bfloat16))


@pytest.mark.parametrize("dtype", WIDER)
def test_bytes_beside_a_model_hold_the_copy_that_a_check_may_make(dtype):
    model = build("llama", dtype)
    copy = widened_copy(model, WIDER[dtype])
    assert checked_bytes(model) >= 3 * sum(p.nbytes for p in copy.parameters())


def test_limits_are_the_stated_ones():
    assert TOLERANCE[torch.float32] == 1e-5 and TOLERANCE[torch.float64] == 1e-10
    assert module.ALLOWANCE == 2
