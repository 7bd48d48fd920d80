"""Gradients of whole data sets, and the reference model that objectives compare with."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from models import build, fp64_throughout, samples
from reference import gradients, mean_over, token_logprobs

from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.batches import DataPass, passes_for
from geffect_fast.engines.directions import accumulate_gradients, new_gradients
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.engines.reference import Reference
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.objectives import resolve

FORGET, RETAIN = samples([4, 9, 2, 6], 1), samples([7, 3], 2)
SETS = {"forget": FORGET, "retain": RETAIN}


def batches_of(name, roles=("answer",), reduction="token", budget=12):
    rows = tokenize_rows(SETS[name], None, name=name)
    return make_batches(rows, roles, token_budget=budget, reduction=reduction)


def passes(*objectives, **kwargs):
    def of(name, roles):
        return batches_of(name, roles, **kwargs)

    return passes_for([resolve(o) for o in objectives], of, {"forget": 0, "retain": len(FORGET)})


def accumulate(model, wanted, n, reference=None):
    ticks = []
    values, grads = accumulate_gradients(
        Plan.of(model), wanted, n, reference or Reference(), ticks.append
    )
    assert sum(ticks) == sum(data_pass.n_tokens for data_pass in wanted)
    return values, grads


@pytest.mark.parametrize("reduction", ["token", "sample", "sum"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_equals_autograd(name, reduction):
    with fp64_throughout():
        model = build(name, torch.float64)
        values, grads = accumulate(model, passes("ga", "nll", reduction=reduction), 2)

        def risk(rows):
            return sum(mean_over(reduction, rows, -token_logprobs(model, row)) for row in rows)

        for k, loss in enumerate((-risk(FORGET), risk(RETAIN))):
            assert float(values[k]) == pytest.approx(float(loss.detach()), rel=1e-12)
            expected = gradients(loss, model)
            for (parameter, _), grad in zip(model.named_parameters(), expected, strict=True):
                torch.testing.assert_close(grads[parameter][k], grad, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_have_no_direction():
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    _, grads = accumulate(model, passes("ga"), 1)
    assert set(grads) == {k for k, _ in model.named_parameters()} - {"lm_head.weight"}


def test_bf16_models_are_summed_in_fp32():
    """Batch gradients are bf16; their sum over many batches is not rounded to bf16 again."""
    model = build("llama", torch.bfloat16)
    assert {g.dtype for g in new_gradients(Plan.of(model), 2).values()} == {torch.float32}
    wanted = passes("ga", budget=1)
    _, grads = accumulate(model, wanted, 1)
    plan, expected = Plan.of(model), 0
    for batch in wanted[0].batches:
        terms, _ = wanted[0].terms(0, model_outputs(model, batch), batch, None)
        loss = terms.sum()
        expected = (
            expected + torch.autograd.grad(loss, plan.parameters["lm_head.weight"])[0].float()
        )
    assert len(wanted[0].batches) == len(FORGET)
    assert torch.equal(grads["lm_head.weight"][0], expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_fp64_models_are_summed_in_fp64():
    model = build("llama", torch.float64)
    assert {g.dtype for g in new_gradients(Plan.of(model), 1).values()} == {torch.float64}


# ---- the reference ----


def test_parts_that_read_the_same_data_share_a_forward():
    found = passes("ga", "npo", "kl", "wga", "nll")
    assert [list(data_pass.parts) for data_pass in found] == [[0, 1, 3], [2, 4]]
    assert [data_pass.offset for data_pass in found] == [0, len(FORGET)]
    assert found[0].needs == {"reference"} and found[1].needs == {"reference_logits"}


def test_the_reference_is_computed_once_and_its_model_released():
    model, other = build("llama"), build("llama", seed=1)
    wanted = passes("npo")
    expected = [model_outputs(other, batch).token_logprob.detach() for batch in wanted[0].batches]
    gone = weakref.ref(other)
    reference = Reference(other)
    del other
    reference.prepare(wanted, torch.device("cpu"))
    gc.collect()
    assert gone() is None
    for batch, logprob in zip(wanted[0].batches, expected, strict=True):
        own = model_outputs(model, batch)
        outputs = reference.outputs(wanted[0], batch, own)
        assert torch.equal(outputs.token_logprob, logprob)
        assert not outputs.token_logprob.requires_grad


def test_kl_keeps_the_model_and_takes_its_logits():
    model, other = build("gpt2"), build("gpt2", seed=1)
    wanted = passes("kl")
    reference = Reference(other)
    reference.prepare(wanted, torch.device("cpu"))
    assert reference.model is other
    for batch in wanted[0].batches:
        own = model_outputs(model, batch, {"reference_logits"})
        outputs = reference.outputs(wanted[0], batch, own)
        with packed_attention(other, batch):
            exact = model_outputs(other, batch, {"reference_logits"})
        assert torch.equal(outputs.logits, exact.logits) and not outputs.logits.requires_grad
        assert not torch.equal(outputs.logits, own.logits)


def test_rr_keeps_the_model_and_takes_its_hidden_states():
    model, other = build("gpt2"), build("gpt2", seed=1)
    wanted = passes("rr(layer=1)")
    reference = Reference(other)
    reference.prepare(wanted, torch.device("cpu"))
    assert reference.model is other
    for batch in wanted[0].batches:
        own = model_outputs(model, batch, wanted[0].needs)
        outputs = reference.outputs(wanted[0], batch, own)
        with packed_attention(other, batch):
            exact = model_outputs(other, batch, {"hidden_states"})
        for found, expected in zip(outputs.hidden_states, exact.hidden_states, strict=True):
            assert torch.equal(found, expected) and not found.requires_grad
        assert outputs.logits is None


def test_hidden_states_and_logits_are_those_asked_for():
    model = build("llama")
    (batch, *_) = batches_of("forget")
    for need in ("logits", "reference_logits"):
        outputs = model_outputs(model, batch, {need})
        assert outputs.logits.shape[0] == batch.target_index.numel()
        assert outputs.hidden_states is None
    outputs = model_outputs(model, batch, {"reference_hidden_states"})
    assert len(outputs.hidden_states) == 4
    assert outputs.logits is None
    # an objective that reads only its own logits and hidden states needs no reference
    own = passes("ceu", "rmu_mask(layer=1)")[0]
    assert Reference().outputs(own, batch, model_outputs(model, batch, own.needs)) is None


def test_kl_to_another_model_equals_autograd():
    with fp64_throughout():
        model, other = build("gpt2", torch.float64), build("gpt2", torch.float64, seed=1)
        reference = Reference(other)
        wanted = passes("kl")
        reference.prepare(wanted, torch.device("cpu"))
        values, grads = accumulate(model, wanted, 1, reference)
        loss = 0
        for row in RETAIN:
            ids = torch.tensor([row["input_ids"]])
            log_q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            log_p = other(input_ids=ids).logits[0, :-1].log_softmax(-1).detach()
            loss = loss + (log_p.exp() * (log_p - log_q)).sum()
        loss = loss / sum(len(row["input_ids"]) - 1 for row in RETAIN)
        assert float(values[0]) == pytest.approx(float(loss.detach()), rel=1e-12)
        expected = gradients(loss, model)
        for (parameter, _), grad in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(grads[parameter][0], grad, rtol=1e-9, atol=1e-12)


def test_without_a_model_of_its_own_the_reference_is_the_model_detached():
    model = build("llama")
    wanted = passes("npo", "rr(layer=1)", "kl")
    reference = Reference()
    reference.prepare(wanted, torch.device("cpu"))
    for data_pass in wanted:
        own = model_outputs(model, data_pass.batches[0], data_pass.needs)
        outputs = reference.outputs(data_pass, data_pass.batches[0], own)
        assert torch.equal(outputs.token_logprob, own.token_logprob)
        assert not outputs.token_logprob.requires_grad
        for found in (outputs.logits, *(outputs.hidden_states or ())):
            assert found is None or not found.requires_grad
    (ga,) = passes("ga")
    assert reference.outputs(ga, ga.batches[0], own) is None


def test_a_model_without_logits():
    (batch, *_) = batches_of("forget")

    class Silent(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(UnsupportedModelError, match="Silent returned no logits"):
        model_outputs(Silent(), batch)


def test_outputs_are_those_of_single_sequences():
    """Log-probabilities sit at the position that predicts them, hidden states in token order."""
    with fp64_throughout():
        model = build("llama", torch.float64)
        batch = batches_of("forget", budget=99)[0]
        outputs = model_outputs(model, batch, {"hidden_states", "reference_logits"})
        bounds = batch.cu_seqlens.tolist()
        for row, start, end in zip(FORGET, bounds, bounds[1:], strict=False):
            torch.testing.assert_close(
                outputs.token_logprob[start : end - 1], token_logprobs(model, row)
            )
            assert outputs.token_logprob[end - 1] == 0
            ids = torch.tensor([row["input_ids"]])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            for own, states in zip(hidden, outputs.hidden_states, strict=True):
                torch.testing.assert_close(states[start:end], own[0])
    assert outputs.logits.shape[0] == batch.target_index.numel()


def test_tasks_know_their_size():
    data_pass = DataPass(batches_of("forget"))
    assert data_pass.n_tokens == sum(len(row["input_ids"]) for row in FORGET)
