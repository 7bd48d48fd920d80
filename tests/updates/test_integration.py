"""A rule in a Trainer of open-unlearning's shape: gradients, accumulation, adapters, resuming."""

from __future__ import annotations

import peft
import pytest
import torch
from explicit import Explicit, flat, row_loss, trained
from models import build
from pairs import trainer_of

import geffect_fast as gf
from geffect_fast.capture.attribution import Attribution
from geffect_fast.errors import InputError


class Expected(Explicit):
    """The forget part of the Trainer's gradient: the mean over its batches of each batch's loss."""

    def __init__(self, model, batches, weight):
        items = [item for batch in batches for item in batch]
        super().__init__(model, [], [item["retain"] for item in items], weight)
        self.batches = batches

    def forget_loss(self):
        losses = []
        for batch in self.batches:
            rows = [item["forget"] for item in batch]
            n = sum(label != -100 for row in rows for label in row["labels"][1:])
            losses.append(-sum(row_loss(self.model, row) for row in rows) / n)
        return sum(losses) / len(losses)

    forward = forget_loss


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["orthograd", "gru", "pcgrad(by_tensor=false)", "gu", "sam"])
def test_its_gradients_are_those_of_the_rule_written_out(rule, weight, accumulation, tmp_path):
    model = build("llama")
    trainer = trainer_of(model, tmp_path, accumulation=accumulation, steps=2)
    gf.integrations.use_update_rule(trainer, rule, retain_weight=weight)
    parsed = gf.updates.parse(rule)
    arguments = {
        k: v for k, v in parsed.parameters().items() if k not in ("rank_tol", "room", "seed")
    }
    batches, found = [], []
    collator = trainer.data_collator
    trainer.data_collator = lambda items: (batches.append(items), collator(items))[1]
    memory = 0.0
    step = trainer.training_step

    def checked(model, inputs, n=None):
        nonlocal memory
        loss = step(model, inputs, n)
        if trainer.accelerator.sync_gradients:
            k = len(found) * accumulation
            expected = Expected(model, batches[k : k + accumulation], weight)
            expected.smoothed = memory
            gradient = flat([p.grad for p in trained(model)], trained(model))
            theirs = getattr(expected, parsed.name)(trainer.optimizer.optimizer, **arguments)
            memory = expected.smoothed
            found.append(float((gradient - theirs).norm() / theirs.norm()))
            value = float((expected.forget_loss() + expected.retain_loss()).detach())
            assert float(loss) == pytest.approx(value, rel=1e-4)
        else:
            assert all(p.grad is None for p in model.parameters())
        return loss

    trainer.training_step = checked
    trainer.train()
    assert len(found) == 2 and max(found) < 2e-5


def test_three_lines_train_an_adapter(tmp_path):
    """OrthoGrad trains the adapter and leaves the model inside unchanged."""
    ends = []
    for rule in (None, gf.updates.OrthoGrad()):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
        model = peft.get_peft_model(build("llama"), config)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        trainer = trainer_of(model, tmp_path / str(rule), optim="adamw_torch")
        if rule is not None:
            gf.integrations.use_update_rule(trainer, rule)
        trainer.train()
        assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in frozen.items())
        ends.append(flat(trained(model), trained(model)))
    assert float((ends[0] - ends[1]).norm()) > 1e-3


def test_retain_rows_of_later_updates_are_not_tried_again(tmp_path, monkeypatch):
    """Only the first update shows that rows belong to their samples."""
    trials, weighted = [], Attribution.weighted
    monkeypatch.setattr(Attribution, "weighted", lambda *a: trials.append(1) or weighted(*a))
    trainer = trainer_of(build("llama"), tmp_path, steps=3, saves=False)
    gf.integrations.use_update_rule(trainer, "orthograd")
    trainer.train()
    assert len(trials) == 1


@pytest.mark.parametrize("rule", ["gru(gamma=0.3)", "sam(rho=0.05, sigma=0.01)", "gu"])
def test_a_training_goes_on_bitwise_from_a_checkpoint(rule, tmp_path):
    def trained_to(steps, resume=None):
        model = build("llama")
        trainer = trainer_of(model, tmp_path, steps=steps, optim="adamw_torch")
        gf.integrations.use_update_rule(trainer, rule)
        trainer.train(resume_from_checkpoint=resume)
        return flat(trained(trainer.model), trained(trainer.model))

    whole = trained_to(4)
    again = trained_to(4, str(tmp_path / "checkpoint-2"))
    assert torch.equal(whole, again)
    (tmp_path / "checkpoint-2/update_rule.pt").unlink()
    with pytest.raises(InputError, match=r"update_rule.pt: cannot be loaded.*resume from"):
        trained_to(4, str(tmp_path / "checkpoint-2"))


class TestRefusals:
    def test_no_retain_rows(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        gf.integrations.use_update_rule(trainer, "orthograd")
        collator = trainer.data_collator
        trainer.data_collator = lambda items: {"forget": collator(items)["forget"]}
        with pytest.raises(InputError, match=r"batches have no 'retain'.*give items with"):
            trainer.train()

    def test_retain_rows_of_another_shape(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        gf.integrations.use_update_rule(trainer, "gru")
        collator = trainer.data_collator
        trainer.data_collator = lambda items: collator(items) | {"retain": {"input_ids": [1]}}
        with pytest.raises(InputError, match="'input_ids' of the batch's 'retain' is no tensor"):
            trainer.train()

    def test_no_retain_weight_where_the_rule_adds_it(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        gf.integrations.use_update_rule(trainer, "sago")
        with pytest.raises(InputError, match="the retain gradient is part of the update"):
            trainer.train()

    def test_an_optimizer_it_does_not_know(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path, optim="adagrad")
        gf.integrations.use_update_rule(trainer, "gu")
        with pytest.raises(InputError, match="does not know that of Adagrad"):
            trainer.train()

    @pytest.mark.parametrize("weight", [-1, float("nan"), "1", True, float("inf")])
    def test_a_weight_that_is_none(self, weight, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        with pytest.raises(InputError, match="retain_weight: must be a number of at least 0"):
            gf.integrations.use_update_rule(trainer, "gru", retain_weight=weight)

    def test_a_second_rule(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        gf.integrations.use_update_rule(trainer, "gru")
        with pytest.raises(InputError, match="has an update rule already"):
            gf.integrations.use_update_rule(trainer, "gu")

    def test_several_devices(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        trainer.args._n_gpu = 2
        with pytest.raises(gf.errors.UnsupportedModelError, match="all rows of an update on one"):
            gf.integrations.use_update_rule(trainer, "gru")

    def test_parameters_that_are_thawed_on_the_way(self, tmp_path):
        model = build("llama")
        model.lm_head.requires_grad_(False)
        trainer = trainer_of(model, tmp_path)
        gf.integrations.use_update_rule(trainer, "gru")
        model.lm_head.requires_grad_(True)
        with pytest.raises(InputError, match="the trainable parameters changed since"):
            trainer.train()

    def test_something_that_is_no_trainer(self):
        with pytest.raises(InputError, match="trainer: got Linear; give a Trainer"):
            gf.integrations.use_update_rule(torch.nn.Linear(1, 1), "gru")

    def test_scaled_gradients(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        trainer.args.fp16 = True
        with pytest.raises(InputError, match="update gru: fp16 scales gradients up"):
            gf.integrations.use_update_rule(trainer, "gru")

    def test_parameters_in_pieces(self, tmp_path):
        trainer = trainer_of(build("llama"), tmp_path)
        next(trainer.model.parameters()).ds_id = 3
        with pytest.raises(gf.errors.UnsupportedModelError, match="spread over devices"):
            gf.integrations.use_update_rule(trainer, "gru")
