"""A measurement keeps all bits of fp32, whatever precision the training beside it uses."""

from __future__ import annotations

import functools

import pytest
import torch
from models import build, samples
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

import geffect_fast as gf
from geffect_fast.functional import per_sample_grad_norms
from geffect_fast.integrations import GEffectCallback

DATA = {"forget": samples([9, 12], 1), "retain": samples([8, 11], 2)}


@pytest.fixture
def dropped(monkeypatch):
    """The precision of products in each forward, in order, where users allow lower precision."""
    seen = []
    plain = LlamaMLP.forward

    @functools.wraps(plain)
    def told(self, x):
        seen.append(
            (torch.is_grad_enabled() and self.training, torch.get_float32_matmul_precision())
        )
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", told)
    torch.set_float32_matmul_precision("high")
    yield seen
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


def losses(model, batch):
    logits = model(**batch).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(
        logits, batch["input_ids"][:, 1:], reduction="none"
    ).sum(1)


MEASUREMENTS = {
    "profile": lambda model: gf.profile(model, None, **DATA, objectives=["ga", "rmu(layer=1)"]),
    "forward": lambda model: gf.profile(
        model, None, **DATA, objectives=["ga"], engine="forward", resolve=("sample", "token")
    ),
    "step": lambda model: gf.profile(
        model, None, **DATA, objectives=["ga"], metric="adam", second_order=True, conflicts=True
    ),
    "sweep": lambda model: gf.sweep(model, None, **DATA, objectives=["wga(alpha=1:2:2)"]),
    "check": lambda model: gf.check(model, None, data=DATA["forget"], samples=2),
    "evaluate": lambda model: gf.evaluate(
        model, None, **DATA, holdout=DATA["retain"], metrics="probability,gradient_norm"
    ),
    "functional": lambda model: per_sample_grad_norms(
        model, losses, {"input_ids": torch.randint(3, 50, (2, 6))}
    ),
}


@pytest.mark.parametrize("what", MEASUREMENTS)
def test_a_measurement_keeps_all_bits(what, dropped):
    MEASUREMENTS[what](build("llama"))
    assert {precision for _, precision in dropped} == {"highest"}


def test_a_training_goes_on_as_its_user_set_it(dropped, tmp_path):
    callback = GEffectCallback(DATA, 1, objectives=["ga"])
    arguments = TrainingArguments(
        str(tmp_path / "training"), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in samples([9, 9], 3)]
    Trainer(build("llama"), arguments, train_dataset=rows, callbacks=[callback]).train()
    assert {precision for trains, precision in dropped if trains} == {"high"}
    assert {precision for trains, precision in dropped if not trains} == {"highest"}


def test_rows_of_a_rule_keep_all_bits_within_a_training(dropped):
    gf.unlearn(
        build("llama"), None, **DATA, objective="ga", update="orthograd", steps=1, batch_size=2
    )
    assert {precision for trains, precision in dropped if trains} == {"high"}
    assert {precision for trains, precision in dropped if not trains} == {"highest"}
