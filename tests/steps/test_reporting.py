"""The callback sends its measurements to a Trainer's `report_to`, and changes nothing else."""

from __future__ import annotations

import pytest
from events import expected, of_probes, scalars
from interrupted import StopAtThree
from models import build, collated, samples
from transformers import Trainer, TrainingArguments

import geffect_fast as gf

DATA = {name: samples([5, 4], i) for i, name in enumerate(("forget", "retain", "u"))}
ROWS = samples([6] * 6, 4)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a Llama for five updates with callbacks, and TensorBoard."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))

    def run(*callbacks, resume=None, kind=Trainer, **more):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=5,
            report_to="tensorboard",
            logging_steps=2,
            disable_tqdm=True,
            use_cpu=True,
            **{"save_strategy": "no"} | more,
        )
        trainer = kind(
            build("llama"),
            args,
            train_dataset=ROWS,
            data_collator=collated,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def probe(**more):
    given = {"objectives": ["ga", "wga(alpha=2)"], "trained": "ga", "resolve": ("sample",)}
    return gf.integrations.GEffectCallback(DATA, 2, **given | more)


class Gathers(Trainer):
    """A callback that adds to its log what it gathered since the last log, as others do."""

    asked = 0

    def log(self, logs, *more, **kwargs):
        self.asked += 1
        super().log(logs, *more, **kwargs)


def test_events_are_the_result_and_the_loss_is_logged_as_ever(train, tmp_path):
    plain = train(kind=Gathers)
    callback = probe()
    trainer = train(callback, kind=Gathers)
    assert trainer.asked == plain.asked > 0
    shown = scalars(tmp_path / "events")
    assert of_probes(shown) == expected(callback.result, "ga")
    # A probe called u would have the name of another effect, which keeps the name.
    assert of_probes(shown)["e_u"] != of_probes(shown)["e_u/wga(alpha=2)"]
    told = [entry for entry in trainer.state.log_history if "geffect/e_u" in entry]
    assert [entry["step"] for entry in told] == [0, 2, 4, 5]
    others = [entry for entry in trainer.state.log_history if entry not in told]
    kept = ("step", "loss", "learning_rate", "grad_norm")
    for one, other in zip(others, plain.state.log_history, strict=True):
        assert {k: one.get(k) for k in kept} == {k: other.get(k) for k in kept}
    assert [entry["step"] for entry in others if "loss" in entry] == [2, 4]


def test_an_early_end_is_told_too(train, tmp_path):
    callback = probe(trained=None, objectives="ga")
    train(StopAtThree(), callback)
    found = of_probes(scalars(tmp_path / "events"))
    assert [step for step, _ in found["e_r"]] == [0, 2, 3]
    assert found == expected(callback.result, "ga")


def test_a_resumed_training_tells_no_step_of_its_checkpoint_twice(train, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2}
    start = build("llama")
    train(probe(reference_model=start), **more)
    trainer = train(probe(reference_model=start), resume=str(tmp_path / "checkpoint-2"), **more)
    told = [e["step"] for e in trainer.state.log_history if "geffect/e_u" in e]
    assert told == [0, 2, 4, 5]
