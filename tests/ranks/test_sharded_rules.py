"""Update rules on a model whose parameters ranks share out take the steps of one process."""

import pytest
import torch
import torch.distributed as dist
from models import build, fp64_throughout, samples
from ranked import assert_same_training, on_ranks

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture.shards import shard
from geffect_fast.updates import available

DATA = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6, 11], 2, 3)}
GIVEN = {"steps": 3, "batch_size": 3, "retain_batch_size": 3, "probe_rows": "all"}
SGD = {"optimizer": "sgd", "learning_rate": 0.05}
ADAM = {"optimizer": "adamw_torch", "learning_rate": 1e-3, "trainer": {"weight_decay": 0.1}}
RULES = [name for name in available() if name != "sgd"]
CASES = {
    **{f"{rule}, sgd": (rule, SGD) for rule in RULES},
    **{f"{rule}, adam": (rule, ADAM) for rule in RULES},
    "whole gradients": ("pcgrad(by_tensor=false, both=true)", SGD),
    "smoothed": ("sam(sigma=0.01, draws=2, penalty=0.1, curvature=0.1)", SGD),
    "protected": ("orthograd", SGD | {"objective": "ga", "model": "llama_tied"}),
    "in blocks": ("orthograd(room=0)", SGD | {"token_budget": 12}),
    "experts": ("gru", ADAM | {"model": "qwen2_moe"}),
    "gpt2": ("orthograd", SGD | {"model": "gpt2"}),
    "few rows": ("orthograd", SGD | {"batch_size": 1, "retain_batch_size": 1}),
}
EXACT = 1e-12


def trained(name):
    """The result of a case, and the weights in the end."""
    rule, more = CASES[name]
    given = DATA | GIVEN | {"objective": "ga + 0.5*nll", "update": rule} | more
    with fp64_throughout():
        model = build(given.pop("model", "llama"), torch.float64)
        for each in model.modules():
            if isinstance(each, torch.nn.Dropout):
                each.p = 0.0
        if dist.is_initialized():
            shard(model, ranks.here(), torch.device("cpu"))
        result = gf.unlearn(model, None, **given)
    whole = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in model.state_dict().items()
    }
    return result, {key: value.numpy().copy() for key, value in whole.items()}


def all_trained():
    return {name: trained(name) for name in CASES}


@pytest.fixture(scope="module")
def alone():
    return all_trained()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rules_on_shards_take_the_steps_of_one_process(alone, size):
    found = on_ranks(size, all_trained)
    for name, expected in alone.items():
        for of_rank in found:
            assert_same_training(name, of_rank[name], expected, EXACT)
