"""Checkpoints on several ranks: one folder, which a run of any number of ranks resumes."""

import os
import shutil

import pytest
import torch
from models import build, samples
from ranked import commanded, on_ranks

import geffect_fast as gf
from geffect_fast.data import write_jsonl
from geffect_fast.errors import GEffectError

STEPS = (5, 120)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Checkpoints of a model that drifts, their data, and the result of one process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in STEPS:
        model.save_pretrained(folder / f"out/checkpoint-{step}")
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
        torch.save(optimizer.state_dict(), folder / f"out/checkpoint-{step}/optimizer.pt")
    for name, lengths in (("forget", [5, 9, 3, 7]), ("retain", [7, 4])):
        write_jsonl(samples(lengths, len(lengths)), folder / f"{name}.jsonl")
    assert profiled(folder, "alone") == (0, "")
    return folder


def profiled(folder, out, *more, killed_at=None):
    """Exit code and errors of the command on this rank; rank 1 is killed before a step."""
    os.chdir(folder)
    words = ["profile", "--quiet", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]
    words += ["--objectives", "ga", "npo", "--resolve", "group,sample", "--token-budget", "16"]
    words += ["--second-order"]
    words += ["--checkpoints", "out/checkpoint-*", "--out", out, *more]
    return commanded(words, killed_at)


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def assert_close(found, expected):
    assert found.sizes == expected.sizes
    for name, variable in expected.data_vars.items():
        if variable.dtype.kind == "f":
            # A change is a small difference of risks.
            scale = expected.risk_value if name == "measured_change" else variable
            close = abs(found[name] - variable).max() <= 1e-6 * abs(scale).max()
            assert close or variable.isnull().all(), name
            assert (found[name].isnull() == variable.isnull()).all(), name


@pytest.mark.slow
def test_a_run_that_lost_a_rank_goes_on_with_any_number(here):
    (code, said), other = on_ranks(2, lost, here, fails=True)
    assert other is None
    assert code == 3
    assert said.startswith("error: a rank of the process group has ended")
    assert "what was measured to step 5 is kept: go on with --resume" in said
    assert files(here / "run") == ["manifest.json", "run.yaml", "steps/step-00000005.nc"]
    shutil.copytree(here / "run", here / "again")
    assert profiled(here, "run", "--resume") == (0, "")
    assert on_ranks(3, profiled, here, "again", "--resume") == [(0, "")] * 3
    alone = gf.open_run(here / "alone")
    for name in ("run", "again"):
        assert files(here / name) == files(here / "alone")
        assert_close(gf.open_run(here / name), alone)


def lost(folder):
    return profiled(folder, "run", killed_at=120)


def in_python(folder):
    """Profiles in memory, in a folder whose last checkpoint is unusable, and of models in parts."""
    said = profiled(folder, "parts", "--shard", "fsdp")
    assert said == (0, ""), said
    given = {"forget": samples([5, 9, 3, 7], 4), "retain": samples([7, 4], 2)}
    given |= {"objectives": ["ga", "npo"], "resolve": ("group", "sample"), "second_order": True}
    found = gf.profile_checkpoints(folder / "out/checkpoint-*", None, **given)
    with pytest.raises(GEffectError) as error:
        gf.profile_checkpoints(
            [folder / "out/checkpoint-120", folder / "nan/checkpoint-200"],
            None,
            **given,
            out=folder / "stopped",
        )
    return found, str(error.value)


@pytest.mark.slow
def test_ranks_profile_checkpoints_in_python(here):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(here / "nan/checkpoint-200")
    alone = gf.open_run(here / "alone")
    found = on_ranks(2, in_python, here)
    for dataset, _ in found:
        assert_close(dataset, alone)
    assert "checkpoint-200: lm_head.weight holds 1 NaN" in found[1][1]
    assert "what was measured to step 120 is kept in" in found[0][1]
    assert files(here / "parts") == files(here / "alone")
    assert_close(gf.open_run(here / "parts"), alone)
    assert files(here / "stopped/steps") == ["step-00000120.nc"]
