"""The engines end to end on a small model: the GPU against the CPU, and bf16 by its own rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import build, fp64_throughout, samples
from on_gpu import DEVICE
from reference import effects
from test_functional import loss_fn, packed, padded
from torch import Tensor, nn

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.batches import DataPass, mixture_of, passes_for
from geffect_fast.engines.directions import accumulate_gradients
from geffect_fast.engines.known_models import choose_layout
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import EffectSums, reverse_effects
from geffect_fast.objectives import GA, KL, NLL, NPO, RMU, WGA, Objective
from geffect_fast.results.axes import EffectArray

pytest.importorskip("transformers")

FORGET, RETAIN = samples([2, 17, 5, 70, 33], 1, 3), samples([9, 30, 2, 12], 2, 3)
OBJECTIVES = [GA(), WGA(alpha=1.5), NPO(beta=0.1), KL(), RMU(layer=1)]


def reverse(
    model: nn.Module, other: nn.Module | None, parts: list[Objective], norms: bool = True
) -> tuple[EffectSums, Tensor]:
    """Effects of objectives on both risks, as a profile computes them."""
    plan = Plan.of(model)
    sets = {
        name: tokenize_rows(rows, None, name=name)
        for name, rows in (("forget", FORGET), ("retain", RETAIN))
    }
    assert choose_layout(plan, sets["forget"]) == "packed"

    def batches_of(name, roles):
        return make_batches(sets[name], roles, token_budget=80, reduction="token")

    risks = [DataPass(batches_of(name, ("answer",)), {m: NLL()}) for m, name in enumerate(sets)]
    _, directions = accumulate_gradients(plan, risks, 2, Reference(), lambda _: None)
    passes = passes_for(parts, batches_of, {"forget": 0, "retain": len(FORGET)})
    reference = Reference(other)
    reference.prepare(passes, next(model.parameters()).device)
    shape = (len(parts), 2, len(plan.parameters), len(FORGET) + len(RETAIN), 1)
    found = EffectArray(mixture_of(parts, parts), np.zeros(shape))
    totals = reverse_effects(
        plan,
        passes,
        directions,
        len(parts),
        reference,
        found.add,
        norms=norms,
        tick=lambda _: None,
    )
    return totals, torch.from_numpy(found.values[..., 0])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare relative to a parameter's largest share, or a thousandth of the model's largest."""
    found, expected = found.cpu().double(), expected.cpu().double()
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-3 * float(expected.abs().max()))
    assert float(((found - expected).abs() / scale).max()) <= tolerance


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "phi"])
@pytest.mark.parametrize("parts", [OBJECTIVES, [GA()]], ids=["several", "one"])
def test_reverse_engine_equals_the_cpu(architecture: str, parts: list[Objective]) -> None:
    """One objective takes the fused op, several the products kept from the forward."""

    def run(device: torch.device | str) -> tuple[EffectSums, Tensor]:
        model, other = build(architecture), build(architecture, seed=1)
        return reverse(model.to(device), other.to(device), parts)

    (found, by_sample), (expected, by_sample_on_cpu) = run(DEVICE), run("cpu")
    assert_close(by_sample, by_sample_on_cpu)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].device.type == DEVICE.type
        assert_close(found.gradients[name].flatten(1), gradient.flatten(1))


def test_twice_the_same_bits() -> None:
    model = build("llama", torch.bfloat16).to(DEVICE)
    (first, by_sample), (again, by_sample_again) = (
        reverse(model, None, OBJECTIVES[:3]) for _ in range(2)
    )
    assert torch.equal(by_sample, by_sample_again)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, again.gradients[name])


@pytest.mark.parametrize("form", [packed, padded])
@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2"])
def test_functions_equal_the_cpu(architecture: str, form) -> None:
    def run(device: torch.device | str) -> list[Tensor]:
        model = build(architecture).to(device)
        batch, other = (
            {name: tensor.to(device) for name, tensor in form(lengths, seed).items()}
            for seed, lengths in enumerate(([7, 2, 5], [4, 6]))
        )
        direction = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
        return [
            gf.functional.per_sample_grad_norms(model, loss_fn, batch),
            gf.functional.per_sample_inner_products(model, loss_fn, batch, direction),
            gf.functional.pairwise_inner_products(model, loss_fn, batch, other),
            gf.functional.grad_inner_products(direction, direction),
        ]

    for found, expected in zip(run(DEVICE), run("cpu"), strict=True):
        assert found.device.type == DEVICE.type
        assert_close(found.flatten(), expected.flatten())


def test_profile_equals_the_cpu() -> None:
    pytest.importorskip("xarray")

    def run(device: torch.device | str):
        model, other = build("llama"), build("llama", seed=1)
        return gf.profile(
            model.to(device),
            None,
            forget=FORGET,
            retain=RETAIN,
            objectives=OBJECTIVES,
            reference_model=other.to(device),
        )

    found, expected = run(DEVICE), run("cpu")
    for name in ("g_effect", "risk_value", "loss", "grad_norm", "cosine"):
        assert_close(torch.from_numpy(found[name].values), torch.from_numpy(expected[name].values))


def test_an_update_by_rows_kept_on_the_host_equals_the_cpu() -> None:
    pytest.importorskip("accelerate")
    given = {"forget": FORGET, "retain": RETAIN, "objective": "ga", "update": "orthograd(room=0)"}
    given |= {"steps": 1, "batch_size": 3, "retain_batch_size": 4, "token_budget": 40}
    given |= {"optimizer": "sgd", "learning_rate": 0.05, "probe_rows": 1}

    def moved(device: torch.device | str) -> list[Tensor]:
        model = build("llama").to(device)
        before = [p.detach().clone() for p in model.parameters()]
        gf.unlearn(model, None, **given)
        return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]

    for found, expected in zip(moved(DEVICE), moved("cpu"), strict=True):
        assert_close(found.flatten(), expected.flatten(), 1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bf16_within_twice_the_error_of_plain_bf16(architecture: str) -> None:
    """Against fp64: plain autograd in bf16 on the same device, one sample at a time."""
    n = len(FORGET)

    def plain(dtype: torch.dtype) -> Tensor:
        model = build(architecture, torch.bfloat16).to(DEVICE, dtype)
        with torch.device(DEVICE):
            found = effects(model, model, [(1.0, "ga", {})], FORGET, RETAIN, None)
        return found[..., :n].cpu()

    with fp64_throughout():
        exact = plain(torch.float64)
    _, ours = reverse(build(architecture, torch.bfloat16).to(DEVICE), None, [GA()])
    error = (ours[0, ..., :n] - exact).flatten(1).norm(dim=1)
    allowed = 2 * (plain(torch.bfloat16) - exact).flatten(1).norm(dim=1)
    assert bool((error <= allowed).all()), f"{error.tolist()} > {allowed.tolist()}"
