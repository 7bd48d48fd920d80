"""The optimizer state of a Trainer's checkpoint gives the same numbers as the live optimizer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from lion import Lion
from models import build, samples
from transformers import Trainer, TrainingArguments

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("undrawn")

DATA = {"forget": samples([5, 9, 3], 1), "retain": samples([7, 4], 2)}
ROWS = samples([6] * 6, 4)


def trained(model, folder, optimizer=None, **more):
    """A Trainer after two updates, and the folder of its checkpoint."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        | more
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS,
        data_collator=lambda rows: {
            key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")
        },
        optimizers=(optimizer, None),
    )
    trainer.train()
    model.eval()
    return trainer, folder / "checkpoint-2"


def profile(model, metric, optimizer):
    return gf.profile(
        model, None, **DATA, objectives=["ga"], metric=metric, optimizer=optimizer, token_budget=64
    )


def test_a_checkpoints_optimizer_is_the_live_one(tmp_path):
    """The saved groups differ by weight decay, and parameters keep their order within a group."""
    model = build("llama_tied")
    trainer, checkpoint = trained(model, tmp_path)
    live = profile(model, "adamw", trainer.optimizer)
    for source in (checkpoint, checkpoint / "optimizer.pt", str(checkpoint)):
        saved = profile(model, "adamw", source)
        for name in ("g_effect", "momentum_effect", "decay_effect", "predicted_change"):
            np.testing.assert_array_equal(saved[name], live[name])
    assert live.momentum_effect.any() and live.decay_effect.any()
    assert not live.decay_effect.sel(parameter="model.norm.weight").any()


@pytest.mark.parametrize("made", [Lion, torch.optim.SGD])
def test_an_optimizer_of_one_group_has_the_models_order(made, tmp_path):
    model = build("gpt2")
    optimizer = made(model.parameters(), lr=1e-3)
    _, checkpoint = trained(model, tmp_path, optimizer)
    metric = made.__name__.lower()
    live, saved = profile(model, metric, optimizer), profile(model, metric, checkpoint)
    np.testing.assert_array_equal(saved.g_effect, live.g_effect)
    np.testing.assert_array_equal(saved.step_total, live.step_total)


def test_state_of_another_model_or_kind_is_refused(tmp_path):
    model, other = build("llama"), build("gpt2")
    _, checkpoint = trained(other, tmp_path / "a")
    with pytest.raises(InputError, match="it is the state of another model"):
        profile(model, "adamw", checkpoint)
    with pytest.raises(InputError, match="its state is adamw, and metric is lion"):
        profile(other, "lion", checkpoint)
    _, adafactor = trained(build("llama"), tmp_path / "b", optim="adafactor")
    with pytest.raises(InputError, match="its state is of no kind that is known"):
        profile(model, "adam", adafactor)


def test_a_wider_model_is_refused_by_the_parameters_name(tmp_path):
    model = build("llama")
    _, checkpoint = trained(model, tmp_path)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][1]["exp_avg_sq"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=r"exp_avg_sq of 'model\.\S+' has shape \(4, 4\)"):
        profile(model, "adamw", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        (b"not a file of torch", "cannot be read as tensors and numbers"),
        ([1, 2], "holds no state of an optimizer"),
        ({"state": {}, "param_groups": 3}, "holds no state of an optimizer"),
        (torch.nn.Linear(2, 2), "cannot be read as tensors and numbers"),  # would run code
    ],
)
def test_files_that_hold_no_state_are_refused(content, said, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / "optimizer.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match=said) as raised:
        profile(build("llama"), "adam", tmp_path)
    assert "\n" not in str(raised.value)


def test_checkpoints_bring_the_state_of_their_own_optimizers(tmp_path):
    """The model before training has no state: NaN there; the others are as in a profile."""
    model = build("llama")
    model.save_pretrained(tmp_path / "before")
    _, checkpoint = trained(model, tmp_path / "out")
    given = DATA | {"objectives": ["ga"], "token_budget": 64, "resolve": ("group",)}
    result = gf.profile_checkpoints(
        tmp_path / "out/checkpoint-*", None, model=tmp_path / "before", **given
    )
    assert list(result.step) == [0, 2] and result.attrs["step_metric"] == "adamw"
    assert "step_metric_note" not in result.attrs
    assert result.step_effect.sel(step=0).isnull().all()
    expected = gf.profile(model, None, **given, metric="adamw", optimizer=checkpoint)
    np.testing.assert_allclose(result.step_effect.sel(step=2), expected.g_effect, rtol=1e-4)
    np.testing.assert_allclose(result.step_total.sel(step=2), expected.step_total, rtol=1e-4)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="second_order: no checkpoint holds optimizer"):
        gf.profile_checkpoints(checkpoint, None, second_order=True, **given)


def test_the_command_reads_it_and_replays(study, tmp_path, monkeypatch, capsys):
    here = shutil.copytree(study, tmp_path / "here")
    monkeypatch.chdir(here)
    words = ["-m", "model", "-f", "forget.jsonl", "-r", "retain.jsonl", "--objectives", "ga"]
    train = ["unlearn", *words[:6], "--objective", "ga", "--steps", "2", "--optimizer"]
    train += ["adamw_torch", "--trainer", "weight_decay=0.1", "--keep-checkpoints", "--quiet"]
    assert main([*train, "--out", "trained"]) == 0
    checkpoint = max(file.parent for file in (here / "trained").rglob("optimizer.pt"))
    checkpoint = shutil.copytree(checkpoint, here / "kept")  # a run's own may not change
    words[1] = str(checkpoint)
    more = ["--metric", "adamw", "--optimizer-state", str(checkpoint), "--resolve", "group"]
    capsys.readouterr()
    assert main(["profile", *words, *more, "--tokenizer", "model", "--out", "run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "in the metric of adamw" in printed and "its state: of the optimizer" in printed
    result = gf.open_run("run")
    assert result.attrs["metric"] == "adamw" and result.attrs["metric_of"] == "ga"
    assert main(["profile", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    np.testing.assert_array_equal(gf.open_run("again").g_effect, result.g_effect)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg_sq"].mul_(4)
    torch.save(state, checkpoint / "optimizer.pt")
    capsys.readouterr()
    assert main(["profile", "--config", "run/run.yaml", "--out", "third", "--quiet"]) == 0
    assert "--optimizer-state" in capsys.readouterr().err  # a replay names the replaced file
