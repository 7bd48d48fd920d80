"""Small models around every kind of layer, one row of `CASES` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from geffect_fast.capture import Explicit, Lookup, Outer, RowSum

VOCAB = 11
D = 4


class Net(nn.Module):
    """A model of named modules and a function of them."""

    def __init__(self, run: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """A model, its input, and the form that its parameters' gradients must take.

    `packed`: whether the model treats tokens one by one, so that samples can share a row.
    """

    build: Callable[[], nn.Module]
    reads: str = "floats"
    packed: bool = True
    forms: dict[str, type] = field(default_factory=dict)


def around(layer: nn.Module, d_out: int = D) -> nn.Module:
    """A model with `layer` between two linear layers."""
    return Net(
        lambda m, x: m.after(m.layer(torch.tanh(m.before(x)))),
        before=nn.Linear(D, D),
        layer=layer,
        after=nn.Linear(d_out, 3),
    )


def looked_up(embedding: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.after(m.layer(x)), layer=embedding, after=nn.Linear(D, 3))


class Gated(nn.Linear):
    """A module with a linear layer's name and shapes, and a forward of its own."""

    def forward(self, x):
        return torch.sigmoid(F.linear(x, self.weight, self.bias)) * x


class Written(nn.Linear):
    """A linear layer whose forward is written out, as Falcon's."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Limited(nn.Linear):
    """A layer that is linear on small inputs only."""

    def forward(self, x):
        return F.linear(x.clamp(-4, 4), self.weight, self.bias)


class Detached(nn.Linear):
    """A layer that is linear by its values, but not by its gradients."""

    def forward(self, x):
        return F.linear(x, (self.weight + self.weight.detach()) / 2, self.bias)


class Own(nn.Module):
    """A module with parameters of its own beside a child's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))
        self.child = nn.Linear(D, D)

    def forward(self, x):
        return self.child(x * self.scale) * self.scale


class OwnTiedToChild(nn.Module):
    """A module that uses its child's weight itself too: each of the two uses counts once."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(D, D, bias=False)
        self.weight = self.child.weight

    def forward(self, x):
        return torch.sin(self.child(x)) @ self.weight


class TwoNames(nn.Module):
    """A module that holds one parameter under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(D, D))
        self.second = self.first

    def forward(self, x):
        return torch.tanh(x @ self.first) @ self.second


class Held(nn.Module):
    """A module whose parameters are held by modules that are never called."""

    def __init__(self, vectors=None):
        super().__init__()
        self.vectors = vectors or nn.ParameterDict({"a": torch.randn(D), "b": torch.randn(D)})
        self.nested = nn.ModuleDict({"matrices": nn.ParameterList([torch.randn(D, D)])})

    def forward(self, x):
        return torch.sin(x * self.vectors["a"]) @ self.nested.matrices[0] + self.vectors["b"]


class AroundHeld(nn.Module):
    """A module that shares a parameter holder with a module inside it; both use the parameters."""

    def __init__(self):
        super().__init__()
        self.inner = Held()
        self.vectors = self.inner.vectors

    def forward(self, x):
        return self.inner(x) * self.vectors["a"]


def held_by_two() -> nn.Module:
    first = Held()
    return nn.Sequential(first, Held(first.vectors))


class Scaled(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))

    def forward(self, weight):
        return weight * self.scale


def parametrized(layer: nn.Module, name: str) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, name, Scaled())
    return layer


class Several(nn.Module):
    """A module with several inputs and outputs: an output may be an input, or depend on another."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D))
        self.unused = nn.Parameter(torch.randn(D))

    def forward(self, x, *, y, flag):
        h = x * self.w
        return {"h": h, "rest": [x, torch.sin(h) * y + self.w, flag], "bias": torch.ones_like(x)}


def several(m, x):
    x = torch.tanh(m.before(x))
    out = m.layer(x, y=x * 2, flag=True)
    return out["h"] + 2 * out["rest"][0] * out["rest"][1] + m.after(x) * out["bias"]


class ConstantAndMore(nn.Module):
    """A module with two outputs: with frozen parameters, only one of them depends on a root."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return x.cos(), self.bias.expand(x.shape)


class View(nn.Module):
    """A module that returns a view, which its parent changes in place."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D + 2))

    def forward(self, x):
        return (x @ self.w)[..., 1:-1]


class Shifted(nn.Embedding):
    """A table that looks up rows other than those asked for."""

    def forward(self, ids):
        return super().forward((ids + 2) % VOCAB)


class Halved(nn.Embedding):
    """A module only half of whose output has a gradient."""

    def forward(self, ids):
        y = super().forward(ids)
        return 0.5 * y + 0.5 * y.detach()


class PositiveOnly(nn.Module):
    """A module that acts like a norm on positive inputs, and like the identity on others."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return torch.where(x > 0, x * self.weight, x)


def per_head(m, x):
    heads = m.before(x).view(*x.shape[:-1], 2, 3)
    return m.after(m.layer(heads).flatten(-2))


def transposed_heads(m, x):
    heads = m.before(x).view(*x.shape[:-1], 2, 3).transpose(1, 2)
    return m.after(m.layer(heads).transpose(1, 2).flatten(-2))


def add_positions(m, x):
    return m.after(m.tokens(x) + m.positions(torch.arange(x.shape[1])[None]))


def in_place(m, x):
    y = m.a(x)
    y += 1
    y.mul_(x)
    z = torch.tanh(m.b(y))
    w = m.view(z)
    w += 1
    w[..., 0] *= 2
    return w * 3


def in_place_embedding(m, x):
    h = m.e(x)
    h *= 3
    h[..., 0] = h[..., 1] * 2
    return m.after(h)


def tie(module: nn.Module, a: str, b: str) -> nn.Module:
    module.get_submodule(a).weight = module.get_submodule(b).weight
    return module


def with_hooks(module: nn.Module) -> nn.Module:
    """Put hooks on `layer`, as other packages do, that change its inputs and outputs."""
    module.layer.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5 + 0.1, *args[1:]))
    module.layer.register_forward_hook(lambda _m, _args, y: torch.sin(2 * y))
    return module


def with_linear_hook(module: nn.Module) -> nn.Module:
    """Put a hook on a layer that keeps its linear form and changes its scale."""
    module.layer.register_forward_hook(lambda _m, _args, y: 2 * y)
    return module


def batch_norm(d: int) -> nn.Module:
    norm = nn.BatchNorm1d(d)
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(d))
        norm.running_var.copy_(torch.rand(d) + 0.5)
    return norm


def by_channel(layer: nn.Module) -> nn.Module:
    return Net(
        lambda m, x: m.after(m.layer(m.before(x).mT).mT),
        before=nn.Linear(D, D),
        layer=layer,
        after=nn.Linear(D, 3),
    )


OUTER = {"layer.weight": Outer}
EXPLICIT = {"layer.weight": Explicit}
LOOKUP = {"layer.weight": Lookup}
SUMS = {"layer.weight": RowSum}

CASES: dict[str, Case] = {
    "linear": Case(lambda: around(nn.Linear(D, 5), 5), forms={**OUTER, "layer.bias": RowSum}),
    "linear_without_bias": Case(lambda: around(nn.Linear(D, 5, bias=False), 5), forms=OUTER),
    "conv1d_of_transformers": Case(lambda: around(Conv1D(5, D), 5), forms=OUTER),
    "embedding": Case(lambda: looked_up(nn.Embedding(VOCAB, D)), "ids", forms=LOOKUP),
    "embedding_padding": Case(
        lambda: looked_up(nn.Embedding(VOCAB, D, padding_idx=2)), "ids", forms=LOOKUP
    ),
    "embedding_max_norm": Case(
        lambda: looked_up(nn.Embedding(VOCAB, D, max_norm=0.5)), "ids", forms=EXPLICIT
    ),
    "embedding_scaled": Case(
        lambda: looked_up(Gemma3TextScaledWordEmbedding(VOCAB, D, 0, embed_scale=2.5)),
        "ids",
        forms=LOOKUP,
    ),
    "embedding_scaled_padding_last": Case(
        lambda: looked_up(Gemma3TextScaledWordEmbedding(90, D, 89, embed_scale=2.5)),
        "ids",
        forms=LOOKUP,
    ),
    "embedding_shifted": Case(lambda: looked_up(Shifted(VOCAB, D)), "ids", forms=EXPLICIT),
    "embedding_half_detached": Case(lambda: looked_up(Halved(VOCAB, D)), "ids", forms=EXPLICIT),
    "layer_norm": Case(lambda: around(nn.LayerNorm(D)), forms={**SUMS, "layer.bias": RowSum}),
    "layer_norm_without_bias": Case(lambda: around(nn.LayerNorm(D, bias=False)), forms=SUMS),
    "rms_norm": Case(lambda: around(nn.RMSNorm(D)), forms=SUMS),
    "llama_norm": Case(lambda: around(LlamaRMSNorm(D)), forms=SUMS),
    "gemma_norm": Case(lambda: around(Gemma2RMSNorm(D)), forms=SUMS),
    "norm_per_head": Case(
        lambda: Net(per_head, before=nn.Linear(D, 6), layer=LlamaRMSNorm(3), after=nn.Linear(6, 3)),
        forms=SUMS,
    ),
    "norm_of_transposed_heads": Case(
        lambda: Net(
            transposed_heads, before=nn.Linear(D, 6), layer=LlamaRMSNorm(3), after=nn.Linear(6, 3)
        ),
        packed=False,
        forms=SUMS,
    ),
    "like_a_norm_for_positive_inputs": Case(lambda: around(PositiveOnly()), forms=EXPLICIT),
    "group_norm": Case(lambda: by_channel(nn.GroupNorm(2, D)), packed=False, forms=EXPLICIT),
    "group_norm_one_group": Case(
        lambda: by_channel(nn.GroupNorm(1, D)), packed=False, forms=EXPLICIT
    ),
    "batch_norm": Case(lambda: by_channel(batch_norm(D)), packed=False, forms=EXPLICIT),
    "prelu": Case(lambda: by_channel(nn.PReLU(D)), packed=False, forms=EXPLICIT),
    "conv1d_of_torch": Case(
        lambda: by_channel(nn.Conv1d(D, D, 3, padding=1)), packed=False, forms=EXPLICIT
    ),
    "gru": Case(
        lambda: Net(
            lambda m, x: m.after(m.layer(m.before(x))[0]),
            before=nn.Linear(D, D),
            layer=nn.GRU(D, 5, num_layers=2, batch_first=True),
            after=nn.Linear(5, 3),
        ),
        packed=False,
        forms={"layer.weight_hh_l1": Explicit},
    ),
    "shared_position_ids": Case(
        lambda: Net(
            add_positions,
            tokens=nn.Embedding(VOCAB, D),
            positions=nn.Embedding(9, D),
            after=nn.Linear(D, 3),
        ),
        "ids",
        packed=False,
        forms={"positions.weight": Lookup},
    ),
    "own_parameter_and_child": Case(
        lambda: around(Own()), forms={"layer.scale": Explicit, "layer.child.weight": Outer}
    ),
    "own_parameter_tied_to_child": Case(lambda: around(OwnTiedToChild())),
    "one_parameter_under_two_names": Case(lambda: around(TwoNames())),
    "several_tensors": Case(
        lambda: Net(several, before=nn.Linear(D, D), layer=Several(), after=nn.Linear(D, D)),
        forms={"layer.w": Explicit},
    ),
    "constant_output": Case(
        lambda: Net(
            lambda m, x: torch.mul(*m.layer(m.before(x))),
            before=nn.Linear(D, D),
            layer=ConstantAndMore(),
        )
    ),
    "gated_linear": Case(lambda: around(Gated(D, D)), forms=EXPLICIT),
    "written_linear": Case(lambda: around(Written(D, D)), forms={**OUTER, "layer.bias": RowSum}),
    "written_linear_without_bias": Case(lambda: around(Written(D, D, bias=False)), forms=OUTER),
    "limited_linear": Case(lambda: around(Limited(D, D)), forms=EXPLICIT),
    "detached_linear": Case(lambda: around(Detached(D, D)), forms=EXPLICIT),
    "old_weight_norm": Case(
        lambda: around(nn.utils.weight_norm(nn.Linear(D, D))),
        forms={"layer.weight_v": Explicit, "layer.bias": Explicit},
    ),
    "weight_norm": Case(
        lambda: around(nn.utils.parametrizations.weight_norm(nn.Linear(D, D))),
        forms={"layer.parametrizations.weight.original0": Explicit, "layer.bias": Explicit},
    ),
    "parametrized_bias": Case(
        lambda: around(parametrized(nn.Linear(D, D), "bias")),
        forms={"layer.parametrizations.bias.0.scale": Explicit, "layer.weight": Explicit},
    ),
    "parametrized_norm": Case(lambda: around(parametrized(nn.LayerNorm(D), "weight"))),
    "held_by_no_module": Case(lambda: around(Held()), forms={"layer.vectors.a": Explicit}),
    "held_by_two": Case(lambda: around(held_by_two())),
    "held_by_two_one_inside_the_other": Case(lambda: around(AroundHeld())),
    "called_twice": Case(
        lambda: Net(
            lambda m, x: m.a(torch.tanh(m.a(x))) + m.n(m.n(x)), a=nn.Linear(D, D), n=nn.LayerNorm(D)
        ),
    ),
    "tied_linear_embedding": Case(
        lambda: tie(
            Net(
                lambda m, x: m.head(torch.tanh(m.mid(m.e(x)))),
                e=nn.Embedding(VOCAB, D, padding_idx=1),
                mid=nn.Linear(D, D),
                head=nn.Linear(D, VOCAB),
            ),
            "head",
            "e",
        ),
        "ids",
    ),
    "tied_linear_linear": Case(
        lambda: tie(
            Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, D)),
            "b",
            "a",
        )
    ),
    "tied_linear_transposed": Case(
        lambda: tie(
            Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(D, D), b=Conv1D(D, D)), "b", "a"
        )
    ),
    "tied_embedding_embedding": Case(
        lambda: tie(
            Net(
                lambda m, x: m.after(m.a(x) * torch.tanh(m.b((x + 1) % VOCAB))),
                a=nn.Embedding(VOCAB, D),
                b=nn.Embedding(VOCAB, D),
                after=nn.Linear(D, 3),
            ),
            "b",
            "a",
        ),
        "ids",
    ),
    "tied_embedding_transposed": Case(
        lambda: tie(
            Net(
                lambda m, x: m.after(torch.sin(m.e(x))),
                e=nn.Embedding(D, D),
                after=Conv1D(D, D),
            ),
            "after",
            "e",
        ),
        "few_ids",
    ),
    "tied_norm_linear": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=nn.LayerNorm(D), b=nn.Linear(D, D)),
    ),
    "hooks_of_others_linear": Case(lambda: with_hooks(around(nn.Linear(D, D)))),
    "hooks_of_others_norm": Case(lambda: with_hooks(around(LlamaRMSNorm(D)))),
    "linear_hook_on_a_norm": Case(lambda: with_linear_hook(around(LlamaRMSNorm(D))), forms=SUMS),
    "linear_hook_on_an_embedding": Case(
        lambda: with_linear_hook(looked_up(Gemma3TextScaledWordEmbedding(VOCAB, D, 0, 2.5))),
        "ids",
        forms=LOOKUP,
    ),
    "hooks_of_others_generic": Case(lambda: with_hooks(around(Own()))),
    "in_place": Case(
        lambda: Net(in_place, a=nn.Linear(D, D), b=nn.Linear(D, D), view=View()),
    ),
    "in_place_embedding": Case(
        lambda: Net(in_place_embedding, e=nn.Embedding(VOCAB, D), after=nn.Linear(D, 3)), "ids"
    ),
    "not_contiguous": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x.mT.contiguous().mT)[..., ::2]).flip(-1),
            a=nn.Linear(D, 6),
            b=nn.LayerNorm(3),
        )
    ),
    "expanded_gradient": Case(
        lambda: Net(lambda m, x: m.a(x).sum(-1, keepdim=True).expand(*x.shape), a=nn.Linear(D, D))
    ),
}
