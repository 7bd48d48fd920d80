"""A training step has the gradient that a profile takes, however its rows are cut into batches."""

from __future__ import annotations

import math
import os
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator, PartialState
from models import build, fp64_throughout, samples
from peft import PromptTuningConfig, get_peft_model

from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.batches import mixture_of, passes_for
from geffect_fast.engines.directions import accumulate_gradients
from geffect_fast.engines.reference import Reference
from geffect_fast.errors import InputError, NonFiniteError
from geffect_fast.objectives import parse
from geffect_fast.training.loss import Draws, Loss, RowReference
from geffect_fast.training.resume import load_weights
from geffect_fast.training.single_process import single_process
from geffect_fast.training.trainer import UnlearnTrainer
from geffect_fast.training.trainer_arguments import training_arguments
from geffect_fast.unlearn_settings import Training

OBJECTIVES = [
    "ga",
    "gd",
    "npo(beta=0.3) + 0.5*kl",
    "dpo(beta=0.2)",
    "altpo(beta=0.3)",
    "dpo(beta=0.2) + npo(beta=0.3)",
    "satimp(beta1=2, beta2=0.5)",
    "rmu(layer=1)",
    "rr(layer=2) - 2*ga",
    "undial(beta=3)",
    "token_weights",
]


def sets():
    forget, retain = samples([2, 17, 5, 12], 1, 3), samples([9, 14, 2], 2, 3)
    for i, row in enumerate(forget):
        row["alternative"] = samples([6, 9, 4][: 1 + i % 3], 10 + i, 3)
        row["weights"] = [(i + j) % 4 / 2 for j in range(sum(y != -100 for y in row["labels"][1:]))]
    return {
        name: tokenize_rows(rows, None, name=name)
        for name, rows in (("forget", forget), ("retain", retain))
    }


def trainer_of(model, objective, out, *, layout="packed", budget=10**6, reference=None, **more):
    """A trainer whose every update reads all rows, and its draws."""
    data, pieces = sets(), more.pop("pieces", 1)
    reduction = more.pop("reduction", "token")
    loss = Loss(parse(objective), data, budget, layout, reduction, pieces)
    draws = Draws({name: (len(data[name]), len(data[name])) for name in loss.reads}, 5, seed=3)
    arguments = training_arguments(Training(steps=5, **more), out, torch.device("cpu"))
    known = None if reference is None else RowReference(reference, loss)
    return UnlearnTrainer(model, arguments, loss=loss, draws=draws, reference=known), draws


def gradient_of(model, objective, reference, reduction="token"):
    """The gradient of an objective as profiles take it, by parameter."""
    data, plan = sets(), Plan.of(model)
    parts = [part for _, part in parse(objective).parts()]

    def batches_of(name, roles):
        return make_batches(
            data[name], roles, token_budget=10**6, reduction=reduction, layout="packed"
        )

    passes = passes_for(parts, batches_of, {"forget": 0, "retain": 0})
    values, gradients = accumulate_gradients(
        plan, passes, len(parts), Reference(reference), lambda n: None
    )
    mixture = mixture_of([parse(objective)], parts)[0]
    mixed = {name: torch.tensordot(mixture, g, dims=1) for name, g in gradients.items()}
    return float(mixture @ values), mixed


def assert_same(trainer, draws, model, expected):
    value, gradients = expected
    found = trainer.training_step(model, draws[2])
    assert float(found) == pytest.approx(value, rel=1e-6)  # reported in fp32
    size = max(float(g.abs().max()) for g in gradients.values())
    assert size > 1e-4
    for name, p in model.named_parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(own, gradients[name], rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_batch_of_all_rows_has_the_gradient_of_the_profile(objective, tmp_path):
    with fp64_throughout():
        model = build("llama", torch.float64)
        other = build("llama", torch.float64, seed=1)
        expected = gradient_of(model, objective, other)
        trainer, draws = trainer_of(model, objective, tmp_path, reference=other)
        assert_same(trainer, draws, model, expected)


@pytest.mark.parametrize("reduction", ["token", "sample", "sum"])
@pytest.mark.parametrize(
    "cut",
    [
        {"pieces": 3},
        {"budget": 20},
        {"layout": "equal_length", "budget": 30},
        {"layout": "single", "pieces": 2},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_however_an_update_is_cut_its_gradient_is_the_same(cut, reduction, tmp_path):
    objective = "npo(beta=0.3) + 0.5*kl + dpo(beta=0.2) + gd"
    with fp64_throughout():
        model = build("llama", torch.float64)
        other = build("llama", torch.float64, seed=1)
        expected = gradient_of(model, objective, other, reduction)
        trainer, draws = trainer_of(
            model, objective, tmp_path, reference=other, reduction=reduction, **cut
        )
        if "checkpointing" in cut:
            # the name in later versions
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        assert_same(trainer, draws, model, expected)


def test_every_row_is_read_once_before_any_is_read_again():
    draws = Draws({"forget": (7, 3), "retain": (4, 5)}, 14, seed=1)
    assert len(draws) == 14
    for name, n in (("forget", 7), ("retain", 4)):
        read = [row for update in range(14) for row in draws[update][name]]
        passes = [read[at : at + n] for at in range(0, len(read) - n + 1, n)]
        assert all(sorted(each) == list(range(n)) for each in passes)
        assert len({tuple(each) for each in passes}) > 1
    again = Draws({"forget": (7, 3), "retain": (4, 5)}, 14, seed=1)
    assert [again[u] for u in (9, 2)] == [draws[u] for u in (9, 2)]
    assert Draws({"forget": (7, 3), "retain": (4, 5)}, 14, seed=2)[0] != draws[0]


def test_a_row_that_comes_twice_counts_twice(tmp_path):
    data = sets()
    loss = Loss(parse("npo(beta=0.3)"), data, 10**6, "packed", "token")
    model, other = build("llama"), build("llama", seed=1)
    reference = RowReference(other, loss)
    rows = {"forget": [2, 0, 2]}
    [data_pass] = loss.passes(rows)
    [batch] = data_pass.batches
    found = reference.outputs(data_pass, rows, batch, batch).token_logprob
    assert Counter(batch.rows) == Counter([0, 1, 2])
    pieces = found.split([5, 2, 5])
    assert torch.equal(pieces[0], pieces[2]) and pieces[0].abs().sum() > 0
    assert float(loss.value(data_pass, _outputs(model, batch), batch, _outputs(other, batch))) != 0


def _outputs(model, batch):
    from geffect_fast.engines.model_outputs import model_outputs

    return model_outputs(model, batch)


def test_a_reference_of_log_probabilities_alone_is_let_go_of():
    other = build("llama", seed=1)
    assert RowReference(other, Loss(parse("npo"), sets(), 50, "packed", "token"))._model is None
    loss = Loss(parse("npo + kl"), sets(), 50, "packed", "token")
    assert RowReference(other, loss)._model is other


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    model = build("llama")
    trainer, draws = trainer_of(model, "ga", tmp_path)
    trainer.state.global_step = 6
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    with pytest.raises(NonFiniteError, match="step 7: the loss of ga is nan; try a smaller"):
        trainer.training_step(model, draws[0])


def test_fields_of_the_trainer_get_there(tmp_path):
    given = {"weight_decay": "1e-3", "max_grad_norm": 1, "lr_scheduler_kwargs": {"min_lr": 1e-6}}
    found = training_arguments(Training(steps=1, trainer=given), tmp_path, torch.device("cpu"))
    assert (found.weight_decay, found.max_grad_norm) == (1e-3, 1.0)
    assert found.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer: unknown 'adamw'; did you mean"),
        ({"scheduler": "cosin"}, "scheduler: unknown 'cosin'; did you mean 'cosine'"),
        ({"trainer": {"weight_decai": 1}}, "unknown 'weight_decai'; did you mean 'weight_decay'"),
        ({"trainer": {"max_steps": 3}}, "max_steps is decided by --steps; use that"),
        ({"trainer": {"fsdp": "full_shard"}}, "fsdp is not served here; leave it out"),
        ({"trainer": {"logging_strategy": "often"}}, "is not a valid IntervalStrategy"),
        ({"trainer": {"max_grad_norm": float("nan")}}, "max_grad_norm should be a finite number"),
    ],
)
def test_arguments_that_are_wrong_cost_one_line(fields, message, tmp_path):
    with pytest.raises(InputError) as caught:
        training_arguments(Training(steps=1, **fields), tmp_path, torch.device("cpu"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_trainer_is_where_the_model_is_and_accelerate_as_it_was(tmp_path, monkeypatch):
    """By itself transformers takes the first GPU, and torchrun's settings of other processes."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    own = Accelerator(cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    before = dict(PartialState._shared_state), dict(os.environ)
    place = torch.device("meta")
    with single_process(place):
        arguments = training_arguments(Training(steps=1), tmp_path, place)
        assert arguments.device == PartialState().device == place
        assert (arguments.world_size, arguments.process_index, arguments.n_gpu) == (1, 0, 0)
    assert (dict(PartialState._shared_state), dict(os.environ)) == before
    assert own.device == torch.device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="8 processes were started, and no process group is begun"):
        single_process(place).__enter__()


def test_a_model_on_another_gpu_keeps_it_the_current_one(tmp_path, monkeypatch):
    """By itself transformers makes the first GPU the current one."""
    now = [torch.device("cuda:0")]

    @contextmanager
    def device(place):
        before, now[0] = now[0], torch.device(place)
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: now.__setitem__(0, place))
    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda:1")
    with single_process(second):
        arguments = training_arguments(Training(steps=1), tmp_path, second)
        assert arguments.device == now[0] == second
    assert now[0] == torch.device("cuda:0")


def test_a_trained_prompt_is_resumed(tmp_path):
    """An adapter computes the prompt weights that it saves: no parameter holds them."""
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, other = (get_peft_model(build("llama"), settings) for _ in range(2))
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.add_(1.0)
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    for name, p in model.prompt_encoder.named_parameters():
        assert torch.equal(p, other.prompt_encoder.get_parameter(name))
