"""The host waits for nothing from a batch's first kernel to its last; results come once a batch.

Engines and per-sample functions run on a simulated device that refuses waits
(`simulated_device.py`), and must give the same results as on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from models import FIVE, build, samples
from simulated_device import DEVICE, SimulatedDevice, Waited, moved, plan_there
from transformers import masking_utils

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import check_finite
from geffect_fast.data import make_batches
from geffect_fast.data.tokenize import tokenize_rows
from geffect_fast.engines import directions, forward
from geffect_fast.engines.batches import DataPass, passes_for
from geffect_fast.engines.directions import accumulate_gradients
from geffect_fast.engines.dual import modules as dual_modules
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.measure import memory, prepare, profiler
from geffect_fast.objectives import NLL
from geffect_fast.objectives.parse import parse
from geffect_fast.results.dataset import check_gradients, gram_matrices

SETS = {"forget": samples([7, 4, 9], 1, 2), "retain": samples([6, 8], 2, 2)}
ALTERNATIVES = [[row] for row in samples([5, 6, 4], 3, 2)]
OBJECTIVES = {
    "answers": (
        *("ga", "gd", "wga(alpha=1)", "satimp", "token_weights", "simnpo", "ceu"),
        "pdu(eps=0.1)",
    ),
    "a reference": ("npo(beta=0.1)", "tnpo(beta=1)", "wtnpo", "kl", "undial"),
    "alternatives": ("po", "dpo(beta=0.1)", "altpo"),
    "hidden states": ("rmu(layer=1)", "rmu_mask(layer=1)", "rr(layer=1)"),
}
"""Objectives by the part of a batch that they read. A wait's traceback shows which one waits."""

UNLIKE = ("gpt2", "phi", "gemma2")
"""Models that together hold every kind of layer of `FIVE`."""


@pytest.fixture
def device(monkeypatch):
    return SimulatedDevice(monkeypatch)


def sets():
    forget = [dict(row) for row in SETS["forget"]]
    for row, (other,) in zip(forget, ALTERNATIVES, strict=True):
        row["alternative"] = other
        row["weights"] = [0.5] * (len(row["input_ids"]) - 2)
    return {
        "forget": tokenize_rows(forget, None, name="forget"),
        "retain": tokenize_rows(SETS["retain"], None, name="retain"),
    }


def run(plan, objectives, *, layout="packed", reference=None, **options):
    """The results of both passes of the reverse engine, and the number of batches."""
    rows, n_batches = sets(), 0

    def batches_of(name, roles):
        nonlocal n_batches
        made = make_batches(rows[name], roles, token_budget=16, layout=layout)
        n_batches += len(made)
        return made

    def ignore(_n):
        pass

    risks = [DataPass(batches_of(name, ("answer",)), {m: NLL()}) for m, name in enumerate(rows)]
    n_batches = 0
    values, directions = accumulate_gradients(plan, risks, 2, Reference(), ignore)
    parts = list(dict.fromkeys(part for o in objectives for _, part in parse(o).parts()))
    passes = passes_for(parts, batches_of, {"forget": 0, "retain": 3})
    compared = Reference(reference)
    compared.prepare(passes, next(iter(plan.parameters.values())).device)
    effects = []
    totals = reverse_effects(
        plan,
        passes,
        directions,
        len(parts),
        compared,
        lambda _task, _batch, found: effects.append(found),
        tick=ignore,
        **options,
    )
    found = [values, totals.values, totals.effects, *effects]
    return found, directions, totals.gradients, n_batches


def compare(model, objectives, device, reference=None, **options):
    """Compare the CPU with the simulated device, which allows one wait a batch."""
    model.set_attn_implementation("eager")
    here = Plan.of(model)
    expected = run(here, objectives, reference=reference, **options)[0]
    with device:
        with device.preparing():
            plan, other = plan_there(here), None if reference is None else moved(reference)
        found, directions, gradients, n_batches = run(plan, objectives, reference=other, **options)
        assert device.waits == n_batches + 1, "one a batch, and the risks' values"
        check_finite(plan.model)
        check_gradients(directions, ("unlearn", "retain"))
        gram = gram_matrices(directions, *([] if gradients is None else [gradients]))
        assert device.waits == n_batches + 4 and gram.device.type == "cpu"
    assert all(x.device.type == "cpu" for x in found) and len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {"norms": True, "columns": None}) for name in FIVE),
        *((name, {"norms": False, "per_token": True}) for name in UNLIKE),
        ("llama_tied", {"norms": False}),
        *((name, {"norms": False, "layout": "single"}) for name in ("llama", "gpt2")),
    ],
    ids=str,
)
def test_reverse_engine(architecture, options, device, monkeypatch):
    if options.get("layout") == "single":
        # The model looks at positions that it counted itself: one wait a forward.
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    compare(build(architecture), ("ga", "npo(beta=0.1)", "gd"), device, **options)


@pytest.mark.parametrize("objectives", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives(objectives, device):
    compare(build("llama_tied"), objectives, device, build("llama_tied", seed=1), norms=False)


def test_sixteen_bits(device):
    """As on a GPU, directions are bf16 and gradients are added up in fp32."""
    here = Plan.of(build("llama", torch.bfloat16))
    with device:
        with device.preparing():
            plan = plan_there(here)
        found, directions, _, n_batches = run(plan, ("ga",), norms=True)
        assert device.waits == n_batches + 1
    assert {v.dtype for v in directions.values()} == {torch.float32}
    assert all(x.isfinite().all() for x in found)


def waits_of_intervals(resolve):
    """The number of waits for the rows' shares of the risks and their products with a gradient."""
    return 2 if "sample" in resolve else 0


def reverse_profiler(resolve, device, monkeypatch, free):
    """A profile's result on the CPU, and its profiler on the device with this much free memory."""
    model = build("llama_tied")
    model.set_attn_implementation("eager")
    given = {**SETS, "objectives": ["gd", "npo(beta=0.1)"], "engine": "reverse"}
    given |= {"token_budget": 16, "resolve": resolve}
    expected = gf.profile(model, None, **given)
    here = Plan.of(model)
    with device, device.preparing():
        plan = plan_there(here)
        monkeypatch.setattr(Plan, "of", lambda _model, **_: plan)
        monkeypatch.setattr(prepare, "choose_layout", lambda *_: "packed")
        monkeypatch.setattr(memory, "free_memory", lambda _: 2**40)
        monkeypatch.setattr(directions, "free_memory", lambda _: free)
        return expected, profiler.Profiler.of(plan.model, None, **given)


def assert_same_numbers(found, expected):
    for name in ("g_effect", "loss", "risk_value", "grad_norm", "cosine"):
        x, y = (torch.from_numpy(of[name].values) for of in (found, expected))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("resolve", [("group", "sample"), ("parameter",)])
def test_a_whole_measurement(resolve, device, monkeypatch):
    """Beside a batch's results, weights, directions and norms are each read once."""
    expected, prepared = reverse_profiler(resolve, device, monkeypatch, free=2**40)
    with device:
        found = prepared.measure(weights=True).dataset
        passes = prepared._schedule.passes
        n_batches = sum(len(data_pass.batches) for data_pass in passes)
        # Token weights are read one objective and batch at a time, at the very end.
        n_weights = sum(len(each.batches) * len(each.parts) for each in passes)
        values = n_batches if "sample" in resolve else 1
        assert device.waits == values + 4 + n_weights + waits_of_intervals(resolve)
    assert_same_numbers(found, expected)


@pytest.mark.parametrize("resolve", [("parameter", "sample"), ("group",)])
def test_gradients_that_stay_on_the_cpu(resolve, device, monkeypatch):
    """The GPU has no room for the gradients; products copy the parts that they need."""
    expected, prepared = reverse_profiler(resolve, device, monkeypatch, free=2**10)
    line = "they stay in the CPU's memory, and ev"
    with device, pytest.warns(gf.errors.GEffectWarning, match=line):
        found = prepared.measure()
    assert {v.device.type for v in found.directions.values()} == {"cpu"}
    assert_same_numbers(found.dataset, expected)


@pytest.mark.parametrize(
    ("architecture", "offset"), [("llama_tied", 0.0), ("phi", 0.0), ("gemma2", 1.0)]
)
def test_a_whole_measurement_of_the_forward_engine(architecture, offset, device, monkeypatch):
    """Results come once a batch, beside the reads of a reverse pass for the risks' gradients."""
    model = build(architecture)
    given = {**SETS, "objectives": ["gd", "npo(beta=0.1)"], "engine": "forward"}
    given |= {"token_budget": 16, "resolve": ("sample", "token")}
    expected = gf.profile(model, None, **given)
    here = Plan.of(model)
    with device:
        with device.preparing():
            plan = plan_there(here)
            monkeypatch.setattr(Plan, "of", lambda _model, **_: plan)
            monkeypatch.setattr(prepare, "choose_layout", lambda *_: "packed")
            monkeypatch.setattr(prepare, "forward_mode_problem", lambda *_: None)
            monkeypatch.setattr(dual_modules, "_offset", lambda _: offset)
            monkeypatch.setattr(dual_modules, "_is_gated", lambda _: True)
            for module in (memory, directions, forward):
                monkeypatch.setattr(module, "free_memory", lambda _: 2**40)
            prepared = profiler.Profiler.of(plan.model, None, **given)
        found = prepared.measure().dataset
        n_batches = sum(len(data_pass.batches) for data_pass in prepared._schedule.passes)
        # Reads of weights, values of the risks, their gradients, and the gradients' inner products.
        assert device.waits == n_batches + 4 + waits_of_intervals(given["resolve"])
    for name in ("g_effect", "loss", "risk_value"):
        x, y = (torch.from_numpy(of[name].values) for of in (found, expected))
        torch.testing.assert_close(
            x, y, rtol=1e-4, atol=1e-5 * float(y.nan_to_num().abs().max()), equal_nan=True
        )


def losses(model, given):
    logits = model(input_ids=given["input_ids"], use_cache=False).logits[:, :-1]
    labels = given["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").mean(1)


@pytest.mark.parametrize("architecture", UNLIKE)
def test_functional(architecture, device, monkeypatch):
    """The functions return tensors on the device, and wait once a structure.

    The one wait is for the check that rows are told apart by sample.
    """
    model = build(architecture)
    model.set_attn_implementation("eager")
    ids = torch.tensor([row["input_ids"] for row in samples([6, 6, 6], 1)])
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def found(model, ids, direction):
        batch = {"input_ids": ids}
        return [
            gf.functional.per_sample_grad_norms(model, losses, batch),
            gf.functional.per_sample_inner_products(model, losses, batch, direction),
            gf.functional.pairwise_inner_products(model, losses, batch, batch),
            gf.functional.pairwise_inner_products(model, losses, batch, dict(batch)),
        ]

    expected, here = found(model, ids, direction), Plan.of(model)
    with device:
        with device.preparing():
            plan = plan_there(here)
            monkeypatch.setattr(Plan, "of", lambda _model, **_: plan)
            # The caller's own forward may wait.
            monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
            plan.model.config.pad_token_id = None
            ids = ids.to(DEVICE)
            direction = {name: v.to(DEVICE) for name, v in direction.items()}
        got = found(plan.model, ids, direction)
        assert device.waits == 1
        with device.preparing():
            got = [x.cpu() for x in got]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def number(x):
    return x.sum().item()


def truth(x):
    return bool(x.sum() > 0)


def by_mask(x):
    return x[x > 0]


def by_positions_found(x):
    return torch.nonzero(x)


def copied(x):
    return x.cpu()


def listed(x):
    return x.tolist()


def from_a_list(x):
    return torch.tensor([1.0, 2.0], device=x.device)


def moved_unpinned(x):
    return torch.ones(3).to(x.device)


def repeated(x):
    return torch.repeat_interleave((x > 0).long())


@pytest.mark.parametrize(
    "wait",
    [
        *(number, truth, by_mask, by_positions_found, copied, listed),
        *(from_a_list, moved_unpinned, repeated),
    ],
)
def test_a_planted_wait_is_refused(wait, device, monkeypatch):
    value = DataPass.value

    def waits(self, index, outputs, batch, reference):
        wait(outputs.token_logprob.detach())
        return value(self, index, outputs, batch, reference)

    monkeypatch.setattr(DataPass, "value", waits)
    here = Plan.of(build("llama"))
    with device, pytest.raises(Waited):
        with device.preparing():
            plan = plan_there(here)
        run(plan, ("ga",), norms=False)
