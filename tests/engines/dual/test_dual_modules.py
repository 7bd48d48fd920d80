"""Modules get a faster rule in forward mode by what they compute, not by their name."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from models import build
from torch import nn
from torch.func import functional_call, jvp

from geffect_fast.engines.dual.modules import TOLERANCE, dual_modules, fast_forwards

D, WIDE = 6, 10


class Norm(nn.Module):
    """A norm like Llama's."""

    def __init__(self, d=D, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(d))
        self.variance_epsilon = eps

    def forward(self, x):
        return self.weight * self.normed(x)

    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class OnePlus(Norm):
    """A norm like Gemma's."""

    def forward(self, x):
        return (1 + self.weight) * self.normed(x)


class MLP(nn.Module):
    """An MLP like Llama's."""

    def __init__(self, act_fn=F.silu, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(D, WIDE, bias=bias)
        self.up_proj = nn.Linear(D, WIDE, bias=bias)
        self.down_proj = nn.Linear(WIDE, D, bias=bias)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GatedNorm(Norm):
    """A norm like Mamba 2's: a gate may be given beside the normed tensor."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


def ready(module, dtype=torch.float64):
    return module.to(dtype).eval()


def moved(module, *args):
    """Value and derivative of a module along noise in all its inputs and parameters."""
    generator = torch.Generator().manual_seed(5)

    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def run(parameters, *args):
        return functional_call(module, parameters, args)

    along = {name: noise(p) for name, p in parameters.items()}, *map(noise, args)
    return jvp(run, (parameters, *args), along)


def recognised(module):
    """Whether a module has a rule; a rule must compute what the module does."""
    forwards = fast_forwards(module)
    own = [m for m in forwards if m is module]
    if own:
        x = torch.randn(2, 3, D, dtype=torch.float64)
        expected = moved(module, x)
        with dual_modules(forwards):
            assert module.forward is forwards[module]
            found = moved(module, x)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert "forward" not in vars(module)
    return bool(own)


class Nested(nn.Module):
    """A module around modules that look alike."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = nn.ModuleList(inside)


@pytest.mark.parametrize(
    "module",
    [
        Norm(),
        Norm(eps=0.5),
        OnePlus(),
        GatedNorm(),
        nn.RMSNorm(D, eps=1e-6),
        MLP(),
        MLP(bias=True),
        MLP(F.gelu),
        MLP(nn.GELU("tanh")),
        MLP(lambda x: x.relu().square()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_recognised(module):
    assert recognised(ready(module))


# ---- modules that differ slightly ----


class EpsAfterRoot(Norm):
    def normed(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class EpsAsFloor(Norm):
    def normed(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).clamp(min=self.variance_epsilon).rsqrt()


class OtherEps(Norm):
    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class SumOfSquares(Norm):
    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.variance_epsilon)


class Centred(Norm):
    def normed(self, x):
        return super().normed(x - x.mean(-1, keepdim=True))


class TwoPlus(Norm):
    def forward(self, x):
        return (2 + self.weight) * self.normed(x)


class Halved(Norm):
    """A norm over each half of the features: a norm of groups."""

    def normed(self, x):
        return super().normed(x.unflatten(-1, (2, -1))).flatten(-2)


class Clipped(Norm):
    """A norm whose output is clipped: it equals a known norm on small numbers alone."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class HighlyClipped(Norm):
    """A norm that clips its input at a high limit."""

    def normed(self, x):
        return super().normed(x.clamp(-9, 9))


class Detached(Norm):
    """A norm with the same values, whose scale is held constant."""

    def normed(self, x):
        return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class WithoutGradient(Norm):
    def normed(self, x):
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * scale


class WithBias(Norm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return super().forward(x) + self.bias


class ClippedMLP(MLP):
    """An MLP that clips, as gpt-oss has it."""

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=0.1), self.up_proj(x).clamp(-0.1, 0.1)
        return self.down_proj(self.act_fn(gate) * up)


class HighlyClippedMLP(MLP):
    """An MLP that clips at a limit that only some models ever reach."""

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class Residual(MLP):
    def forward(self, x):
        return x + super().forward(x)


class Swapped(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class ConstantGate(MLP):
    """An MLP with the same values, and no gradient through the gate."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


class ConstantInside(MLP):
    """An MLP with the same values, whose down projection treats its input as constant."""

    def forward(self, x):
        with torch.no_grad():
            inside = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inside)


class Softmax(MLP):
    """An MLP whose activation is a softmax, which is not elementwise."""

    def __init__(self):
        super().__init__(lambda x: x.softmax(-1))


class TwoOutputs(MLP):
    def forward(self, x):
        return super().forward(x), None


class Needy(MLP):
    def forward(self, x, routing):
        return super().forward(x) * routing


class Scaled(MLP):
    """An MLP with a scale of its own, which is 1 at first."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * super().forward(x)


OTHERS = [
    *(EpsAfterRoot, EpsAsFloor, OtherEps, SumOfSquares, Centred, TwoPlus, Halved),
    *(Clipped, HighlyClipped, Detached, WithoutGradient, WithBias),
    *(lambda: nn.LayerNorm(D), lambda: nn.RMSNorm((3, D))),
    lambda: nn.RMSNorm(D, elementwise_affine=False),
    *(ClippedMLP, HighlyClippedMLP, Residual, Swapped, ConstantGate, ConstantInside, Softmax),
    *(TwoOutputs, Needy, Scaled, lambda: MLP(nn.PReLU())),
]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_not_taken_for_one(kind):
    torch.manual_seed(0)
    assert not recognised(ready(kind()))


def test_a_forward_replaced_on_the_instance_stays():
    """Other packages' hooks replace the forward of an instance."""
    for module in (Norm(), MLP()):
        ready(module)
        module.forward = lambda x: 2 * x
        assert not recognised(module)
        with dual_modules(fast_forwards(module)):
            assert module(torch.ones(1)) == 2
        assert "forward" in vars(module)


def unlike(module, **attributes):
    """A module with attributes that differ from its class's."""
    for name, value in attributes.items():
        setattr(module, name, value)
    return ready(module)


class Switched(MLP):
    """A module with a flag, a buffer and a list, any of which may change its result."""

    scale: float = 1
    places: ClassVar = []

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x):
        return self.scale * super().forward(x) + self.shift + len(self.places)


def test_modules_that_differ_are_each_tried():
    """One module stands for others only where they differ in nothing but their weights."""
    modules = [
        *(Norm(), Norm(), unlike(Norm(), variance_epsilon=0.5), OnePlus(), Clipped(), Norm(D + 1)),
        *(MLP(), MLP(), MLP(F.gelu), MLP(nn.GELU()), MLP(nn.GELU("tanh"))),
        *(Switched(), unlike(Switched(), scale=2.0), unlike(Switched(), places=[1])),
        unlike(Switched(), shift=torch.ones(())),
    ]
    found = fast_forwards(ready(Nested(*modules)))
    assert [module in found for module in modules] == [True] * 4 + [False] + [True] * 7 + [
        False
    ] * 3
    for module in modules:
        d = len(module.weight) if isinstance(module, Norm) else D
        x = torch.randn(2, 3, d, dtype=torch.float64)
        expected = moved(module, x)
        with dual_modules(found):
            torch.testing.assert_close(moved(module, x), expected, rtol=1e-12, atol=1e-12)


def test_a_gate_that_is_given_is_not_lost():
    module = ready(GatedNorm())
    x, gate = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    expected = moved(module, x, gate)
    with dual_modules(fast_forwards(module)):
        found = moved(module, x, gate)
        assert torch.equal(module(x, gate=gate), module.forward(x, gate))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_forwards_are_put_back_after_an_error():
    module = ready(nn.Sequential(Norm(), MLP()))
    with pytest.raises(KeyError), dual_modules(fast_forwards(module)):
        assert all("forward" in vars(m) for m in module)
        raise KeyError
    assert not any("forward" in vars(m) for m in module.modules())


NORMS_AND_MLPS = {
    "llama": ("LlamaMLP", "LlamaRMSNorm"),
    "gemma": ("GemmaMLP", "GemmaRMSNorm"),
    "gemma3": ("Gemma3MLP", "Gemma3RMSNorm"),
    "qwen3": ("Qwen3MLP", "Qwen3RMSNorm"),
    "mixtral": ("MixtralRMSNorm",),
    "olmo": ("OlmoMLP",),
    "gpt2": (),
    "phi": (),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", NORMS_AND_MLPS)
def test_models_of_transformers_run_fast_in_every_precision(name, dtype):
    model = build(name).to(dtype)
    found = fast_forwards(model)
    kinds = NORMS_AND_MLPS[name]
    assert sorted({type(m).__name__ for m in found}) == sorted(kinds)
    assert len(found) == sum(type(m).__name__ in kinds for m in model.modules())


def test_looking_changes_nothing():
    model = ARCHITECTURES["llama"]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fast_forwards(model)
    assert torch.equal(torch.rand(2), expected)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None
    assert not any("forward" in vars(m) for m in model.modules())
