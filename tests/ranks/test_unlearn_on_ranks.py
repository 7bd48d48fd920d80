"""A training on several ranks takes the steps of one process, and each rank has the model."""

import os
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from models import build, fp64_throughout, samples
from ranked import assert_same_training, commanded, of_each, on_ranks, weights_of

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.data import write_jsonl
from geffect_fast.errors import GEffectError, InputError, NonFiniteError
from geffect_fast.measure.models import load_model
from geffect_fast.training import trainer

DATA = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6], 2, 3)}
PAIRS = [
    row | {"alternative": samples([n], 10 + n, 3)[0]}
    for n, row in zip((6, 9, 4, 7, 5), DATA["forget"], strict=True)
]
SGD = {"steps": 2, "learning_rate": 0.05, "optimizer": "sgd"}
SGD |= {"probe_every": 2, "probe_rows": "all"}
RULES = ("gru", "gu", "sago", "sam")
"""Rules that need different things of a step. `test_sharded_rules.py` has all rules."""
ON_TWO = {
    "llama": ("npo(beta=0.5) + kl", {"batch_size": 3, "retain_batch_size": 2}),
    "two passes": ("dpo(beta=0.2) + npo(beta=0.3)", {"batch_size": 4, "forget": PAIRS}),
    "hidden states": ("rmu(layer=1) + kl", {"batch_size": 3}),
    "lora": ("npo(beta=0.5) + kl", {"batch_size": 3, "lora_rank": 2}),
    "adam": ("npo(beta=0.5)", {"batch_size": 4, "optimizer": "adamw_torch", "max_grad_norm": 0.1}),
    **{rule: ("ga + 0.5*nll", {"batch_size": 3, "update": rule}) for rule in RULES},
}
ON_THREE = {
    "fewer rows than ranks": ("ga", {"batch_size": 1}),
    "experts": ("ga + 0.5*nll", {"batch_size": 2, "model": "qwen2_moe"}),
    "pieces": ("wga(alpha=0.5) + gd", {"batch_size": 2, "accumulation": 2, "token_budget": 20}),
    "orthograd": ("ga + 0.5*nll", {"batch_size": 3, "update": "orthograd"}),
}
EXACT = 1e-12
"""The largest difference of weights, some of which are about 1."""


def trained(objective, more):
    """The result of a training, and the weights in the end."""
    given = DATA | SGD | more
    if "max_grad_norm" in given:
        given |= {"trainer": {"max_grad_norm": given.pop("max_grad_norm")}}
    with fp64_throughout():
        model = build(given.pop("model", "llama"), torch.float64)
        result = gf.unlearn(model, None, objective=objective, **given)
    return result, weights_of(model)


@pytest.mark.parametrize(
    ("size", "cases"), [(2, ON_TWO), pytest.param(3, ON_THREE, marks=pytest.mark.slow)]
)
def test_ranks_take_the_steps_of_one_process(size, cases):
    alone, found = of_each(trained, cases), on_ranks(size, of_each, trained, cases)
    for name, expected in alone.items():
        _, weights = found[0][name]
        for of_rank in found:
            assert_same_training(name, of_rank[name], expected, EXACT)
            for key, value in of_rank[name][1].items():
                assert (value == weights[key]).all(), (name, key)


def no_room_for_sums(rule):
    """A rank's message for a training in which rank 1 finds no memory for sums of gradients."""

    plain = trainer.UnlearnTrainer._added_up

    def fails(*_):
        raise torch.OutOfMemoryError("rank 1 has nothing left")

    def added_up(self, value):
        with pytest.MonkeyPatch.context() as inside:
            if dist.get_rank() == 1:
                inside.setattr(ranks, "_bucket", fails)
            return plain(self, value)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(GEffectError) as error:
        patch.setattr(trainer.UnlearnTrainer, "_added_up", added_up)
        gf.unlearn(
            build("llama"), None, **(DATA | SGD), objective="ga + nll", batch_size=3, update=rule
        )
    return str(error.value)


@pytest.mark.parametrize("rule", ["sgd", "gru"])
def test_no_memory_for_sums_is_an_error_of_all(rule):
    own, other = on_ranks(2, no_room_for_sums, rule)[::-1]
    assert own.startswith("out of memory where ranks add up their gradients")
    assert other == f"rank 1: {own}"


def halved(rule):
    """The weights of a training in which rank 1 finds memory for at most 18 tokens at once."""
    run = trainer.model_outputs

    def small(model, batch, needs):
        if batch.total_tokens > 18 and dist.is_initialized() and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("rank 1 has little")
        return run(model, batch, needs)

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as said,
        fp64_throughout(),
    ):
        warnings.simplefilter("always")
        patch.setattr(trainer, "model_outputs", small)
        model = build("llama", torch.float64)
        gf.unlearn(model, None, **(DATA | SGD), objective="ga + nll", batch_size=5, update=rule)
    told = [str(w.message) for w in said if "out of memory" in str(w.message)]
    return told, weights_of(model)


@pytest.mark.parametrize("rule", ["sgd", "gru(gamma=0.8)"])
def test_all_ranks_redo_an_update_for_which_one_lacks_memory(rule):
    _, expected = halved(rule)
    for said, weights in on_ranks(2, halved, rule):
        assert said and said[0].startswith("out of memory with a batch of")
        for key, value in expected.items():
            assert abs(weights[key] - value).max() <= EXACT, key


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A model, its data, and the result of one process."""
    folder = tmp_path_factory.mktemp("unlearned")
    build("llama").save_pretrained(folder / "plain")
    for name, rows in DATA.items():
        write_jsonl(rows, folder / f"{name}.jsonl")
    assert unlearned(folder, "alone") == (0, "")
    return folder


def unlearned(folder, out, *more, killed_at=None):
    """Exit code and errors of the command on this rank; rank 1 is killed before a probe."""
    os.chdir(folder)
    words = ["unlearn", "--quiet", "--model", "plain", "--forget", "forget.jsonl"]
    words += ["--retain", "retain.jsonl", "--objective", "npo(beta=0.5) + kl", "--steps", "4"]
    words += ["--batch-size", "3", "--probe-every", "2", "--learning-rate", "0.05"]
    words += ["--optimizer", "sgd", "--probe-rows", "all", "--report-to", "tensorboard"]
    return commanded([*words, "--out", out, *more], killed_at)


def lost(folder):
    return unlearned(folder, "run", killed_at=4)


def files(folder):
    return sorted(
        str(f.relative_to(folder)).split(".out.")[0] for f in folder.rglob("*") if f.is_file()
    )


@pytest.mark.slow
def test_a_run_that_lost_a_rank_goes_on_with_any_number(here):
    (code, said), other = on_ranks(2, lost, here, fails=True)
    assert other is None
    assert code == 3
    assert said.startswith("error: a rank of the process group has ended")
    assert "what was measured to step 2 is kept: go on with --resume" in said
    assert (here / "run/checkpoint-2").is_dir()
    assert not (here / "run/checkpoint-4").exists()
    shutil.copytree(here / "run", here / "parts")
    assert unlearned(here, "run", "--resume") == (0, "")
    assert on_ranks(3, unlearned, here, "parts", "--resume", "--shard", "fsdp") == [(0, "")] * 3
    alone, weights = gf.open_run(here / "alone"), load_model(here / "alone/model").state_dict()
    for name in ("run", "parts"):
        assert {f.split("/")[0] for f in files(here / name)} == {
            f.split("/")[0] for f in files(here / "alone")
        }
        found = gf.open_run(here / name)
        for variable in ("g_effect", "risk_value", "measured_change", "predicted_sgd"):
            apart = abs(found[variable] - alone[variable]).max()
            assert apart <= 2e-5 * abs(alone[variable]).max(), (name, variable)
        for key, value in load_model(here / name / "model").state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5)


def parts(folder):
    """Runs whose model is shared out, trained whole or by an adapter."""
    return [
        unlearned(folder, name, "--shard", "fsdp", "--keep-checkpoints", *more)
        for name, more in (("fsdp", ()), ("fsdp-lora", ADAPTER))
    ]


ADAPTER = ("--lora-rank", "2", "--optimizer", "adamw_torch")


@pytest.mark.slow
def test_parts_of_a_model_are_trained_and_saved_as_the_whole(here):
    assert unlearned(here, "lora", *ADAPTER) == (0, "")
    assert on_ranks(2, parts, here) == [[(0, "")] * 2] * 2
    for name, other in (("alone", "fsdp"), ("lora", "fsdp-lora")):
        assert sorted(f.name for f in (here / name / "model").iterdir()) == sorted(
            f.name for f in (here / other / "model").iterdir()
        )
        whole = load_model(here / name / "model").state_dict()
        for folder in ("model", "checkpoint-4"):
            for key, value in load_model(here / other / folder).state_dict().items():
                torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-5)
    # The saved optimizer's state is whole, and that of one process.
    saved = torch.load(here / "fsdp-lora/checkpoint-4/optimizer.pt", weights_only=True)
    adapter = [value for key, value in whole.items() if "lora_" in key]
    assert sorted(tuple(of["exp_avg"].shape) for of in saved["state"].values()) == sorted(
        tuple(value.shape) for value in adapter
    )
    assert on_ranks(2, unlearned, here, "fsdp-lora", "--resume", *ADAPTER)[0][0] == 2


def refused(folder):
    """Messages of ranks for a training that some cannot do, or that differs between ranks."""
    said = {}
    given = DATA | SGD | {"objective": "ga"}
    for name, other in (("steps", {"steps": 5}), ("out", {"out": folder / "other"})):
        with pytest.raises(InputError) as error:
            gf.unlearn(build("llama"), None, **(given | (other if dist.get_rank() else {})))
        said[name] = str(error.value)
    with pytest.raises(NonFiniteError) as error:
        gf.unlearn(build("llama"), None, **(given | {"learning_rate": 1e30, "steps": 3}))
    said["diverges"] = str(error.value)
    before = PartialState().num_processes
    gf.unlearn(build("llama"), None, **given)
    drawn = ranks.here().meet(torch.rand(1).item())
    with ranks.on_its_own():
        gf.unlearn(build("llama"), None, **given)
    return said, before, PartialState().num_processes, drawn


def test_ranks_that_differ_or_diverge_end_with_one_line(tmp_path):
    for said, before, after, drawn in on_ranks(2, refused, tmp_path):
        assert drawn[0] == drawn[1]
        assert said["steps"].startswith("training: rank 1 has")
        assert said["out"].startswith("out: rank 1 has")
        assert "step" in said["diverges"] and "\n" not in said["diverges"]
        assert before == after
