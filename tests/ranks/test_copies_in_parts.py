"""`--shard hsdp`: the ranks of each host together hold a copy of the model in parts."""

import pytest
import torch
from ranked import commanded, on_ranks

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture.parts import mesh_over
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.measure import models
from geffect_fast.measure.models import load_model

pytestmark = pytest.mark.slow


def words_for(study, out):
    """Commands: a profile, a training, and one by an update rule that compares retain rows."""
    rows = ("--forget", f"{study}/forget.jsonl", "--retain", f"{study}/retain.jsonl")
    given = ("--model", f"{study}/model", "--dtype", "float64", *rows, "--quiet")
    profile = ("profile", "--objectives", "ga", "npo", "--reference", f"{study}/reference")
    steps = ("--steps", "2", "--probe-every", "2", "--probe-rows", "2", "--batch-size", "3")
    steps += ("--learning-rate", "1e-3")
    plainly = ("--optimizer", "sgd")  # Adam turns the rounding that a projection leaves into steps
    unlearn = ("unlearn", *steps, "--no-second-order", "--objective")
    return [
        [*profile, *given, "--out", f"{out}/profile"],
        [*unlearn, "npo + kl", *given, "--out", f"{out}/plain"],
        [*unlearn, "ga", "--update", "orthograd", *plainly, *given, "--out", f"{out}/by_rule"],
    ]


def on_two_hosts(study, out):
    """Results of commands on this rank of four, two to a host, and the meshes of the models."""
    meshes = []
    plain = models.shard

    def seen(model, *args, **kwargs):
        plain(model, *args, **kwargs)
        meshes.append(tuple(next(model.parameters()).device_mesh.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "shard", seen)
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        check = ["check", "--model", f"{study}/model", "--data", f"{study}/forget.jsonl", "--quiet"]
        found = [
            commanded([*words, "--shard", "hsdp"]) for words in (*words_for(study, out), check)
        ]
        again = [mesh_over(ranks.here(), torch.device("cpu"), by_host=True) for _ in range(2)]
        one, other = ([group.group_name for group in each.get_all_groups()] for each in again)
        assert one == other, "each mesh has groups of its own, which stay"
        patch.setenv("LOCAL_WORLD_SIZE", str(1 + torch.distributed.get_rank() % 2))
        with pytest.raises(InputError) as error, ranks.here().together("mesh"):
            mesh_over(ranks.here(), torch.device("cpu"), by_host=True)
        patch.setenv("LOCAL_WORLD_SIZE", "3")
        with (
            pytest.raises(InputError, match="4 ranks, and LOCAL_WORLD_SIZE is 3"),
            ranks.here().together("mesh"),
        ):
            mesh_over(ranks.here(), torch.device("cpu"), by_host=True)
    return found, meshes, str(error.value)


def test_copies_of_a_model_give_what_one_process_finds(study, tmp_path, undrawn):
    for code, meshes, said in on_ranks(4, on_two_hosts, study, tmp_path / "ranks"):
        assert [number for number, _ in code] == [0, 0, 0, 0], code
        assert meshes and set(meshes) == {(2, 2)}
        assert "ranks of a host (LOCAL_WORLD_SIZE): rank 1 has 2, and rank 0 1" in said
    for words in words_for(study, tmp_path / "alone"):
        assert main(words) == 0
    one, other = (gf.open_run(tmp_path / name / "profile") for name in ("alone", "ranks"))
    assert abs(one.g_effect - other.g_effect).max() <= 1e-12 * abs(one.g_effect).max()
    assert abs(one.grad_norm - other.grad_norm).max() <= 1e-12 * abs(one.grad_norm).max()
    before = load_model(study / "model", "float64")
    # Norms compute in fp32 here too, and sums of rows' gradients pass them only where models are
    # parts.
    for run, exact in (("plain", 1e-9), ("by_rule", 1e-6)):
        one, other = (load_model(tmp_path / name / run / "model") for name in ("alone", "ranks"))
        for name, p in one.named_parameters():
            moved = float((p - before.get_parameter(name)).abs().max())
            apart = float((p - other.get_parameter(name)).abs().max())
            assert apart <= exact * moved, (run, name)
