"""Functions of duals, one by one, against the framework's derivative of the same code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vmap

from geffect_fast.engines.dual import tensor as dual_tensor
from geffect_fast.engines.dual.modes import DualPass
from geffect_fast.engines.dual.tensor import Dual, NoRuleError

M = 3


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fixed(*shape):
    """A constant tensor that is the same at every call, also inside the framework's maps."""
    n = torch.Size(shape).numel()
    return (1.7 * torch.arange(n, dtype=torch.float64) + n).sin().view(shape)


def stacked(x, tangents):
    return Dual.of(torch.cat([x[None], tangents]))


def agrees(function, *primals, still=(), ways=(stacked, Dual)):
    """Check a function on stacked and on separate tangents; `still`: primals without tangents."""
    tangents = [noise(M, *x.shape, seed=9 + i, dtype=x.dtype) for i, x in enumerate(primals)]
    moving = [i for i in range(len(primals)) if i not in still]

    def run(*some):
        given = list(primals)
        for i, x in zip(moving, some, strict=True):
            given[i] = x
        out = function(*given)
        return out if isinstance(out, tuple) else (out,)

    start = tuple(primals[i] for i in moving)
    values, expected = vmap(lambda *v: jvp(run, start, v), out_dims=(None, 0))(
        *(tangents[i] for i in moving)
    )
    for made in ways:
        with DualPass():
            found = run(*(made(primals[i].clone(), tangents[i].clone()) for i in moving))
        for dual, value, moved in zip(found, values, expected, strict=True):
            assert dual.shape == value.shape and dual.dtype == value.dtype
            for ours, theirs in ((dual.primal, value), (dual.tangents, moved)):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


ONE = {
    "view": lambda x: x.view(6, 4),
    "view, one list": lambda x: x.view((2, -1)),
    "reshape": lambda x: x.transpose(0, 1).reshape(3, -1),
    "torch.reshape": lambda x: torch.reshape(x, (4, 6)),
    "transpose": lambda x: x.transpose(0, 2) * x.transpose(-1, 0),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute, one list": lambda x: torch.permute(x, (0, -1, 1)),
    "mT": lambda x: x[0].mT @ x[0],
    "T": lambda x: x[0].T,
    "flatten": lambda x: x.flatten(1) + x.flatten(1, 2) + torch.flatten(x, -2),
    "flatten all": lambda x: x.flatten(),
    "unsqueeze": lambda x: x.unsqueeze(0) * x.unsqueeze(-1).sum(-1),
    "unsqueeze behind": lambda x: x.unsqueeze(3),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze behind": lambda x: x[..., :1].squeeze(-1),
    "squeeze all": lambda x: x[:1, :, :1].squeeze(),
    "expand": lambda x: x.expand(5, 2, 3, 4),
    "expand in place of one": lambda x: x[:, :1].expand(-1, 3, -1),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.split([1, 3], dim=2),
    "torch.split": lambda x: torch.split(x, 1),
    "unbind": lambda x: x.unbind(1),
    "slices": lambda x: x[:, 1:, ::2],
    "ellipsis": lambda x: x[..., 2:],
    "new axis": lambda x: x[:, None, 1],
    "one list": lambda x: x[:, torch.tensor([2, 0, 2])],
    "a list in front": lambda x: x[torch.tensor([1, 1, 0])],
    "mask": lambda x: x[torch.tensor([True, False])],
    "two lists apart": lambda x: x[torch.tensor([0, 1]), :, torch.tensor([3, 2])],
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 1, 0])),
    "clone": lambda x: x.clone().mul_(2) + x,
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
    "float": lambda x: x.float(),
    "type_as": lambda x: x.type_as(torch.ones(1, dtype=torch.float32)),
    "sum": lambda x: x.sum() + x.sum(-1, keepdim=True) + x.sum((0, 2), keepdim=True),
    "mean": lambda x: x.mean(0) + x.mean((-1, 1), keepdim=True)[0] + x.mean(),
    "neg": lambda x: -x,
    "add a number": lambda x: x + 2 + torch.add(1, x, alpha=3),
    "add what does not move": lambda x: x + fixed(5, 2, 3, 4) - fixed(4) + fixed(1, 1),
    "subtract from": lambda x: 1 - x - (fixed(2, 1, 4) - x),
    "multiply": lambda x: 3 * x * fixed(3, 1) * torch.tensor(2.0) * fixed(7, 1, 1, 1),
    "divide": lambda x: x / 3 / fixed(4),
    "divide a number": lambda x: 1 / (2 + x.square()),
    "products of itself": lambda x: x * x.sum(-1, keepdim=True) * x[0, 0],
    "sum of unlike shapes": lambda x: x + x[0, 0] - x[:, :1],
    "pow": lambda x: x.pow(2) + x**3 + torch.pow(x, 4) + x.square(),
    "pow of a number": lambda x: 2**x,
    "roots": lambda x: (x.square() + 1).rsqrt() + (x * x + 1).sqrt() + (x.square() + 1).log(),
    "exp": lambda x: x.exp() + torch.exp(-x),
    "tanh": lambda x: torch.tanh(x) + x.sigmoid() + F.relu(x) + F.silu(x),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "softmax": lambda x: x.softmax(-1) + F.softmax(x, dim=1) + torch.softmax(x, 0),
    "softmax in fp32": lambda x: F.softmax(x, dim=-1, dtype=torch.float64),
    "masked_fill": lambda x: x.masked_fill(fixed(3, 4) > 0, -7.0),
    "dropout that is off": lambda x: F.dropout(x, 0.5, training=False),
    "cat with what does not move": lambda x: torch.cat([x, fixed(2, 3, 4), -x], dim=1),
    "cat behind an empty cache": lambda x: torch.cat([x.new_zeros(0), x], dim=-2),
    "stack": lambda x: torch.stack([x, 2 * x], -1),
    "index_copy": lambda x: fixed(9, 3, 4).index_copy(0, torch.tensor([7, 1]), x),
    "matmul": lambda x: x @ fixed(4, 5) + fixed(3, 3) @ x @ fixed(4, 5),
    "matmul of itself": lambda x: x @ x.mT + x[0] @ x.mT,
    "vector": lambda x: x @ fixed(4),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "layer norm of two axes": lambda x: F.layer_norm(x, (3, 4)),
    "without a rule": lambda x: torch.cumsum(x, 1).roll(1, 0) + torch.logsumexp(x, -1, True),
    "max": lambda x: x.max(-1).values,
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "einsum": lambda x: torch.einsum("abc,abd->acd", x, x.sin()),
    "constants": lambda x: x * x.detach() * torch.ones_like(x) + x.data * (x > 0),
    "no gradient": lambda x: x * _without(x),
    "in place": lambda x: (3 * x).mul_(2).add_(x),
    "into a part": lambda x: _into(3 * x, x),
    "through a view": lambda x: _through_a_view(3 * x),
}  # fmt: skip


def _without(x):
    with torch.no_grad():
        return x.sin()


def _into(y, x):
    y[:, 1] = x[:, 0]
    y[0, 2] = 5.0
    y[..., :1] += 1
    return y


def _through_a_view(y):
    y.view(6, 4)[1:3].mul_(-1)
    y.transpose(0, 1)[0] *= 2
    return y


CONSTANT_TO_VMAP = {"constants", "no gradient"}
"""Functions whose constants forward mode by itself would differentiate."""


WRITES = {"clone", "in place", "into a part", "through a view"}
"""Functions that write, tested on stacks only: memory of separate tensors may be a parameter's, or
shared."""


@pytest.mark.parametrize("name", [n for n in ONE if n not in CONSTANT_TO_VMAP])
def test_functions(name):
    agrees(ONE[name], noise(2, 3, 4), ways=(stacked,) if name in WRITES else (stacked, Dual))


@pytest.mark.parametrize("name", sorted(CONSTANT_TO_VMAP))
def test_what_is_constant_to_reverse_mode(name):
    x, v = noise(2, 3, 4), noise(M, 2, 3, 4, seed=1)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ONE[name](leaf).sum(), leaf)
    with DualPass():
        found = ONE[name](stacked(x, v))
    torch.testing.assert_close(found.tangents, v * slope, rtol=1e-12, atol=1e-12)


TWO = {
    "add": lambda x, y: x + y + torch.add(x, y, alpha=2),
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / (2 + y.square()),
    "matmul": lambda x, y: x @ y.mT,
    "of unlike precision": lambda x, y: x.float() * y + x.float() + y,
    "a scalar": lambda x, y: x * y.sum() + y.mean(),
    "cat": lambda x, y: torch.cat([x, y], -1),
}


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("still", [(), (0,), (1,)], ids=str)
def test_functions_of_two(name, still):
    agrees(TWO[name], noise(2, 3, 4), noise(2, 3, 4, seed=1), still=still)


@pytest.mark.parametrize("still", [(), (0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: torch.addmm(b, x[0], w.mT),
        lambda x, w, _: F.linear(x, w) + F.linear(x[0, 0], w),
        lambda x, w, b: F.layer_norm(F.linear(x, w), (5,), b, 2 * b),
    ],
)
def test_layers(function, still):
    agrees(function, noise(2, 3, 4), noise(5, 4, seed=1), noise(5, seed=2), still=still)


@pytest.mark.parametrize("still", [(), (0,), (1,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "enable_gqa": True}], ids=str)
def test_attention(options, still):
    shared = 2 if options else 4
    qkv = noise(2, 4, 6, 3), noise(2, shared, 6, 3, seed=1), noise(2, shared, 6, 5, seed=2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        agrees(lambda *x: F.scaled_dot_product_attention(*x, **options), *qkv, still=still)


# ---- functions that duals cannot follow ----


class Halve(torch.autograd.Function):
    """An operation whose declared derivative is not that of its code."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, grad):
        return grad


halve = Halve.apply  # before any pass


def _write(x):
    out = torch.zeros(2, 3, 4, dtype=x.dtype)
    out[0] = x[0]
    return out


def _write_without_gradient(x):
    with torch.no_grad():
        return x.mul_(2)


REFUSED = {
    "a function of its own": lambda x: halve(x),
    "written into a constant": _write,
    "added to a constant": lambda x: torch.zeros(2, 3, 4).add_(x),
    "into what it was given": lambda x: torch.sin(x, out=torch.zeros(2, 3, 4)),
    "in place without gradients": _write_without_gradient,
    "in place of an expanded one": lambda x: x[:, :1].expand(2, 3, 4).mul_(2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with DualPass(), pytest.raises(NoRuleError):
        REFUSED[name](stacked(noise(2, 3, 4), noise(M, 2, 3, 4)))


def test_writing_to_a_dual_of_separate_tensors_is_refused():
    """A dual of separate tensors refuses writes: its value may be a parameter's own memory."""
    x, v = noise(2, 3), noise(M, 2, 3)
    with DualPass():
        for shared in (Dual(x, v), Dual(x, v)[0], Dual(x, v) + 1):
            with pytest.raises(NoRuleError):
                shared.mul_(2)


def test_lack_of_memory_is_no_missing_rule(monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dual_tensor, "jvp", full)
    with DualPass(), pytest.raises(torch.OutOfMemoryError):
        stacked(noise(2, 3), noise(M, 2, 3)).cumsum(0)


def test_no_graph_is_built():
    """No graph is built, even where checkpointing asks for a graph of a constant."""
    x = noise(2, 3)
    with DualPass():
        assert not x.requires_grad_().requires_grad
        found = stacked(noise(2, 3), noise(M, 2, 3)).requires_grad_() * x
    assert not found.stack.requires_grad
