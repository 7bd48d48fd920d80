"""`unlearn --update`: the rule's gradient however rows are cut, recorded, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import xarray as xr
from explicit import Explicit, cosine, flat, trained
from killed import killed
from models import build, fp64_throughout, samples
from safetensors.torch import load_file

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.capture.attribution import Attribution
from geffect_fast.cli import main
from geffect_fast.data import tokenize_rows
from geffect_fast.errors import InputError
from geffect_fast.objectives import parse
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.training.loss import Draws, Loss, RowReference
from geffect_fast.training.trainer import UnlearnTrainer
from geffect_fast.training.trainer_arguments import training_arguments
from geffect_fast.unlearn_settings import Training, UnlearnConfig
from geffect_fast.updates import Updater
from geffect_fast.updates import parse as parse_update

pytestmark = pytest.mark.usefixtures("undrawn")

FORGET = samples([7, 12], 1, 2)
RETAIN = [*samples([9, 9, 5], 2, 3), {key: row[2:8] for key, row in FORGET[1].items()}]
RULES = ["orthograd(rank_tol=1e-10)", "gru", "gu", "blur", "pcgrad", "sago", "sam(rho=0.05)"]
CUTS = [
    {},
    {"pieces": 2},
    {"budget": 14},
    {"layout": "equal_length", "budget": 20},
    {"layout": "single"},
    {"checkpointing": True},
]


def trainer_of(model, objective, rule, out, *, layout="packed", budget=10**6, pieces=1, **more):
    data = {
        name: tokenize_rows(rows, None, name=name)
        for name, rows in (("forget", FORGET), ("retain", RETAIN))
    }
    loss = Loss(parse(objective), data, budget, layout, "token", pieces)
    draws = Draws({name: (len(data[name]), len(data[name])) for name in data}, 5, seed=3)
    reference = RowReference(more.pop("reference"), loss) if "reference" in more else None
    arguments = training_arguments(Training(steps=5, **more), out, torch.device("cpu"))
    updater = Updater(parse_update(rule), model)
    made = UnlearnTrainer(
        model, arguments, loss=loss, draws=draws, reference=reference, updater=updater
    )
    made.create_optimizer_and_scheduler(5)
    return made


@pytest.mark.parametrize(
    ("rule", "cut"),
    [(rule, {}) for rule in RULES] + [("orthograd(rank_tol=1e-10)", cut) for cut in CUTS[1:]],
    ids=str,
)
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_update_has_the_gradient_of_the_rule_written_out(rule, cut, weight, tmp_path):
    objective = f"ga + {weight}*nll" if weight else "ga"
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        if not weight and rule in ("blur", "sago"):
            with pytest.raises(InputError, match="'ga' has no retain part; add one"):
                trainer_of(model, objective, rule, tmp_path).training_step(model, _all())
            return
        parsed = parse_update(rule)
        explicit = Explicit(model, FORGET, RETAIN, weight)
        arguments = {
            k: v for k, v in parsed.parameters().items() if k not in ("rank_tol", "room", "seed")
        }
        trainer = trainer_of(model, objective, rule, tmp_path, **cut)
        expected = getattr(explicit, parsed.name)(trainer.optimizer, **arguments)
        value = float(explicit.forget_loss() + explicit.retain_loss())
        if "checkpointing" in cut:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = trainer.training_step(model, _all())
        gradient = flat([p.grad for p in trained(model)], trained(model))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
        assert float(found) == pytest.approx(value, rel=1e-6)


def _all():
    return {"forget": range(len(FORGET)), "retain": [2, 0, 3, 1]}


@pytest.mark.parametrize("part", ["kl", "rr(layer=1)", "0.5*nll + 2*kl"])
def test_rows_are_protected_in_what_the_objective_keeps(part, tmp_path):
    """The remaining forget gradient is orthogonal to every row's own retain part."""
    with fp64_throughout():
        model, other = build("llama", torch.float64), build("llama", torch.float64, seed=1)
        trainer = trainer_of(
            model, f"npo(beta=0.3) + {part}", "orthograd", tmp_path, reference=other
        )

        def gradient(objective, rows):
            loss = replace(trainer.loss, objective=parse(objective))
            for each in loss.passes(rows):
                for batch in each.batches:
                    trainer.descend(model, rows, each, batch, loss)
            found = flat([p.grad for p in trained(model)], trained(model))
            model.zero_grad()
            return found

        by_row = [gradient(part, {"retain": [i]}) for i in range(len(RETAIN))]
        whole = gradient(part, {"retain": range(len(RETAIN))})
        f = gradient("npo(beta=0.3)", {"forget": range(len(FORGET))})
        trainer.training_step(model, _all())
        left = flat([p.grad for p in trained(model)], trained(model)) - whole
        assert max(abs(cosine(left, row)) for row in by_row) < 1e-8
        assert max(abs(cosine(f, row)) for row in by_row) > 1e-2
        assert float(left.norm()) > 0.1 * float(f.norm())


def test_where_memory_runs_out_the_update_is_redone_in_smaller_batches(tmp_path, monkeypatch):
    """The update is redone from the beginning, so that nothing counts twice."""
    from geffect_fast.training import rule_losses

    with fp64_throughout():
        model = build("llama", torch.float64)
        expected = Explicit(model, FORGET, RETAIN, 0.0).orthograd(None)
        trainer = trainer_of(model, "ga", "orthograd(rank_tol=1e-10)", tmp_path)
        run = rule_losses.model_outputs

        def small(model, batch, needs):
            if batch.total_tokens > 16:
                torch.empty(2**60, dtype=torch.uint8)
            return run(model, batch, needs)

        monkeypatch.setattr(rule_losses, "model_outputs", small)
        with pytest.warns(UserWarning, match="out of memory with a batch of 29 tokens"):
            trainer.training_step(model, _all())
        gradient = flat([p.grad for p in trained(model)], trained(model))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_retain_rows_are_tried_once_an_objective(tmp_path, monkeypatch):
    trials, weighted = [], Attribution.weighted
    monkeypatch.setattr(Attribution, "weighted", lambda *a: trials.append(1) or weighted(*a))
    model = build("llama")
    for objective in ("ga", "ga + nll", "ga + 2*nll"):
        trainer = trainer_of(model, objective, "orthograd", tmp_path)
        for rows in (_all(), _all(), {"forget": [0, 1], "retain": [2, 1, 0, 1]}):
            trainer.training_step(model, rows)
            model.zero_grad()
    assert len(trials) == 2


@pytest.fixture
def config(study):
    return {
        **{name: str(study / name) for name in ("model",)},
        **{name: str(study / f"{name}.jsonl") for name in ("forget", "retain")},
        **{"objective": "npo(beta=0.1) + nll", "steps": 4, "probe_every": 2, "batch_size": 3},
        **{"learning_rate": 1e-3, "scheduler": "cosine", "threads": 1, "resolve": ["sample"]},
        **{"probe_rows": 2},
    }


def killed_in_update(config, folder, nth):
    """Whether a run in a process of its own is killed in its n-th update."""
    update, count = Updater.update, []

    def counted(*args, **kwargs):
        count.append(1)
        if len(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args, **kwargs)

    def run(folder):
        Updater.update = counted
        execute_unlearn(config, folder)

    return killed(run, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "more"),
    [
        # one with a memory, one that draws, one that uses the optimizer's state
        ("gru(gamma=0.3)", {"lora_rank": 2, "lora_dropout": 0.3}),
        ("sam(rho=0.05, sigma=0.01, draws=2)", {"lora_rank": 2, "lora_dropout": 0.3}),
        ("gu", {}),
    ],
)
def test_killed_and_resumed_it_is_bitwise_the_same_run(rule, more, config, tmp_path):
    made = checked_config(UnlearnConfig, {**config, "update": rule, **more})
    whole, folder = tmp_path / "whole", tmp_path / "run"
    execute_unlearn(made, whole)
    assert killed_in_update(made, folder, 4)
    assert (folder / "checkpoint-2/update_rule.pt").exists()
    execute_unlearn(made, folder, resume=True)
    found, expected = gf.open_run(folder), gf.open_run(whole)
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    name = f"model/{'adapter_' * ('lora_rank' in more)}model.safetensors"
    ours, theirs = load_file(folder / name), load_file(whole / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_config(folder / "run.yaml").update == rule
    assert json.loads(found.attrs["training"])["update"] == rule


def test_a_run_says_its_rule_and_another_does_not_resume_it(config, tmp_path, capsys):
    words = ["unlearn", "--quiet", "--out", str(tmp_path / "run")]
    for name, value in config.items():
        value = ",".join(value) if isinstance(value, list) else value
        words += [f"--{name.replace('_', '-')}", str(value)]
    assert main([*words, "--update", "pcgrad( both = TRUE )"]) == 0
    assert load_config(tmp_path / "run/run.yaml").update == "pcgrad(both=true)"
    capsys.readouterr()
    made = checked_config(UnlearnConfig, {**config, "update": "pcgrad"})
    assert killed_in_update(made, tmp_path / "other", 4)
    words[3] = str(tmp_path / "other")
    assert main([*words, "--resume", "--update", "gru"]) == 2
    assert "update is gru" in capsys.readouterr().err


def test_a_rule_in_python_is_taken_as_its_string(config):
    made = checked_config(UnlearnConfig, {**config, "update": gf.updates.PCGrad(both=True)})
    assert made.update == "pcgrad(both=true)"


def test_forget_rows_are_drawn_alike_with_and_without_retain_rows():
    """Retain rows are drawn beside the forget rows, which are the same without them."""
    alone, beside = (
        Draws({"forget": (9, 4)}, 5, 3),
        Draws({"forget": (9, 4), "retain": (7, 2)}, 5, 3),
    )
    found = [rows["forget"] for rows in alone]
    assert len(found) == 5 and found == [rows["forget"] for rows in beside]
