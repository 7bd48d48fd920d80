"""Update rules on a model whose parameters ranks share out take the steps of one process."""

import os
import shutil

import pytest
import torch
import torch.distributed as dist
from models import build, fp64_throughout, samples, with_dropout
from pairs import collate, trainer_of
from ranked import assert_same_training, commanded, of_each, on_ranks, weights_of
from torch.distributed.fsdp import fully_shard

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture.parts import mesh_over
from geffect_fast.capture.shards import shard
from geffect_fast.data import write_jsonl
from geffect_fast.measure.models import load_model
from geffect_fast.training.single_process import single_process
from geffect_fast.updates import available

DATA = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6, 11], 2, 3)}
GIVEN = {"steps": 2, "batch_size": 3, "retain_batch_size": 3, "probe_every": 2, "probe_rows": 1}
SGD = {"optimizer": "sgd", "learning_rate": 0.05}
ADAM = {"optimizer": "adamw_torch", "learning_rate": 1e-3, "trainer": {"weight_decay": 0.1}}
ON_TWO = {
    **{name: (name, SGD) for name in available() if name != "sgd"},
    "gu, adam": ("gu", ADAM),  # this rule measures in the optimizer's metric
    "whole gradients": ("pcgrad(by_tensor=false, both=true)", SGD),
    "protected": ("orthograd", SGD | {"objective": "ga", "model": "llama_tied"}),
    "experts": ("gru", ADAM | {"model": "qwen2_moe"}),
    "gpt2": ("orthograd", SGD | {"model": "gpt2"}),
}
ON_THREE = {
    "gru, adam": ("gru", ADAM),
    "smoothed": ("sam(sigma=0.01, draws=2, penalty=0.1, curvature=0.1)", SGD),
    "in blocks": ("orthograd(room=0)", SGD | {"token_budget": 12}),
    "experts apart": ("orthograd", SGD | {"model": "qwen2_moe"}),
    "few rows": ("orthograd", SGD | {"batch_size": 1, "retain_batch_size": 1}),
}
"""Cases in which the number of ranks decides more than the sizes of parts."""
EXACT = 1e-12


def in_parts(which):
    """A model without dropout; on several ranks each rank has its part."""
    model = with_dropout(build(which, torch.float64), 0.0)
    if dist.is_initialized():
        cpu = torch.device("cpu")
        if which == "llama":  # as other packages do
            fully_shard(model.model.embed_tokens, mesh=mesh_over(ranks.here(), cpu))
        shard(model, ranks.here(), cpu)
    return model


def trained(rule, more):
    """The result of a rule, and the weights in the end."""
    given = DATA | GIVEN | {"objective": "ga + 0.5*nll", "update": rule} | more
    with fp64_throughout():
        model = in_parts(given.pop("model", "llama"))
        result = gf.unlearn(model, None, **given)
    return result, weights_of(model)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "cases"), [(2, ON_TWO), (3, ON_THREE)])
def test_rules_on_shards_take_the_steps_of_one_process(size, cases):
    alone = of_each(trained, cases)
    for of_rank in on_ranks(size, of_each, trained, cases):
        for name, expected in alone.items():
            assert_same_training(name, of_rank[name], expected, EXACT)


def in_own_trainer(folder):
    """The final weights of a Trainer with rules; several ranks share its batches."""
    found = {}
    own = slice(None)
    if dist.is_initialized():
        own = slice(dist.get_rank(), None, dist.get_world_size())
    for rule, weight in (("orthograd", 0.5), ("gru", 0.0), ("gu", 1.0), ("sam(sigma=0.01)", 0.5)):
        with fp64_throughout(), single_process(torch.device("cpu")):
            model = in_parts("llama")
            trainer = trainer_of(
                model, folder, size=4, accumulation=2, optim="adamw_torch", saves=False
            )
            trainer.data_collator = lambda items: collate(items[own])
            updater = gf.integrations.use_update_rule(trainer, rule, retain_weight=weight)
            trainer.train()
            assert updater.updates == 3
            found[rule] = weights_of(model)
    return found


@pytest.mark.slow
def test_rules_in_a_trainer_take_the_steps_of_one_process(tmp_path):
    alone = in_own_trainer(tmp_path)
    for found in on_ranks(2, in_own_trainer, tmp_path):
        for rule, expected in alone.items():
            for key, value in expected.items():
                assert abs(found[rule][key] - value).max() <= EXACT, (rule, key)


def unlearned(folder, out, rule, *more, killed_at=None):
    """Exit code and errors of the command on this rank; rank 1 is killed before a probe."""
    os.chdir(folder)
    words = ["unlearn", "--quiet", "--model", "plain", "--forget", "forget.jsonl"]
    words += ["--retain", "retain.jsonl", "--objective", "ga + nll", "--steps", "4"]
    words += ["--batch-size", "3", "--probe-every", "2", "--lr", "1e-3", "--update", rule]
    words += ["--optimizer", "adamw_torch", "--keep-checkpoints", "--dtype", "float64"]
    with fp64_throughout():
        return commanded([*words, "--out", out, *more], killed_at)


def lost(folder, rule):
    return unlearned(folder, "parts", rule, "--shard", "fsdp", killed_at=4)


@pytest.mark.slow
def test_a_rules_memory_is_saved_whole_and_read_in_parts(tmp_path):
    rule = "gru(gamma=0.3)"
    build("llama").save_pretrained(tmp_path / "plain")
    for name, rows in DATA.items():
        write_jsonl(rows, tmp_path / f"{name}.jsonl")
    assert unlearned(tmp_path, "alone", rule) == (0, "")
    assert on_ranks(2, lost, tmp_path, rule, fails=True)[0][0] == 3
    saved = "checkpoint-2/update_rule.pt"
    states = [torch.load(tmp_path / run / saved) for run in ("alone", "parts")]
    assert [state["updates"] for state in states] == [2, 2]
    smoothed = [state["memory"]["smoothed"] for state in states]
    assert [*smoothed[0]] == [*smoothed[1]]
    for key, value in smoothed[0].items():
        torch.testing.assert_close(smoothed[1][key], value, rtol=0, atol=1e-12)
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    again = (tmp_path, "parts", rule, "--resume", "--shard", "fsdp")
    assert on_ranks(3, unlearned, *again) == [(0, "")] * 3
    assert unlearned(tmp_path, "one", rule, "--resume", "--shard", "none") == (0, "")
    expected = load_model(tmp_path / "alone/model").state_dict()
    for run in ("parts", "one"):
        for key, value in load_model(tmp_path / run / "model").state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12)
