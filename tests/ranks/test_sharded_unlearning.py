"""A training of a model whose parameters ranks share out takes the steps of one process."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import build, fp64_throughout, samples, with_dropout
from ranked import assert_same_training, of_each, on_ranks, weights_of
from torch import nn
from torch.distributed.fsdp import fully_shard

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture import Plan
from geffect_fast.capture.parts import mesh_over
from geffect_fast.capture.shards import shard
from geffect_fast.errors import GEffectError, UnsupportedModelError
from geffect_fast.training import trainer

DATA = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6], 2, 3)}
SGD = {"steps": 2, "learning_rate": 0.05, "optimizer": "sgd"}
SGD |= {"probe_every": 2, "probe_rows": "all"}
CLIPPED = {"optimizer": "adamw_torch", "trainer": {"max_grad_norm": 0.1, "weight_decay": 0.1}}
NLL = {"metrics": ["nll"], "evaluate_every": 2}
ON_TWO = {
    "llama": (
        "npo(beta=0.5) + kl",
        {"batch_size": 3, "retain_batch_size": 2, "second_order": True},
    ),
    "gpt2": ("wga(alpha=0.5) + gd", {"batch_size": 4, "token_budget": 20, "model": "gpt2"} | NLL),
    "hidden states": ("rmu(layer=1)", {"batch_size": 3} | CLIPPED),
}
ON_THREE = {
    "fewer rows than ranks": (
        "ga",
        {"batch_size": 1, "model": "llama_tied", "checkpointing": True},
    ),
    "experts": ("ga + 0.5*nll", {"batch_size": 2, "model": "qwen2_moe"} | CLIPPED),
}
EXACT = 1e-12


def trained(objective, more):
    """The result of a training, and the weights in the end."""
    given = DATA | SGD | more
    with fp64_throughout():
        which = given.pop("model", "llama")
        model, other = (with_dropout(build(which, torch.float64), 0.0) for _ in range(2))
        if dist.is_initialized():
            for each in (model, other):
                shard(each, ranks.here(), torch.device("cpu"))
        result = gf.unlearn(model, None, objective=objective, reference_model=other, **given)
    return result, weights_of(model)


@pytest.mark.parametrize(
    ("size", "cases"), [(2, ON_TWO), pytest.param(3, ON_THREE, marks=pytest.mark.slow)]
)
def test_shards_take_the_steps_of_one_process(size, cases):
    alone, found = of_each(trained, cases), on_ranks(size, of_each, trained, cases)
    for name, expected in alone.items():
        for of_rank in found:
            assert_same_training(name, of_rank[name], expected, EXACT)


def refused():
    """Messages about refused trainings of a model in parts, and about a training that fails."""
    given = DATA | SGD | {"objective": "ga", "batch_size": 2}
    asked = {
        "optimizer": {"optimizer": "adafactor"},
        "lora_rank": {"lora_rank": 2},
        "reference_model": {"objective": "npo(beta=0.5)"},
    }
    said = {}
    for name, more in asked.items():
        model = build("llama")
        shard(model, ranks.here(), torch.device("cpu"))
        with pytest.raises(GEffectError) as error:
            gf.unlearn(model, None, **(given | more))
        said[name] = str(error.value)
    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    gf.unlearn(model, None, **given)  # nothing of the refused trainings is left
    run = trainer.model_outputs

    def fails(*args):
        if dist.get_rank() == 1:
            raise ValueError("rank 1 has had enough")
        return run(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception) as error:
        patch.setattr(trainer, "model_outputs", fails)
        gf.unlearn(model, None, **given)
    return said, type(error.value).__name__, str(error.value)


def test_what_needs_the_whole_is_refused_and_one_rank_ends_all():
    for rank, (said, kind, failed) in enumerate(on_ranks(2, refused)):
        assert said["optimizer"].startswith("optimizer: adafactor is not known to step parts")
        assert said["lora_rank"].startswith("lora_rank: FSDP shares out the model already")
        assert said["reference_model"].startswith("reference_model: 'npo(beta=0.5)' compares with")
        assert "rank 1 has had enough" in failed
        assert kind == ("ValueError" if rank else "GEffectError")


class Routed(nn.Module):
    """A block whose second half only some ranks use."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.expert = nn.Linear(3, 3)

    def forward(self, x, taken):
        return self.frozen(x) + (self.expert(x) if taken else 0)


def others():
    """Results of trainings with a folder, with other optimizers, and with few trained layers."""
    given = DATA | SGD | {"batch_size": 3}
    where = Path(ranks.here().first_of(tempfile.mkdtemp()))
    found = {}
    for name, objective, more in (
        ("folder", "ga", {"out": where / "run"}),
        ("adagrad", "ga", {"optimizer": "adagrad", "learning_rate": 1e-3}),
        ("rmsprop", "ga", {"optimizer": "rmsprop", "learning_rate": 1e-3}),
        ("fused", "ga", {"optimizer": "adamw_torch_fused", "learning_rate": 1e-3}),
        ("head", "rmu(layer=0)", {}),
    ):
        model = build("llama")
        if name == "head":
            model.requires_grad_(False).lm_head.requires_grad_(True)
        if dist.is_initialized():
            shard(model, ranks.here(), torch.device("cpu"))
        gf.unlearn(model, None, objective=objective, **(given | more))
        weights = model.lm_head.weight.detach()
        if hasattr(weights, "full_tensor"):
            weights = weights.full_tensor()
        found[name] = weights.numpy().copy()
    if dist.is_initialized():
        model, rank = Routed(), dist.get_rank()
        fully_shard(model, mesh=mesh_over(ranks.here(), torch.device("cpu")))
        plan = Plan.of(model, may_be_sharded=True)
        with pytest.raises(UnsupportedModelError, match="reach what is trained in a block"):
            loss = model(torch.ones(2, 3), taken=rank == 0).sum()
            plan.sharded_gradients(loss, list(plan.parameters.values()), more=False)
    return found


@pytest.mark.slow
def test_trainings_in_parts_end_as_whole_ones():
    alone = others()
    for found in on_ranks(2, others):
        for name, weights in alone.items():
            np.testing.assert_allclose(found[name], weights, rtol=0, atol=1e-5, err_msg=name)
