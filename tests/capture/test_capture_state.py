"""A recorder leaves nothing behind, and works beside other code."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from models import build as build_model
from models_by_autograd import assert_records, batch, brute, hooks, model_of, per_sample

import geffect_fast as gf
from geffect_fast.capture import Outer, Plan, Recorder, Recording, Segments
from geffect_fast.capture.products import squared_norms
from geffect_fast.errors import UnsupportedModelError


@pytest.mark.parametrize("name", ["linear", "own_parameter_and_child", "llama_norm"])
def test_the_user_s_own_backward_is_as_without(name):
    model, x = model_of(name), batch()
    model(x).sin().sum().backward()
    expected = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    with gf.capture(model) as records:
        model(x).sin().sum().backward()
    assert all(torch.equal(p.grad, expected[k]) for k, p in model.named_parameters())
    assert_records(records, model, x)


def test_records_hold_inputs_and_output_gradients():
    model, x = model_of(), batch()
    with gf.capture(model) as records:
        model(x).sum().backward()
    (factor,) = records["before.weight"]
    assert isinstance(factor, Outer) and factor.a.shape == (15, 4)
    assert torch.equal(factor.a, x.flatten(0, 1)) and factor.cu.host == (0, 5, 10, 15)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_go_and_nothing_changes(fails):
    model = model_of("own_parameter_and_child")
    before, state = hooks(model), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with gf.capture(model):
            model(batch()).sum().backward()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert hooks(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_frozen_restores_also_after_an_exception():
    model = model_of()
    model.before.weight.requires_grad_(False)
    plan = Plan.of(model)
    assert "before.weight" not in plan.parameters
    for fail in (False, True):
        try:
            with plan.frozen():
                assert not any(p.requires_grad for p in model.parameters())
                if fail:
                    raise KeyError
        except KeyError:
            pass
        asking = {k for k, p in model.named_parameters() if p.requires_grad}
        assert asking == set(plan.parameters)


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_show_where_no_module_that_owns_them_runs(fails):
    model = model_of("own_parameter_and_child")
    plan = Plan.of(model)
    recorder = Recorder(plan, lambda *_: None, Segments.rectangular(batch().shape))
    inside = {}

    def asking():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    for where, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, where=where: inside.update({where: asking()}))
    with plan.frozen(), recorder:
        with suppress(KeyError), recorder.showing_parameters():
            model(batch())
            assert asking() == set(plan.parameters)
            if fails:
                raise KeyError
        assert not asking()
    assert asking() == set(plan.parameters)
    assert len(inside) == len(list(model.modules()))
    for where, found in inside.items():
        holders = {name: name.rpartition(".")[0] for name in plan.parameters}
        assert found == {k for k, h in holders.items() if not f"{where}.".startswith(f"{h}.")}


def test_backwards_after_the_block_are_left_alone():
    model, x = model_of("own_parameter_and_child"), batch()
    with gf.capture(model) as records:
        loss = model(x).sum()
    loss.backward()
    assert records == {} and all(p.grad is not None for p in model.parameters())


def test_nested_captures_see_the_same():
    model, x = model_of("own_parameter_and_child"), batch()
    with gf.capture(model) as outer:
        with gf.capture(model) as inner:
            model(x).sin().sum().backward()
        # A module is run again for its vjp; the outer recorder must not record this call.
        found = {k: per_sample(inner, k, p.shape) for k, p in model.named_parameters()}
        assert {len(factors) for factors in outer.values()} <= {1}
    assert_records(outer, model, x)
    for name, wanted in brute(model, x).items():
        torch.testing.assert_close(found[name], wanted)


def test_two_forwards_before_one_backward():
    model, x, y = model_of(), batch(), batch(2, 4, seed=3)
    with gf.capture(model) as records:
        (model(x).sin().sum() + model(y).sin().sum()).backward()
    by_size = {len(f.cu): f for f in records["layer.weight"]}
    for n, data in ((3, x), (2, y)):
        torch.testing.assert_close(
            squared_norms([by_size[n]], model.layer.weight.shape),
            brute(model, data)["layer.weight"],
        )


def test_forwards_without_gradients_are_not_recorded():
    model, x = model_of(), batch()
    with gf.capture(model) as records:
        with torch.no_grad():
            model(batch(7))
        model(x).sin().sum().backward()
    assert_records(records, model, x)


def test_packed_capture():
    model, x = model_of(), batch(1, 9)
    with gf.capture(model, torch.tensor([0, 4, 9])) as records:
        model(x).sin().sum().backward()
    for name, p in model.named_parameters():
        wanted = [brute(model, part)[name] for part in (x[:, :4], x[:, 4:])]
        torch.testing.assert_close(per_sample(records, name, p.shape), torch.cat(wanted))


def test_the_sample_axis_is_that_of_input_ids():
    """Shared position ids have no sample axis, even where they are the first argument."""
    model = build_model("gpt2")
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with gf.capture(model) as records:
        model(position_ids=torch.arange(3)[None], input_ids=ids).logits.sum().backward()
    assert {len(f.cu) for f in records["transformer.h.0.mlp.c_fc.weight"]} == {2}
    assert {len(f.cu) for f in records["transformer.wpe.weight"]} == {2}


@pytest.mark.parametrize("join", [False, True])
def test_no_activation_outlives_the_recorder(join):
    model, x = model_of("own_parameter_and_child"), batch()
    plan = Plan.of(model)
    seen = []
    directions = {k: p.detach()[None] for k, p in plan.parameters.items()}

    def sink(_name, factors, kept):
        tensors = [v for f in factors for v in vars(f).values() if isinstance(v, torch.Tensor)]
        tensors = [*tensors, *(z for z in kept if z is not None)]
        seen.extend(weakref.ref(t) for t in tensors if t.is_floating_point())  # no offsets

    recording = Recording(joined=join, directions=directions)
    recorder = Recorder(plan, sink, Segments.rectangular(x.shape), recording)
    activation = weakref.ref(x)
    with recorder, plan.frozen():
        loss = model(x).sum()
        torch.autograd.grad(loss, recorder.roots)
        recorder.finish()
        roots = [weakref.ref(r) for r in (*recorder.roots, *recorder.calls.values())]
    del loss, x
    gc.collect()
    assert seen and roots
    assert [r for r in (*seen, *roots, activation) if r() is not None] == []


def test_one_sample_s_gradient_is_formed_at_a_time():
    model, x = model_of("own_parameter_and_child"), batch()
    with gf.capture(model) as records:
        model(x).sin().sum().backward()
    (factor,) = records["layer.scale"]
    first = factor.gradient(0)
    assert factor.gradient(0) is first
    gone = weakref.ref(first)
    del first
    factor.gradient(1)
    assert gone() is None


def test_the_graph_holds_nothing_of_the_recorder_after_exit():
    model, x = model_of(), batch()
    plan = Plan.of(model)
    kept = {k: torch.ones(1, *p.shape).double() for k, p in plan.parameters.items()}
    recording = Recording(directions=kept)
    recorder = Recorder(plan, lambda *_: None, Segments.rectangular(x.shape), recording)
    with recorder:
        loss = model(x).sum()
    gone = weakref.ref(recorder)
    del recorder
    gc.collect()
    assert gone() is None and loss.requires_grad


def test_a_single_backward_lets_go_of_calls_as_it_goes():
    model, x = model_of("own_parameter_and_child"), batch()
    plan = Plan.of(model)
    left = []
    axis, recording = Segments.rectangular(x.shape), Recording(one_backward=True)
    recorder = Recorder(plan, lambda *_: left.append(len(recorder.calls)), axis, recording)
    with recorder, plan.frozen():
        loss = model(x).sum()
        n_calls = len(recorder.calls)
        torch.autograd.grad(loss, recorder.roots, retain_graph=True)
        assert left and max(left) < n_calls
        with pytest.raises(UnsupportedModelError, match="second backward"):
            torch.autograd.grad(loss, recorder.roots)
