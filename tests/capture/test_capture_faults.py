"""Models on which capture could be wrong without an error: each is exact, or refused by name."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CASES, Net, Own, around
from models_by_autograd import batch, brute, model_of, per_sample
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import geffect_fast as gf
from geffect_fast.capture import OutsideUse, Plan, Recorder
from geffect_fast.capture.products import inner, pairwise, squared_norms
from geffect_fast.errors import InputError, UnsupportedModelError


class Changing(nn.Module):
    """A module that changes its input, or a child's input, in place."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x.mul_(2) * self.w if self.inside else x * self.w


def change_after(m, x):
    h = torch.tanh(m.before(x))
    y = m.layer(h)
    h += 1
    return y + m.after(h)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), LlamaRMSNorm(4), Own(), Changing(False)])
def test_an_input_changed_after_the_call(layer):
    model = around(layer).double().eval()
    model.run = change_after
    model.after = nn.Linear(4, 4).double()
    x = batch()
    with pytest.raises((UnsupportedModelError, RuntimeError), match=r"in ?place"):
        gf.functional.per_sample_grad_norms(model, lambda m, b: m(b).sum((1, 2)), x)


def test_a_linear_input_changed_after_the_call_is_named():
    model = around(nn.Linear(4, 4)).double().eval()
    model.run, model.after = change_after, nn.Linear(4, 4).double()
    with pytest.raises(UnsupportedModelError, match="module 'layer': its input was changed"):
        gf.functional.per_sample_grad_norms(model, lambda m, b: m(b).sum((1, 2)), batch())


def test_a_module_that_changes_its_own_input():
    model = Net(
        lambda m, x: m.after(m.layer(torch.tanh(m.before(x)) * 1)),
        before=nn.Linear(4, 4), layer=Changing(True), after=nn.Linear(4, 3),
    ).double()  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="module 'layer': its input was changed"):
        gf.functional.per_sample_grad_norms(model, lambda m, b: m(b).sum((1, 2)), batch())


class Precise(Own):
    """A module that computes something else when it is run again in another precision."""

    def forward(self, x):
        y = (x @ self.scale)[..., None]
        return super().forward(x) * (y if y.dtype == torch.bfloat16 else 9 * y)


def test_autocast():
    """Inputs are fp32 and output gradients bf16: the error is that of bf16, for every rule."""
    torch.manual_seed(0)
    model = around(Precise())
    model.norm = nn.LayerNorm(4)
    model.run = lambda m, x: m.after(m.layer(m.norm(m.before(x))))
    x = batch().float()
    with gf.capture(model) as records:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sin().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = brute(model, x)
    for name, p in model.named_parameters():
        found = per_sample(records, name, p.shape).float()
        scale = wanted[name].max()
        torch.testing.assert_close(found / scale, wanted[name] / scale, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["linear", "tied_linear_embedding", "llama_norm", "gated_linear"])
def test_products_keep_their_precision_under_autocast(name):
    """The factors are rounded already; their products must not be rounded again."""
    model = CASES[name].build().eval()
    x = batch().float() if CASES[name].reads == "floats" else torch.tensor([[1, 2, 3], [4, 5, 6]])
    with gf.capture(model) as records:
        model(x).sin().sum().backward()

    def products():
        found = []
        for key, p in model.named_parameters():
            direction = torch.linspace(-1, 1, p.numel()).view(1, *p.shape)
            found += [inner(f, direction) for f in records[key]]
            found.append(squared_norms(records[key], p.shape))
            found.append(pairwise(records[key], records[key], p.shape))
        return found

    wanted = products()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = products()
    for a, b in zip(rounded, wanted, strict=True):
        assert torch.equal(a, b)


def test_requires_grad_inputs_and_soft_prompts_hide_nothing():
    """A branch that a backward to the recorder's own roots would not visit is not lost."""
    model = Net(lambda m, x: m.a(x) * m.b(torch.ones(4)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    prompt = nn.Parameter(torch.ones(4))
    x = batch().float().requires_grad_()

    def loss(m, data):
        return m(data * prompt).sin().sum((1, 2))

    norms = gf.functional.per_sample_grad_norms(
        Net(lambda m, x: m.a(x), a=model.a), loss, x, per_parameter=True
    )
    assert x.grad is None and prompt.grad is None
    for i, own in enumerate(x.detach().split(1)):
        grad = torch.autograd.grad(model.a(own).sin().sum(), model.a.weight)[0]
        torch.testing.assert_close(norms["a.weight"][i].float(), grad.norm())


class Head(nn.Module):
    """A head that uses the embedding's weight without calling the embedding."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(7, 4)

    def forward(self, ids):
        assert self.e.weight.dtype == torch.zeros_like(self.e.weight).dtype  # not a use
        return self.e(ids) @ self.e.weight.detach().T @ self.e.weight


class UsesChild(nn.Module):
    """A module that calls a child, and uses the child's weight itself too."""

    def __init__(self, child=None):
        super().__init__()
        self.child = child or nn.Linear(4, 4)

    def forward(self, x):
        return torch.sin(self.child(x)) @ self.child.weight


def test_a_parameter_used_outside_its_module():
    """The use is noticed, and from then on the parameter belongs to the module around its own."""
    plan = Plan.of(Head())
    with (
        plan.frozen(),
        Recorder(plan, lambda *_: None) as recorder,
        OutsideUse(plan, recorder.running) as outside,
    ):
        with torch.no_grad():
            plan.model.e.weight.sum()
        assert not outside.found
        torch.cat([plan.model.e.weight, torch.ones(1, 4)])
    assert list(outside.found) == ["e.weight"]
    plan.widen(outside.found)
    assert {where: own.names for where, own in plan.owners.items()} == {
        "": {"e.weight": "e.weight"}
    }


def test_a_parameter_used_outside_the_model():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def loss(m, b):
        return (m(b) @ m.e.weight.T).sum((1, 2))

    message = r"parameter 'e\.weight' is used outside the model's own forward"
    with pytest.raises(UnsupportedModelError, match=message):
        gf.functional.per_sample_grad_norms(Head(), loss, ids)


@pytest.mark.parametrize("name", ["layer", "head", "attention", "tied", "encoder"])
def test_parameters_used_by_the_modules_around_theirs(name):
    """Shared parameters, beside ordinary ones, are used by name, by call and by another module."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = {
        "layer": around(UsesChild()),
        "head": Head(),
        "attention": Net(
            lambda m, x: m.a(*(3 * [m.b(x)]))[0],
            b=nn.Linear(4, 4),
            a=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        "tied": Net(lambda m, x: m.b(m.a(x)), a=UsesChild(linear), b=UsesChild(linear)),
        "encoder": Net(lambda m, x: m.a(x) * m.b(x), a=encoder, b=nn.Linear(4, 4)),
    }[name].double()
    x = torch.tensor([[1, 2, 3], [4, 5, 6]]) if name == "head" else batch()
    norms = gf.functional.per_sample_grad_norms(
        model, lambda m, b: m(b).sin().sum((1, 2)), x, per_parameter=True
    )
    for parameter, square in brute(model, x).items():
        torch.testing.assert_close(norms[parameter], square.sqrt(), rtol=1e-10, atol=1e-12)


class Constant(nn.Module):
    """A module that returns what it learned, whatever its input."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self):
        return self.w.exp()


def test_a_module_called_without_a_tensor_belongs_to_no_sample():
    model = Net(
        lambda m, x: m.after(m.before(x) * m.layer()),
        before=nn.Linear(4, 4), layer=Constant(), after=nn.Linear(4, 3),
    ).double()  # fmt: skip
    loss = lambda m, b: m(b).sin().sum((1, 2))  # noqa: E731
    with pytest.raises(UnsupportedModelError, match="module 'layer' is called without a tensor"):
        gf.functional.per_sample_grad_norms(model, loss, batch(4, 5))
    one = batch(1, 5)
    norms = gf.functional.per_sample_grad_norms(model, loss, one, per_parameter=True)
    for name, square in brute(model, one).items():
        torch.testing.assert_close(norms[name], square.sqrt())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.1), "'layer' is in train mode with active dropout"),
        (nn.BatchNorm1d(5), "'layer' normalises over the samples"),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), "'layer' scales gradients by the ids"),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.3), "'layer' is in train mode with active dropout"),
    ],
)
def test_modules_that_mix_samples_or_are_random(layer, message):
    model = Net(lambda m, x: x, a=nn.Linear(2, 2), layer=layer).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught, gf.capture(model):
        pass
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_nothing_trainable():
    with pytest.raises(InputError, match="every parameter is frozen"):
        Plan.of(nn.Linear(2, 2).requires_grad_(False))


def test_a_submodule_called_by_itself():
    model, x = model_of(), batch()
    message = "'before' ran outside the model's own forward"
    with pytest.raises(InputError, match=message), gf.capture(model):
        model.before(x).sum().backward()
    assert all(not m._forward_hooks for m in model.modules())


class Counting(nn.Module):
    """A module that computes another function at every call."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.w * self.calls


def test_a_module_that_is_another_function_when_it_is_run_again():
    model = around(Counting()).double()
    with pytest.raises(UnsupportedModelError, match="module 'layer' does not return the same"):
        gf.functional.per_sample_grad_norms(model, lambda m, b: m(b).sum((1, 2)), batch())


def test_capture_refuses_what_it_does_not_see():
    model, ids = Head(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    message = r"parameter 'e\.weight' is used outside its own module's forward"
    with pytest.raises(UnsupportedModelError, match=message), gf.capture(model):
        model(ids).sum().backward()
    assert gf.functional.per_sample_grad_norms(model, lambda m, b: m(b).sum((1, 2)), ids).shape == (
        2,
    )
    model.requires_grad_(False)
    after = nn.Sequential(model, nn.Linear(4, 4))
    with gf.capture(after) as records:
        after(ids).sum().backward()
    assert set(records) == {"1.weight", "1.bias"}
